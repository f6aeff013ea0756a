#!/bin/bash
# What the published architectures, schedules and methods count, beside what pyractl counts for them.
#
#   recipes/table1.sh
#
# Parameters: timm 1.0.31, sum(p.numel()), LayerScale's two vectors a block taken off, which pyractl multiplies into the
# layers before them. Ratios and trained parameters: PYRA (arXiv 2403.09192). A second, on any machine, without files;
# ends with 1 when something differs.
set -euo pipefail
[[ ${1:-} == -h || ${1:-} == --help ]] && { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit; }
cd "$(dirname "$0")/.."
export PYRACTL=${PYRACTL:-build/bin/pyractl}
exec python3 - <<'PYTHON'
import json
import os
import subprocess
import sys


def count(*arguments):
    command = [os.environ["PYRACTL"], "inspect", *arguments, "--json", "--quiet"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


PARAMETERS = {"vit_tiny_patch16_224": 5717416, "vit_small_patch16_224": 22050664, "vit_base_patch16_224": 86567656,
              "vit_large_patch16_224": 304326632, "vit_huge_patch14_224": 632045800,
              "deit_base_distilled_patch16_224": 87338192, "deit3_base_patch16_224": 86585320 - 2 * 12 * 768,
              "vit_small_patch14_dinov2": 22441192 - 2 * 12 * 384,
              "vit_base_patch14_reg4_dinov2": 87351016 - 2 * 12 * 768}
RATIOS = {("vit_base_patch16_224", "low"): 0.499, ("vit_large_patch16_224", "low"): 0.503,
          ("vit_base_patch16_224", "high"): 0.289, ("vit_large_patch16_224", "high"): 0.291}
rows, same = [], True
for arch, published in PARAMETERS.items():
    rows.append((f"{arch}: parameters", published, count("--arch", arch)["params"]))
for (arch, schedule), published in RATIOS.items():
    facts = count("--arch", arch, "--merge", "pyra", "--schedule", schedule)
    rows.append((f"{arch}, {schedule}: MACs of dense", published, round(facts["macs"] / facts["dense_macs"], 3)))
facts = count("--arch", "vit_base_patch16_224", "--merge", "pyra", "--schedule", "high", "--peft", "lora")
rows.append(("vit_base_patch16_224, high: PYRA's parameters", 27840, facts["merge"]["trained_elements"]))
rows.append(("vit_base_patch16_224: LoRA's parameters, rank 8 on qkv", 294912, facts["peft"]["trained_elements"]))
print("| quantity | published | pyractl |\n|---|---|---|")
for name, published, ours in rows:
    same &= published == ours
    print(f"| {name} | {published:,} | {ours:,} |" + ("" if published == ours else " differs"))
sys.exit(0 if same else 1)
PYTHON
