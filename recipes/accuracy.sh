#!/bin/bash
# Which way of training a merged model keeps its accuracy: every method on several tasks, backbones and seeds.
#
#   recipes/accuracy.sh --models ti=TI.safetensors,s=S.safetensors --data cifar10.tar,textures10.tar --out DIR
#
# A task is a folder or .tar with VTAB-1k's lists; each method trains 100 epochs on train800val200 and looks at test
# once. What is done already in DIR is not done again, so a run that was stopped goes on. --jobs runs at a time share
# the device. Writes DIR/results.jsonl (a line a run, the protocol in it) and DIR/table.md. Expected: docs/results.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export PYRACTL=${PYRACTL:-$here/../build/bin/pyractl}
exec python3 "$here/accuracy.py" "$@"
