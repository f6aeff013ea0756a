"""The working half of schedules.sh."""
import argparse
import json
import sys
from pathlib import Path

from runs import named, pyractl, sets


def dense_model(options, task, data):
    merged = options.out / f"{task}.safetensors"
    if not merged.exists():
        run = options.out / "runs" / task
        goes_on = ["--resume"] if (run / "run.toml").exists() else []
        pyractl("finetune", "--recipe", options.recipe, "--model", options.model, "--data", data, "--out", run, "--device",
                options.device, *goes_on, *sets(["merge.name=none", f"train.max_seconds={options.seconds}", *options.set]))
        pyractl("merge-lora", run, "--out", merged)
    return merged  # fmt: skip


def main():
    parser = argparse.ArgumentParser(prog="schedules.sh", description="See the head of recipes/schedules.sh.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=named, required=True, metavar="TASK,…")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parent / "vtab1k" / "lora.toml")
    parser.add_argument("--merge", default="tome")
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--tries", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=60, help="of training, for a task that is new")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="for the training")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = ["| task | dense | searched | uniform, same time | difference | images | likeness, searched and uniform | "
             "measured speed-up |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    better = 0
    for task, data in options.data.items():
        answer = pyractl("compress", dense_model(options, task, data), "--merge", options.merge, "--target-speedup",
                         options.speedup, "--tries", options.tries, "--data", data, "--device", options.device, "--out",
                         options.out / f"{task}-{options.merge}-{options.speedup}.safetensors")  # fmt: skip
        (options.out / f"{task}-{options.merge}-{options.speedup}.json").write_text(json.dumps(answer, indent=1))
        found = answer["found"]
        top = {name: 100 * entry["accuracy"] for name, entry in
               (("dense", found["dense_accuracy"]), ("found", found["accuracy"]), ("even", found["uniform"]["accuracy"]))}
        better += top["found"] > top["even"]
        lines.append(f"| {task} | {top['dense']:.1f} | {top['found']:.1f} | {top['even']:.1f} | "
                     f"{top['found'] - top['even']:+.1f} | {found['accuracy']['images']} | {found['likeness']:.3f}, "
                     f"{found['uniform']['likeness']:.3f} | {answer['speedup']:.2f}x |")  # fmt: skip
        print(lines[-1], file=sys.stderr)
    text = "\n".join(lines) + f"\n\nBetter than uniform on {better} of {len(options.data)} tasks.\n"
    (options.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
