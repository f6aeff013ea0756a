"""The measuring half of bench_vs_timm.sh: timm's side of every row, the rounds, the intervals."""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm_peers import LoraLinear, MergingVit
from torch import nn

THREADS, BATCH, ARCH = 2, 32, "vit_ti_patch8_112"
DROP_PATH = 0.1


def make_model(merged, lora, drop_path):
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=112, patch_size=8, embed_dim=192, depth=12, num_heads=3, drop_path_rate=drop_path
    )
    if lora:
        model.requires_grad_(False)
        for block in model.blocks:
            block.attn.qkv = LoraLinear(block.attn.qkv)
        model.head.requires_grad_(True)
    return MergingVit(model, "pyra", "high") if merged else model


def infer_step(merged, dtype):
    model = make_model(merged, lora=False, drop_path=0).eval().to(dtype)
    images = torch.rand(BATCH, 3, 112, 112, dtype=torch.float32).sub(0.5).div(0.5).to(dtype)

    def step():
        with torch.inference_mode():
            model(images)

    return step


def train_step(merged):
    model = make_model(merged, lora=True, drop_path=DROP_PATH).train()
    images = torch.rand(BATCH, 3, 112, 112).sub(0.5).div(0.5)
    labels = torch.randint(0, 1000, (BATCH,))
    # A rate that hardly changes the weights, as on the other side: random labels are nothing to learn.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-7, weight_decay=1e-4)

    def step():
        optimiser.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()

    return step


def row_name(mode, merged, dtype):
    return f"{mode}/{ARCH}/{'pyra-high' if merged else 'dense'}/cpu/{dtype}/b{BATCH}"


GROUPS = (("infer", "fp32"), ("infer", "bf16"), ("train", "fp32"))
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def timm_steps():
    steps = {}
    for mode, dtype in GROUPS:
        for merged in (False, True):
            step = infer_step(merged, TORCH_DTYPES[dtype]) if mode == "infer" else train_step(merged)
            steps[row_name(mode, merged, dtype)] = step
    return steps


def timm_images_per_second(step, seconds):
    start = time.perf_counter()
    step()
    if time.perf_counter() - start < seconds:  # bf16 without hardware for it takes many seconds a step: once is warm
        step()
    start, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        step()
        done += 1
    return BATCH * done / passed


