#!/bin/bash
# What a schedule that is searched for is worth beside the uniform one of equal time, on several tasks.
#
#   recipes/schedules.sh --model vit_ti_patch8_112.safetensors --data cifar10.tar,fashion_mnist.tar --out DIR
#
# For each task: LoRA without merging (60 s of training, or --seconds), merged into the weights, then
# `compress --merge tome --target-speedup 2` (or --merge, --speedup), its accuracy on the test images and that of as many
# tokens a block at the same time. Writes DIR/table.md; what is there already is not trained again. On two cores some
# 5 minutes a task; run it on an idle machine, for it measures time.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export PYRACTL=${PYRACTL:-$here/../build/bin/pyractl}
exec python3 "$here/schedules.py" "$@"
