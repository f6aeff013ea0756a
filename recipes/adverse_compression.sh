#!/bin/bash
# "Adverse compression": is a large model, merged until it is as fast as a small one, still better than the small one?
#
#   recipes/adverse_compression.sh --large s=S.safetensors --small ti=TI.safetensors --data cifar10.tar,textures10.tar --out DIR
#
# The curve of the paper (arXiv 2403.09192, figure 5): ToMe + LoRA and PYRA + LoRA at several speed-ups of the large
# model beside LoRA of the small one, a few seeds. For each speed-up `compress --merge tome --target-speedup` finds the
# schedule on this device, for both mergers the same; or --schedules names them (low;high;16;NAME=2,4,8,…). Speed is
# measured by `bench` and is in times of the dense large model; where no point lies within 5 % of the small one's speed,
# accuracy is interpolated between its neighbours. What is done already in DIR is not done again. Writes
# DIR/results.jsonl, DIR/table.md and DIR/curve.svg. Time: a training of 100 epochs for each task, seed, merger and
# speed-up; meant for a GPU.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export PYRACTL=${PYRACTL:-$here/../build/bin/pyractl}
exec python3 "$here/adverse_compression.py" "$@"
