"""The working half of accuracy.sh: runs pyractl, and makes a table of means and paired differences."""
import argparse
import json
import operator
import statistics
import sys
from pathlib import Path

from runs import interval, named, pyractl, read_rows, run_all, sets

# name: (PEFT method, merger, schedule).
METHODS = {
    "LoRA, dense": ("lora", "none", None),
    "BitFit, dense": ("bitfit", "none", None),
    "LoRA + PYRA low": ("lora", "pyra", "low"),
    "LoRA + ToMe low": ("lora", "tome", "low"),
    "LoRA + DiffRate low": ("lora", "diffrate", "low"),
    "LoRA + PYRA high": ("lora", "pyra", "high"),
    "LoRA + ToMe high": ("lora", "tome", "high"),
    "LoRA + DiffRate high": ("lora", "diffrate", "high"),
}
# Trained only where --methods names them: with a teacher (the dense LoRA model of the same seed), and with nothing but
# the head, and the gate, to make up for what merging loses.
MORE = {
    "LoRA + PYRA high, taught": ("lora", "pyra", "high"),
    "head + PYRA high": ("linear_probe", "pyra", "high"),
    "head + ToMe high": ("linear_probe", "tome", "high"),
}
TAUGHT = {"LoRA + PYRA high, taught": "LoRA, dense"}
# What a trained model is when it merges in another way than it was trained: {trained: {name: (merger, schedule)}}, or
# None: as it was trained, without PYRA's gate.
OTHERWISE = {
    "LoRA, dense": {"ToMe low, not trained": ("tome", "low"), "ToMe high, not trained": ("tome", "high")},
    "LoRA + PYRA high": {"LoRA + PYRA high, gate off": None},
    "head + PYRA high": {"head + PYRA high, gate off": None},
}
PAIRS = [("LoRA + PYRA high", "LoRA + ToMe high"), ("LoRA, dense", "LoRA + PYRA low"),
         ("LoRA + PYRA high", "ToMe high, not trained"), ("LoRA + PYRA low", "LoRA + ToMe low"),
         ("LoRA + PYRA high", "LoRA + DiffRate high"), ("LoRA + PYRA high, taught", "LoRA + PYRA high"),
         ("LoRA + PYRA high", "LoRA + PYRA high, gate off"), ("head + PYRA high", "head + ToMe high"),
         ("head + PYRA high", "head + PYRA high, gate off")]  # fmt: skip


def row(model, task, seed, method, report, **more):
    return {"model": model, "task": task, "seed": seed, "method": method, "top1": report["top1"],
            "images": report["images"], **more}  # fmt: skip


def finetune(options, file, data, run, method, seed, *more):
    """The report of one training."""
    peft, merger, schedule = (METHODS | MORE)[method]
    settings = [f"train.epochs={options.epochs}", f"seed={seed}", f"peft.name={peft}", f"merge.name={merger}",
                f"train.lr={options.lr}", "train.checkpoint_every=100000", *more, *options.set]  # fmt: skip
    if peft == "lora":
        settings.append(f"peft.rank={options.rank}")
    if schedule:
        settings.append(f"merge.schedule={schedule}")
    recipe = options.out / "recipe.toml"
    goes_on = ["--resume"] if (run / "run.toml").exists() else []
    return pyractl("finetune", "--recipe", recipe, "--model", file, "--data", data, "--out", run, "--device",
                   options.device, *goes_on, *sets(settings))  # fmt: skip


def open_gates(file):
    """Zeros for b of every gate of a safetensors file, in place: PYRA is ToMe then, bit for bit."""
    opened = 0
    with file.open("r+b") as model:
        size = int.from_bytes(model.read(8), "little")
        for name, tensor in json.loads(model.read(size)).items():
            if name.startswith("merge.pyra.") and name.endswith(".b"):
                begin, end = tensor["data_offsets"]
                model.seek(8 + size + begin)
                model.write(bytes(end - begin))
                opened += 1
    if opened == 0:
        raise RuntimeError(f"{file}: it has no gate of PYRA's")


