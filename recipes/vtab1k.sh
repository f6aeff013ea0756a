#!/bin/bash
# VTAB-1k: every method of recipes/vtab1k.toml on 19 tasks (or those that are there), several seeds, one line a run.
#
#   recipes/vtab1k.sh --model vit_b.safetensors --data FOLDER --out DIR
#   recipes/vtab1k.sh … --shard 3/20          one of twenty jobs of a cluster: job 3 (from 0), all into the same DIR
#   recipes/vtab1k.sh … --table               only the table of what is done
#
# FOLDER holds a folder or .tar a task, by VTAB-1k's names (docs/vtab1k.md says where they come from); each is checked
# before anything trains: lists, number of classes, number of test images. Runs that are done are not done again, runs
# that were stopped go on. Writes DIR/results*.jsonl and DIR/table.md, to be read beside the paper's table (arXiv 2403.09192).
# Time: 3100 steps of 32 images a task, method and seed, and 2500 for each rate that is swept; docs/benchmarks.md
# has the rates.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export PYRACTL=${PYRACTL:-$here/../build/bin/pyractl}
exec python3 "$here/vtab1k.py" "$@"
