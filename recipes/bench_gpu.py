"""The measuring half of bench_gpu.sh: our rows by `pyractl bench`, timm's by CUDA events, all in one run."""

import argparse
import json
import os
import statistics
import subprocess
import sys

# Imported by main(), so that --help needs neither.
timm = torch = LoraLinear = MergingVit = None

# By mode of `pyractl bench`: (architecture, merger, schedule, batches); each also gives its dense row.
OURS = {
    "infer": [
        ("vit_base_patch16_224", "pyra", "high", "1,2,4,8,16,32,64,128,256,512"),
        ("vit_base_patch16_224", "pyra", "low", "1,2,4,8,16,32,64,128,256,512"),
        ("vit_base_patch16_224", "tome", "high", "1,256"),
        ("vit_base_patch16_224", "diffrate", "high", "256"),
        ("vit_large_patch16_224", "pyra", "high", "64,256"),
        ("vit_large_patch16_224", "pyra", "low", "64,256"),
        ("vit_small_patch16_224", "pyra", "high", "256"),
        ("vit_small_patch16_224", "pyra", "low", "256"),
        ("deit_base_distilled_patch16_224", "pyra", "high", "256"),
        ("deit_base_distilled_patch16_224", "pyra", "low", "256"),
    ],
    "throughput": [
        ("vit_base_patch16_224", "pyra", "high", "1,8,32,64,128,256"),
        ("vit_base_patch16_224", "pyra", "low", "1,8,32,64,128,256"),
        ("vit_large_patch16_224", "pyra", "high", "64"),
    ],
    # LoRA of rank 8: AdamW, drop-path 0.1, LoRA dropout 0.1.
    "train": [
        ("vit_base_patch16_224", "pyra", "high", "32,128"),
        ("vit_base_patch16_224", "pyra", "low", "32,128"),
        ("vit_base_patch16_224", "tome", "high", "32,128"),
    ],
}
# The peers, all ViT-B: (merger or None, schedule, batch, compiled); what compiles longest comes last.
PEERS = {
    "infer": [
        (None, None, 256, False),
        ("pyra", "low", 256, False),
        ("pyra", "high", 256, False),
        ("tome", "high", 256, False),
        (None, None, 1, False),
        ("pyra", "high", 1, False),
        (None, None, 256, True),
        (None, None, 1, True),
        ("pyra", "high", 256, True),
        ("pyra", "low", 256, True),
    ],
    "train": [
        (None, None, 32, False),
        ("pyra", "high", 32, False),
        (None, None, 128, False),
        ("pyra", "high", 128, False),
        (None, None, 32, True),
        (None, None, 128, True),
    ],
}
PEER_ARCH = "vit_base_patch16_224"
DROP_PATH = 0.1


def pyractl(*arguments):
    command = [os.environ["PYRACTL"], "bench", "--json", "--quiet", "--device", "cuda", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        sys.exit(f"bench_gpu.py: {' '.join(command)} ended with {answer.returncode}: {answer.stderr.strip()}")
    return json.loads(answer.stdout)


def our_rows(options):
    """Medians by name; the context of the last run. A dense row that several runs measured keeps its first figure."""
    rows, context = {}, {}
    modes = ["infer", "throughput"] if options.mode == "infer" else [options.mode]
    for mode, (arch, merger, schedule, batches) in [(mode, row) for mode in modes for row in OURS[mode]]:
        if options.quick and arch != PEER_ARCH:
            continue
        print(f"pyractl {mode} {arch} {merger} {schedule}", file=sys.stderr)
        document = pyractl("--arch", arch, "--merge", merger, "--schedule", schedule, "--batch", batches, "--mode",
                           mode, "--dtype", options.dtype, "--repetitions", str(options.repetitions), "--min-time", "0.1")  # fmt: skip
        context = document["context"]
        dense = {}
        for run in document["benchmarks"]:
            if run.get("aggregate_name") != "median":
                continue
            name = run["run_name"]
            rate = run["items_per_second"]
            kind = name.split("/")[2]
            if kind == "dense":
                dense[run_key(name)] = rate
            row = {"name": name, "images_per_second": rate, "ms": run["real_time"], "macs": run["macs"],
                   "peak_memory_bytes": run["peak_memory_bytes"]}  # fmt: skip
            if kind != "dense":
                row["speed_up"] = rate / dense[run_key(name)]  # of the same run
                row["slower_than_dense"] = row["speed_up"] < 1
            rows.setdefault(name, row)
    return list(rows.values()), context


def run_key(name):
    parts = name.split("/")
    return parts[1], parts[-1]


def compiled_or_not(model, compiled, options):
    if not compiled:
        return model
    return torch.compile(model, mode="max-autotune" if options.autotune else "reduce-overhead")


def infer_step(merger, schedule, batch, compiled, dtype, options):
    model = timm.create_model(PEER_ARCH).eval().to("cuda", dtype)
    if merger:
        model = MergingVit(model, merger, schedule).eval().to("cuda", dtype)
    model = compiled_or_not(model, compiled, options)
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=dtype)

    def step():
        with torch.inference_mode():
            model(images)

    return step


