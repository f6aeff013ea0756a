#!/usr/bin/env bash
# pyractl beside PyTorch + timm (eager and compiled) on this machine's GPU, in one run; docs/benchmarks.md holds results.
#
#   recipes/bench_gpu.sh [--out NAME] [--mode infer|train] [--dtype bf16] [--quick] [--no-peers]
#
# About 7 minutes on an H100, training 4.
#
# Our rows: `pyractl bench` with CUDA events, images on the GPU, medians; ViT-B at batches 1 to 512, ViT-L, ViT-S and
# distilled DeiT-B, dense and merged in turn, one batch after another (infer) and, of some, in flight (throughput).
# Peers: timm dense, and timm with ToMe's and PYRA's merge as published. Writes NAME.json and NAME.md. Needs a python3
# with torch and timm (PYRA_TIMM_PYTHON names another); PYRACTL another binary.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYRACTL="${PYRACTL:-$root/build/bin/pyractl}"
[[ -x $PYRACTL ]] || { echo "bench_gpu.sh: $PYRACTL is not there: build it first (make build)" >&2; exit 2; }
exec "${PYRA_TIMM_PYTHON:-python3}" "$root/recipes/bench_gpu.py" "$@"
