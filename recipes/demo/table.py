"""The demo's closing table, from the JSON that pyractl wrote: table.py FOLDER"""
import json
import sys
from pathlib import Path

# model file, how it came about, the run whose training it rests on
MODELS = [("dense", "LoRA, dense", "run_dense"), ("pyra", "LoRA + PYRA high", "run_pyra"),
          ("tome", "  dense, then ToMe high", "run_dense"), ("diffrate", "  dense, then DiffRate", "run_dense")]
HEAD = ["model", "accuracy", "parameters", "trained", "MACs", "images/s", "speed-up"]


def medians(bench):
    """Images/s by row name; the dense model is a row of every file, measured in turn with the merged one."""
    return {row["run_name"]: row["items_per_second"] for row in bench["benchmarks"]
            if row.get("aggregate_name") == "median"}


def main(folder):
    rows = []
    for name, label, run in MODELS:
        evaluated = json.loads((folder / f"{name}.eval.json").read_text())
        bench = json.loads((folder / f"{name}.bench.json").read_text())
        trained = json.loads((folder / run / "report.json").read_text())["trained_params"]
        speeds = medians(bench)
        dense = next(speed for row, speed in speeds.items() if "/dense/" in row)
        own = next((speed for row, speed in speeds.items() if "/dense/" not in row), dense)
        rows.append([label, f"{evaluated['top1'] * 100:.1f} %", f"{evaluated['params']:,}", f"{trained:,}",
                     f"{evaluated['macs'] / 1e6:,.0f} M", f"{own:,.0f}", f"{own / dense:.2f}x"])
    widths = [max(len(row[i]) for row in [HEAD, *rows]) for i in range(len(HEAD))]

    def line(cells):
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths))
        return "  ".join([cells[0].ljust(len(first)), *others])

    context = bench["context"]
    print(f"\nFashion-MNIST, 1000 training images, 1000 test images; 60 s of training each; speed at batch 32, "
          f"{context['dtype']}, " + (f"{context['threads']} threads" if context["device"] == "cpu" else context["device"]))
    print(line(HEAD))
    print("  ".join("-" * width for width in widths))
    for row in rows:
        print(line(row))
    print("Speed-up: over the dense model measured in turn with it. MACs: multiply-adds of one image.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
