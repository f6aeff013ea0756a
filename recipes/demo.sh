#!/bin/bash
# The whole chain on real images, some 4 minutes on two cores, without a network: what `make demo` runs.
#
# A ViT-Ti/8 (112 px, 196 patches) pretrained on Tiny-ImageNet learns Fashion-MNIST from 1000 images, twice, with the
# same 60 s of training: dense with LoRA, and with PYRA merging away tokens (`high`), which trains over three times as
# many images in that time. Then the dense result is compressed without training, by ToMe and by DiffRate counts, and
# all four are evaluated on 1000 test images and timed. Expected on two cores: the table in README.md.
#
#   recipes/demo.sh             writes to build/demo; what an earlier demo left there is replaced
#   PYRACTL=... OUT=... recipes/demo.sh
set -euo pipefail
[[ ${1:-} == -h || ${1:-} == --help ]] && { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit; }
cd "$(dirname "$0")/.."
pyractl=${PYRACTL:-build/bin/pyractl}
out=${OUT:-build/demo}
data=recipes/demo/fashion_mnist_1k.tar
counts=recipes/demo/diffrate_counts.toml

step() {
  printf '\n$ pyractl %s\n' "$*"
  "$pyractl" "$@"
}
# A result as JSON for the table at the end; a line says what is going on.
measure() {
  local file=$1
  shift
  printf '$ pyractl %s --json > %s\n' "$*" "$file"
  "$pyractl" "$@" --json --quiet >"$file"
}

rm -rf "$out"
mkdir -p "$out"

step finetune --recipe recipes/fashion_mnist_lora.toml --out "$out/run_dense"
step finetune --recipe recipes/fashion_mnist_pyra.toml --out "$out/run_pyra"
step merge-lora "$out/run_dense" --out "$out/dense.safetensors"
step merge-lora "$out/run_pyra" --out "$out/pyra.safetensors"
step compress "$out/dense.safetensors" --merge tome --schedule high --out "$out/tome.safetensors"
step compress "$out/dense.safetensors" --merge diffrate --schedule $counts --out "$out/diffrate.safetensors"

echo
for model in dense pyra tome diffrate; do
  measure "$out/$model.eval.json" eval "$out/$model.safetensors" --data $data --predictions "$out/$model.csv"
done
echo
for model in dense pyra tome diffrate; do
  measure "$out/$model.bench.json" bench "$out/$model.safetensors" --batch 32 --max-time 5
done

step report "$out/run_dense" "$out/run_pyra" --predictions "$out/pyra.csv" --out "$out/report.html"
python3 recipes/demo/table.py "$out" | tee "$out/table.txt"
