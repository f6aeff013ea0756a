"""Unpacks what a CPU build reads out of the wheels of libtorch.txt: unpack_libtorch.py WHEEL... FOLDER

The GPU libraries and the Python modules, two thirds of the 1.6 GB, stay packed.
"""
import re
import sys
import zipfile

WANTED = re.compile(
    r"torch/include/.*"
    r"|torch/lib/(libtorch_cpu\.so|libc10\.so|libgomp\.so\.1)"
    r"|nvidia/cu13/lib/(libcudart|libcupti)\.so\.13"
    r"|[^/]+\.dist-info/(METADATA|(licenses/)?(LICENSE|NOTICE|License)[^/]*)"
)
REQUIRED = ["torch/include/ATen/ATen.h", "torch/lib/libtorch_cpu.so", "torch/lib/libc10.so",
            "nvidia/cu13/lib/libcudart.so.13", "nvidia/cu13/lib/libcupti.so.13"]


def main(wheels, folder):
    unpacked = set()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in filter(WANTED.fullmatch, archive.namelist()):
                archive.extract(name, folder)  # checks each file's CRC; the wheel's hash was checked by pip
                unpacked.add(name)
    missing = [name for name in REQUIRED if name not in unpacked]
    if missing:
        sys.exit(f"unpack_libtorch.py: not in the wheels: {', '.join(missing)}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1:-1], sys.argv[-1])
