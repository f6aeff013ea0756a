"""The working half of vtab1k.sh."""
import argparse
import statistics
import sys
import tomllib
from pathlib import Path

from runs import pyractl, read_rows, run_all, sets

HERE = Path(__file__).parent
# Zhai et al. (arXiv 1910.04867): task: (classes, test images). Names as NOAH's and PYRA's data have them.
GROUPS = {
    "natural": {"cifar100": (100, 10000), "caltech101": (102, 6084), "dtd": (47, 1880),
                "oxford_flowers102": (102, 6149), "oxford_pet": (37, 3669), "svhn": (10, 26032),
                "sun397": (397, 21750)},
    "specialized": {"patch_camelyon": (2, 32768), "eurosat": (10, 5400), "resisc45": (45, 6300),
                    "diabetic_retinopathy": (5, 42670)},
    "structured": {"clevr_count": (8, 15000), "clevr_dist": (6, 15000), "dmlab": (6, 22735), "kitti": (4, 711),
                   "dsprites_loc": (16, 73728), "dsprites_ori": (16, 73728), "smallnorb_azi": (18, 12150),
                   "smallnorb_ele": (9, 12150)},
}  # fmt: skip
TASKS = {task: (group, *facts) for group, tasks in GROUPS.items() for task, facts in tasks.items()}
# The authors' build script and their training script call some folders differently.
ALIASES = {"cifar100": ["cifar"], "oxford_pet": ["oxford_iiit_pet", "pets"], "oxford_flowers102": ["flowers102"]}


def find(folder, task):
    for name in [task, *ALIASES.get(task, [])]:
        for path in (folder / name, folder / f"{name}.tar"):
            if path.exists():
                return path
    return None


