#!/bin/bash
# What a GPU's precisions change in a model's answers: eval in fp32, tf32, fp16 and bf16, image by image.
#
#   recipes/precisions.sh --models dense=DENSE.safetensors,pyra=PYRA.safetensors --data TASK.tar --out DIR
#
# Writes DIR/precisions.json and a table, DIR/precisions.md: top-1 of each precision, how many answers are fp32's, and
# mean and largest difference of the first class's probability where they are. The images' answers stay as CSV beside
# them. --device cuda:1, --split val and --batch N as in eval; more for eval behind "--", as in `-- --exact-gelu`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export PYRACTL=${PYRACTL:-$here/../build/bin/pyractl}
exec python3 "$here/precisions.py" "$@"
