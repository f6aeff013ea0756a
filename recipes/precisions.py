"""The working half of precisions.sh."""
import argparse
import csv
import json
import sys
from pathlib import Path

from runs import named, pyractl

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")


def answers(options, model, file, precision):
    """[(predicted, probability)] of every image, and the report of eval."""
    kept = options.out / f"{model}-{precision}.csv"
    report = pyractl("eval", file, "--data", options.data, "--split", options.split, "--batch", options.batch, "--device",
                     options.device, "--dtype", precision, "--predictions", kept, *options.more)  # fmt: skip
    with kept.open(newline="") as rows:
        return [(row["predicted"], float(row["probability"])) for row in csv.DictReader(rows)], report


def compared(found, against):
    """Of two lists of answers: share of equal ones, and how far apart their probabilities are."""
    apart = [abs(mine[1] - theirs[1]) for mine, theirs in zip(found, against) if mine[0] == theirs[0]]
    return {"agreement": len(apart) / len(found), "probability_mean_error": sum(apart) / max(len(apart), 1),
            "probability_largest_error": max(apart, default=0.0)}  # fmt: skip


def measure(options, model, file):
    row = {"model": model, "data": options.data.name, "split": options.split, "batch": options.batch, "precisions": {}}
    reference = None
    for precision in PRECISIONS:
        found, report = answers(options, model, file, precision)
        reference = reference or found
        row |= {"images": report["images"], "device": report["device"]}
        row["precisions"][precision] = {"top1": report["top1"], **compared(found, reference)}
    return row


def table(rows):
    lines = ["| model | images | precision | top-1 | answers of fp32 | probability's mean error | largest |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        for precision, found in row["precisions"].items():
            lines.append(f"| {row['model']} | {row['images']} | {precision} | {100 * found['top1']:.2f} % | "
                         f"{100 * found['agreement']:.2f} % | {found['probability_mean_error']:.5f} | "
                         f"{found['probability_largest_error']:.4f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main():
    words = sys.argv[1:]
    more = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="precisions.sh", description="See the head of recipes/precisions.sh.")
    parser.add_argument("--models", type=named, required=True, metavar="NAME=FILE,…")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--split", default="test")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(words[:more])
    options.more = words[more + 1 :]
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        rows = [measure(options, *model) for model in options.models.items()]
    except RuntimeError as error:
        sys.exit(f"precisions.sh: {error}")
    (options.out / "precisions.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.out / "precisions.md").write_text(table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