def chosen_tasks(options):
    """{task: path} of the tasks asked for, or of all known ones that are there; says which are missing."""
    names = options.tasks.split(",") if options.tasks else list(TASKS)
    found = {name: find(options.data, name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing and (options.tasks or len(missing) == len(names)):
        sys.exit(f"vtab1k.sh: {options.data} has no folder or .tar for {', '.join(missing)}")
    if missing:
        print(f"vtab1k.sh: not there, left out: {', '.join(missing)}", file=sys.stderr)
    return {name: path for name, path in found.items() if path}


def check(options, task, path):
    """What the task's lists say, against what VTAB-1k has. A run of one step, so that everything is opened once."""
    facts = pyractl("finetune", "--recipe", HERE / "vtab1k" / "linear_probe.toml", "--model", options.model, "--data",
                    path, "--out", options.out / "unused", "--dry-run", *sets(options.set))  # fmt: skip
    wrong = []
    if task in TASKS:
        _, classes, images = TASKS[task]
        if facts["classes"] != classes:
            wrong.append(f"{facts['classes']} classes, VTAB-1k has {classes}")
        if facts["test_images"] != images:
            wrong.append(f"{facts['test_images']} test images, VTAB-1k has {images}")
        if facts["train_images"] != 1000:
            wrong.append(f"{facts['train_images']} training images, VTAB-1k has 1000")
    return wrong


def train(options, plan, task, path, method, seed):
    run = options.out / "runs" / f"{task}-{method}-{seed}"
    rates = plan["sweep"].get(method, plan["sweep"].get("lr", []))
    settings = [f"seed={seed}", *([f"train.lr={rates}"] if rates else []),
                *[f"{key}={value}" for key, value in plan.get("set", {}).items()], *options.set]  # fmt: skip
    goes_on = ["--resume"] if (run / "run.toml").exists() else []
    report = pyractl("finetune", "--recipe", HERE / "vtab1k" / f"{method}.toml", "--model", options.model, "--data", path,
                     "--out", run, "--device", options.device, *goes_on, *sets(settings))  # fmt: skip
    return [{"model": options.model.stem, "task": task, "group": TASKS.get(task, ("other",))[0], "method": method,
             "seed": seed, "top1": report["accuracy"], "images": report["test_images"],
             "protocol": report["protocol"], "test_selected": report["test_selected"],
             "train_split": report["train_split"], "test_split": report["test_split"], "lr": report["lr"],
             "choices": report.get("choices", []), "epochs": report["epochs"], "merge": report["merge"],
             "trained_params": report["trained_params"], "macs": report["macs"], "device": report["device"],
             "dtype": report["dtype"], "train_seconds": report["train_seconds"],
             "images_per_second": report["images_per_second"]}]  # fmt: skip


def table(rows, methods):
    """Means over seeds by task, the groups' means, the mean of the groups and the mean of the tasks; they differ."""
    tasks = [t for t in TASKS if any(r["task"] == t for r in rows)]
    tasks += sorted({r["task"] for r in rows} - set(tasks))
    groups = [g for g in [*GROUPS, "other"] if any(r["group"] == g for r in rows)]
    said = {"vtab": "chosen on val200, trained on all 1000, test looked at once",
            "paper": "the best of several looks at test"}  # fmt: skip
    protocols = "; ".join(f"protocol {p}: {said.get(p, '')}" for p in sorted({r["protocol"] for r in rows}))
    lines = [f"Top-1 in %, mean over seeds; {protocols}.", "",
             "| method | " + " | ".join([*tasks, *groups, "mean of groups", f"mean of {len(tasks)}"]) + " | seeds |",
             "|---" * (len(tasks) + len(groups) + 4) + "|"]  # fmt: skip
    for method in methods:
        of = [r for r in rows if r["method"] == method]
        means = {t: statistics.mean(100 * r["top1"] for r in of if r["task"] == t)
                 for t in tasks if any(r["task"] == t for r in of)}  # fmt: skip
        if not means:
            continue
        by_group = {g: [m for t, m in means.items() if TASKS.get(t, ("other",))[0] == g] for g in groups}
        whole = len(means) == len(tasks)
        group_means = [statistics.mean(by_group[g]) for g in groups if by_group[g]]
        cells = [f"{means[t]:.1f}" if t in means else "" for t in tasks]
        cells += [f"{statistics.mean(by_group[g]):.2f}" if by_group[g] else "" for g in groups]
        cells += [f"{statistics.mean(group_means):.2f}", f"{statistics.mean(means.values()):.2f}"] if whole else ["", ""]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {len({r['seed'] for r in of})} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(prog="vtab1k.sh", description="See the head of recipes/vtab1k.sh.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--plan", type=Path, default=HERE / "vtab1k.toml")
    parser.add_argument("--tasks", help="comma-separated; default: those of the 19 that are there")
    parser.add_argument("--methods", help="comma-separated; default: the plan's")
    parser.add_argument("--seeds", help="comma-separated; default: the plan's")
    parser.add_argument("--shard", default="0/1", metavar="I/N")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="for every training")
    parser.add_argument("--table", action="store_true", help="train nothing, print the table of what is done")
    options = parser.parse_args()
    index, count = (int(part) for part in options.shard.split("/"))
    if not 0 <= index < count:
        parser.error(f"--shard {options.shard}: expected I/N with I from 0 to N - 1")
    plan = {"sweep": {}, **tomllib.loads(options.plan.read_text())}
    methods = options.methods.split(",") if options.methods else plan["methods"]
    unknown = [m for m in methods if not (HERE / "vtab1k" / f"{m}.toml").exists()]
    if unknown:
        parser.error(f"no recipe for {', '.join(unknown)} in {HERE / 'vtab1k'}")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = read_rows(sorted(options.out.glob("results*.jsonl")))
    failed = 0
    if not options.table:
        seeds = [int(s) for s in options.seeds.split(",")] if options.seeds else plan["seeds"]
        tasks = chosen_tasks(options)
        wrong = {task: faults for task, path in tasks.items() if (faults := check(options, task, path))}
        if wrong:
            sys.exit("\n".join(f"vtab1k.sh: {tasks[t]}: {'; '.join(faults)}" for t, faults in wrong.items()))
        done = {(r["task"], r["method"], r["seed"]) for r in rows}
        jobs = [(t, path, m, s) for s in seeds for t, path in tasks.items() for m in methods]
        mine = [job for i, job in enumerate(jobs) if i % count == index and (job[0], job[2], job[3]) not in done]
        log = options.out / ("results.jsonl" if count == 1 else f"results-{index}-of-{count}.jsonl")
        failed = run_all("vtab1k.sh", lambda *job: train(options, plan, *job), mine, options.jobs, log, rows)
    text = table(rows, methods)
    (options.out / "table.md").write_text(text)
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