def train(options, model, file, task, data, method, seed):
    """The rows of one training: its own, and those of the trained model with another merge."""
    run = options.out / "runs" / f"{model}-{task}-{method.replace(', ', '-').replace(' ', '')}-{seed}"
    more = []
    if method in TAUGHT:
        taught_by, teacher = run.with_name(run.name + "-teacher"), run.with_name(run.name + "-teacher.safetensors")
        finetune(options, file, data, taught_by, TAUGHT[method], seed)
        pyractl("merge-lora", taught_by, "--out", teacher)
        more.append(f"train.teacher={teacher.resolve()}")
    report = finetune(options, file, data, run, method, seed, *more)
    rows = [row(model, task, seed, method, {"top1": report["accuracy"], "images": report["test_images"]},
                train_seconds=report["train_seconds"], images_per_second=report["images_per_second"],
                dtype=report["dtype"], device=report["device"], epochs=options.epochs, lr=options.lr,
                protocol=report["protocol"], trained=report["trained_params"], macs=report["macs"])]  # fmt: skip
    if method in OTHERWISE:
        merged = run / "merged.safetensors"
        pyractl("merge-lora", run, "--out", merged)
        for name, merge in OTHERWISE[method].items():
            if merge is None:
                open_gates(merged)
            instead = sets([f"merge.name={merge[0]}", f"merge.schedule={merge[1]}"]) if merge else []
            seen = pyractl("eval", merged, "--data", data, "--device", options.device, *instead)
            rows.append(row(model, task, seed, name, seen, dtype=report["dtype"], device=report["device"]))
        merged.unlink()
    return rows


def difference(rows, model, better, worse):
    """Mean of the paired differences over tasks and seeds, and half its 95 % interval, in points."""
    by_key = {(r["task"], r["seed"], r["method"]): r["top1"] for r in rows if r["model"] == model}
    pairs = [100 * (value - by_key[task, seed, worse]) for (task, seed, method), value in by_key.items()
             if method == better and (task, seed, worse) in by_key]  # fmt: skip
    if len(pairs) < 2:
        return None
    return *interval(pairs), len(pairs)


def table(rows, models, tasks):
    lines = []
    for model in models:
        lines += ["", f"**{model}**: top-1 in %, mean ± standard deviation over seeds", "",
                  "| method | " + " | ".join(tasks) + " | mean |", "|---" * (len(tasks) + 2) + "|"]  # fmt: skip
        for method in [*METHODS, *MORE, *(name for names in OTHERWISE.values() for name in names)]:
            cells, means = [], []
            for task in tasks:
                found = [100 * r["top1"] for r in rows if (r["model"], r["task"], r["method"]) == (model, task, method)]
                if not found:
                    cells.append("")
                    continue
                means.append(statistics.mean(found))
                cells.append(f"{means[-1]:.1f}" + (f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""))
            mean = f"{statistics.mean(means):.1f}" if len(means) == len(tasks) else ""
            if means:
                lines.append(f"| {method} | " + " | ".join(cells) + f" | {mean} |")
        lines += ["", "| paired difference over tasks and seeds | points | 95 % interval | pairs |", "|---|---|---|---|"]
        for better, worse in PAIRS:
            found = difference(rows, model, better, worse)
            if found:
                mean, half, count = found
                lines.append(f"| {better} − {worse} | {mean:+.2f} | {mean - half:+.2f} to {mean + half:+.2f} | {count} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(prog="accuracy.sh", description=__doc__)
    parser.add_argument("--models", type=named, required=True, metavar="NAME=FILE,…")
    parser.add_argument("--data", type=named, required=True, metavar="TASK,…")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=",,".join(METHODS), help="separated by two commas; default: all but "
                        + "; ".join(MORE))  # fmt: skip
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="for every training")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "recipe.toml").write_text('protocol = "vtab"\n')
    log = options.out / "results.jsonl"
    rows = read_rows([log] if log.exists() else [])
    key = operator.itemgetter("model", "task", "seed", "method")
    done = {key(r) for r in rows}
    jobs = [(model, file, task, data, method, int(seed)) for seed in options.seeds.split(",")
            for task, data in options.data.items() for model, file in options.models.items()
            for method in options.methods.split(",,")
            if not all((model, task, int(seed), name) in done for name in (method, *OTHERWISE.get(method, {})))]  # fmt: skip

    def missing_rows(*job):
        return [r for r in train(options, *job) if key(r) not in done]

    failed = run_all("accuracy.sh", missing_rows, jobs, options.jobs, log, rows)
    text = table(rows, options.models, options.data)
    (options.out / "table.md").write_text(text)
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
