#!/usr/bin/env bash
# pyractl against eager PyTorch + timm on this machine's CPU: ViT-Ti/8 at 112 px, batch 32, two threads.
#
#   recipes/bench_vs_timm.sh [--json] [--rounds 9] [--rows REGEX]      about 6 minutes on two cores
#
# Rows: inference fp32 and bf16, dense and with the published PYRA merge (high); LoRA training fp32, dense and PYRA.
# Each round measures every row once on both sides, side by side. Printed: images/s of both, the ratio with its 95 %
# interval, and our speed-up over our own dense model. Exit code 0 only if every interval lies at or above 1.0, else 1.
#
# timm runs in an environment of its own, .deps/timm-env (several GB with the GPU packages that PyPI's torch brings,
# made on first use, needs the network), or under PYRA_TIMM_PYTHON=/path/to/python when that names a Python with torch
# 2.11 and timm. PYRACTL names another binary.
set -euo pipefail
[[ ${1:-} == -h || ${1:-} == --help ]] && { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit; }

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYRACTL="${PYRACTL:-$root/build/bin/pyractl}"
[[ -x $PYRACTL ]] || { echo "bench_vs_timm.sh: $PYRACTL is not there: build it first (make build)" >&2; exit 2; }

python="${PYRA_TIMM_PYTHON:-}"
if [[ -z $python ]]; then
  environment="$root/.deps/timm-env"
  python="$environment/bin/python"
  if [[ ! -e $environment/complete ]]; then
    echo "making $environment (torch 2.11.0, timm 1.0.31)" >&2
    python3 -m venv --clear "$environment"
    "$python" -m pip install --quiet torch==2.11.0 torchvision==0.26.0 >&2
    "$python" -m pip install --quiet timm==1.0.31 >&2
    touch "$environment/complete"
  fi
fi
exec "$python" "$root/recipes/bench_vs_timm.py" "$@"