def train_step(merger, schedule, batch, compiled, dtype, options):
    """fp32 masters under autocast, as PyTorch's users train; AdamW's fused form."""
    model = timm.create_model(PEER_ARCH, drop_path_rate=DROP_PATH).requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv = LoraLinear(block.attn.qkv)
    model.head.requires_grad_(True)
    if merger:
        model = MergingVit(model, merger, schedule)
    model = model.cuda().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-7, weight_decay=1e-4, fused=True)
    model = compiled_or_not(model, compiled, options)
    images = torch.randn(batch, 3, 224, 224, device="cuda")
    labels = torch.randint(0, 1000, (batch,), device="cuda")

    def step():
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()

    return step


def peer_row(merger, schedule, batch, compiled, options):
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options.dtype]
    make_step = infer_step if options.mode == "infer" else train_step
    step = make_step(merger, schedule, batch, compiled, dtype, options)
    times = []
    for _ in range(10):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(40):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    ms = statistics.median(times)
    kind = f"{merger}-{schedule}" if merger else "dense"
    peer = "timm-compiled" if compiled else "timm-eager"
    name = f"{peer}/{options.mode}/{PEER_ARCH}/{kind}/cuda/{options.dtype}/b{batch}"
    print(f"{name} {1e3 * batch / ms:.0f}", file=sys.stderr)
    row = {"name": name, "images_per_second": 1e3 * batch / ms, "ms": ms}
    if not compiled:  # a captured graph's pool is not counted
        row["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return row


def markdown(document):
    context = document["context"]
    lines = [f"{context['device']}, driver {context['driver']}, highest clock {context['gpu_clock_mhz']} MHz, "
             f"{context['clocks']}; commit {context['commit']}; torch {context['peer']['torch']}, timm "
             f"{context['peer']['timm']}", "", "| row | images/s | ms | over its dense | peak MB |", "|---|---|---|---|---|"]  # fmt: skip
    for row in document["rows"]:
        speed_up = f"{row['speed_up']:.2f}x" if "speed_up" in row else ""
        if row.get("slower_than_dense"):
            speed_up += " (slower than dense)"
        peak = f"{row['peak_memory_bytes'] / 1e6:,.0f}" if "peak_memory_bytes" in row else ""
        lines.append(f"| {row['name']} | {row['images_per_second']:,.0f} | {row['ms']:.3f} | {speed_up} | {peak} |")
    return "\n".join(lines) + "\n"


def clocks():
    query = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu"
    answer = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
    return "SM, memory clock, power, temperature at the end: " + answer.stdout.strip().split("\n")[0]


def write(document, name):
    with open(name + ".json", "w") as file:
        json.dump(document, file, indent=1)
    with open(name + ".md", "w") as file:
        file.write(markdown(document))


def main():
    parser = argparse.ArgumentParser(prog="bench_gpu.sh", description="pyractl beside timm on a GPU")
    parser.add_argument("--out", default="bench_gpu", help="writes OUT.json and OUT.md (default bench_gpu)")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--mode", default="infer", choices=["infer", "train"],
                        help="infer: batches one after another, and in flight; train: steps with LoRA")  # fmt: skip
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="ViT-B only")
    parser.add_argument("--no-peers", action="store_true", help="our rows alone")
    parser.add_argument("--autotune", action="store_true", help="peers compiled with max-autotune: minutes each")
    options = parser.parse_args()
    global timm, torch, LoraLinear, MergingVit
    try:
        import timm
        import torch
        from timm_peers import LoraLinear, MergingVit
    except ImportError as error:
        parser.error(f"{error}: it needs a python3 with torch and timm; PYRA_TIMM_PYTHON names another one")
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU that PyTorch can use")
    rows, context = our_rows(options)
    keep = ("date", "device", "driver", "gpu_clock_mhz", "libtorch_version", "pyractl_version", "commit")
    context = {key: context[key] for key in keep}
    context["clocks"] = clocks()
    context["peer"] = {"torch": torch.__version__, "timm": timm.__version__}
    document = {"context": context, "rows": rows}
    write(document, options.out)
    for peer in [] if options.no_peers else PEERS[options.mode]:
        rows.append(peer_row(*peer, options))
        write(document, options.out)  # after each: a compiler that fails loses nothing
    print(markdown(document))


if __name__ == "__main__":
    main()