def our_images_per_second(mode, dtype, seconds):
    """Dense and merged, in one short run of pyractl; its set-up and warm-up are outside of what it times."""
    command = [os.environ["PYRACTL"], "bench", "--arch", ARCH, "--merge", "pyra", "--schedule", "high"]
    command += ["--mode", mode, "--dtype", dtype, "--batch", str(BATCH), "--threads", str(THREADS), "--warmup", "3"]
    command += ["--repetitions", "1", "--min-time", str(seconds), "--device", "cpu", "--json", "--quiet"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        sys.exit(f"bench_vs_timm.py: pyractl ended with {answer.returncode}: {answer.stderr.strip()}")
    document = json.loads(answer.stdout)
    runs = [run for run in document["benchmarks"] if run["run_type"] == "iteration"]
    return {run["name"]: run["items_per_second"] for run in runs}, document["context"]


def t_quantile(probability, freedom):
    """Student's t by bisection on Simpson's rule over its density: no SciPy needed for one number."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def above_zero(x, steps=2000):
        width = x / steps
        weights = (1 if i in (0, steps) else 4 if i % 2 else 2 for i in range(steps + 1))
        density = (scale * (1 + (i * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1))
        return sum(w * d for w, d in zip(weights, density)) * width / 3

    low, high = 0.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + above_zero(middle) < probability else (low, middle)
    return high


def ratio_with_interval(numerators, denominators):
    """Geometric mean of paired ratios, and its 95 % interval by Student's t on their logarithms."""
    logs = [math.log(a / b) for a, b in zip(numerators, denominators)]
    centre = statistics.mean(logs)
    half = t_quantile(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"ratio": math.exp(centre), "low": math.exp(centre - half), "high": math.exp(centre + half)}


def measure(options, steps):
    ours, theirs, context = {}, {}, {}
    groups = [g for g in GROUPS if any(row_name(g[0], merged, g[1]) in steps for merged in (False, True))]

    def our_turn(mode, dtype):
        nonlocal context
        found, context = our_images_per_second(mode, dtype, options.seconds)
        for name, value in found.items():
            ours.setdefault(name, []).append(value)

    def their_turn(mode, dtype):
        for merged in (False, True):
            name = row_name(mode, merged, dtype)
            if name in steps:
                theirs.setdefault(name, []).append(timm_images_per_second(steps[name], options.seconds))

    for number in range(options.rounds):
        for mode, dtype in groups:
            # Whoever goes second finds a warmer machine, so the sides take turns at it.
            for turn in (our_turn, their_turn) if number % 2 == 0 else (their_turn, our_turn):
                turn(mode, dtype)
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    return ours, theirs, context


def report(options, ours, theirs, context):
    rows = []
    for name in theirs:
        row = {"name": name, "peer": "timm-eager/" + name}
        row["images_per_second"] = statistics.median(ours[name])
        row["peer_images_per_second"] = statistics.median(theirs[name])
        row.update(ratio_with_interval(ours[name], theirs[name]))
        row["runs"], row["peer_runs"] = ours[name], theirs[name]
        rows.append(row)
    speed_up = []
    for mode, dtype in GROUPS:
        dense, merged = (row_name(mode, m, dtype) for m in (False, True))
        if dense in ours:
            speed_up.append({"name": merged, **ratio_with_interval(ours[merged], ours[dense])})
    peer = {"torch": torch.__version__, "timm": timm.__version__, "threads": torch.get_num_threads()}
    passed = all(row["low"] >= 1.0 for row in rows)
    keep = ("date", "cpu_model", "num_cpus", "threads", "micro_kernel", "libtorch_version", "pyractl_version", "commit")
    context = {key: context[key] for key in keep}
    return {"context": {**context, "peer": peer, "rounds": options.rounds, "seconds": options.seconds},
            "rows": rows, "speed_up_over_dense": speed_up, "passed": passed}  # fmt: skip


def print_table(document):
    context = document["context"]
    print(f"{context['cpu_model']}, {context['threads']} threads; torch {context['peer']['torch']}, "
          f"timm {context['peer']['timm']} (eager); medians of {context['rounds']} interleaved runs")  # fmt: skip
    width = max(len(row["name"]) for row in document["rows"])
    print(f"{'row':{width}}  {'ours':>8}  {'timm':>8}  {'ratio':>6}  95% interval")
    for row in document["rows"]:
        verdict = "" if row["low"] >= 1.0 else "  BELOW 1.0"
        print(f"{row['name']:{width}}  {row['images_per_second']:8.1f}  {row['peer_images_per_second']:8.1f}  "
              f"{row['ratio']:6.2f}  {row['low']:.2f} to {row['high']:.2f}{verdict}")  # fmt: skip
    for row in document["speed_up_over_dense"]:
        print(f"{row['name']:{width}}  {row['ratio']:.2f}x our dense model ({row['low']:.2f} to {row['high']:.2f})")


def main():
    parser = argparse.ArgumentParser(prog="bench_vs_timm.sh", description="pyractl against eager timm on the CPU")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout and nothing else")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved runs of both sides (default 9)")
    parser.add_argument("--seconds", type=float, default=1.5, help="how long a run of a row lasts (default 1.5)")
    parser.add_argument("--rows", default="", help="only rows whose name matches this regular expression")
    options = parser.parse_args()
    if options.rounds < 3:
        parser.error("--rounds: an interval needs 3 or more")
    torch.set_num_threads(THREADS)
    steps = {name: step for name, step in timm_steps().items() if re.search(options.rows, name)}
    if not steps:
        parser.error(f"--rows {options.rows}: no row matches")
    document = report(options, *measure(options, steps))
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        print_table(document)
    return 0 if document["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
