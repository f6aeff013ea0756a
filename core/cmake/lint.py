#!/usr/bin/env python3
"""clang-tidy (list: .clang-tidy) over core/, cli/ and plugins/, or the folders named; needs a built build folder.
Exits 1 on a finding.

LibTorch's headers cost clang-tidy 20 s a file. So the files of a folder are checked as one translation unit, on top of
a precompiled header; where they do not go together (two files use one name), they are checked one by one.
"""
import concurrent.futures
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
WORK = BUILD / "lint"
KNOWN = "reference to local binding"  # a lambda may capture one since C++20; Clang learnt it in version 16
KEPT = re.compile(r"-(D|I|std=|m|fopenmp|fvisibility)")


def tool(name):
    found = shutil.which(name + "-14") or shutil.which(name)
    if not found:
        sys.exit(f"lint: {name} is missing: apt-get install clang clang-tidy")
    return found


def flags_of(command):
    """What clang needs of GCC's command line; the precompiled header and GCC's own warnings go."""
    words, flags = shlex.split(command), []
    for i, word in enumerate(words):
        if word == "-isystem":
            flags += [word, words[i + 1]]
        elif KEPT.match(word):
            flags.append(word)
    return tuple(flags)


def sources(file):
    """What a command compiles: a file, or those that CMake put into one (PyraUnity.cmake)."""
    if file.parent.name != "Unity":
        return [file]
    return [Path(name) for name in re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE)]


def units():
    """{(folder, flags, precompiled header): files} from the compilation database."""
    groups = {}
    for entry in json.loads((BUILD / "compile_commands.json").read_text()):
        for file in sources(Path(entry["file"])):
            ours = file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in ("core", "cli", "plugins")
            if ours and file.suffix == ".cpp":  # what nvcc compiles is not Clang's C++
                header = re.search(r"-include (\S+cmake_pch\.hxx)", entry["command"])
                key = (file.parent, flags_of(entry["command"]), header and header.group(1))
                groups.setdefault(key, []).append(file)
    return groups


def tidy(source, flags):
    return subprocess.run([TIDY, "--quiet", str(source), "--", *flags], capture_output=True, text=True, cwd=ROOT).stdout


def precompiled(number, header, flags):
    pch = WORK / f"pch-{abs(hash((header, flags)))}.pch"
    if not pch.exists():
        partial = pch.with_suffix(f".{number}")
        subprocess.run([CLANG, *flags, "-w", "-x", "c++-header", header, "-o", str(partial)], check=True)
        partial.rename(pch)
    return pch


def check(number, folder, flags, header, files):
    started = time.monotonic()
    if header:
        flags = (*flags, "-include-pch", str(precompiled(number, header, flags)))
    unit = WORK / f"{folder.name}-{number}.cpp"
    unit.write_text("".join(f'#include "{file}"\n' for file in files))
    text = tidy(unit, flags)
    if "redefinition of" in text and len(files) > 1:
        text = "".join(tidy(file, flags) for file in files)
    text = "\n".join(line for line in text.splitlines() if KNOWN not in line)
    code = 1 if re.search(r"(warning|error): .*\[[a-z].*\]", text) else 0
    verdict = "ok" if code == 0 else "FAILED"
    print(f"lint: {folder.relative_to(ROOT)}: {len(files)} files, {time.monotonic() - started:.0f} s, {verdict}",
          file=sys.stderr)
    return code, text


def main():
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    found = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(check, i, *key, files) for i, (key, files) in enumerate(units().items())
                if not sys.argv[1:] or any(key[0].is_relative_to(ROOT / room) for room in sys.argv[1:])]
        if not jobs:
            sys.exit(f"lint: nothing that is built lies under {' '.join(sys.argv[1:]) or ROOT}")
        for job in jobs:
            code, text = job.result()
            if code:
                found = 1
                print(text)
    shutil.rmtree(WORK, ignore_errors=True)
    return found


if __name__ == "__main__":
    CLANG, TIDY = tool("clang++"), tool("clang-tidy")
    sys.exit(main())
