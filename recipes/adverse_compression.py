"""The working half of adverse_compression.sh."""
import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from xml.sax.saxutils import escape

from runs import interval, named, pyractl, read_rows, run_all, sets

RECIPE = Path(__file__).parent / "vtab1k" / "lora.toml"
MERGERS = {"LoRA + ToMe": "tome", "LoRA + PYRA": "pyra"}
COLOURS = {"LoRA + ToMe": "#c0392b", "LoRA + PYRA": "#2471a3"}
NEAR = 0.05  # speeds that count as equal
WIDTH, HEIGHT, MARGIN = 640, 420, 56


def kept(file, make):
    """What `make()` gives, from `file` where it was made before."""
    if not file.exists():
        file.write_text(json.dumps(make(), indent=1))
    return json.loads(file.read_text())


def find_schedules(options, large):
    """{label: schedule}, the same for both mergers."""
    if options.schedules:
        return options.schedules
    found = {}
    data = next(iter(options.data.values()))
    for speedup in options.speedups.split(","):
        answer = pyractl("compress", large, "--merge", "tome", "--target-speedup", speedup, "--data", data, "--batch",
                         options.batch, "--device", options.device, "--out", options.out / "unused.safetensors")  # fmt: skip
        found[f"{speedup}x"] = ",".join(map(str, answer["schedule"]["remove"]))
    (options.out / "unused.safetensors").unlink()
    return found


def rates(options, file, *merge):
    """Images a second by kind ("dense", "pyra-high" …), medians of one run."""
    rounds = ["--repetitions", options.repetitions] if options.repetitions else []
    answer = pyractl("bench", file, *merge, "--batch", options.batch, "--device", options.device, *rounds)
    return {run["run_name"].split("/")[2]: run["items_per_second"] for run in answer["benchmarks"]
            if run.get("aggregate_name") == "median"}  # fmt: skip


def measure(options, large, small, schedules):
    """{method: speed} in times of the dense large model, each from a run that measured both in turn."""
    speeds = {"large": 1.0}
    for label, merger in MERGERS.items():
        for name, schedule in schedules.items():
            found = rates(options, large, "--merge", merger, "--schedule", schedule)
            dense = found.pop("dense")
            speeds[f"{label} {name}"] = next(iter(found.values())) / dense
    speeds["small"] = rates(options, small)["dense"] / rates(options, large)["dense"]
    return speeds


def train(options, model, file, task, data, method, merge, seed):
    run = options.out / "runs" / f"{model}-{task}-{method.replace(' ', '')}-{seed}"
    goes_on = ["--resume"] if (run / "run.toml").exists() else []
    report = pyractl("finetune", "--recipe", RECIPE, "--model", file, "--data", data, "--out", run, "--device",
                     options.device, *goes_on, *sets([f"seed={seed}", *merge, *options.set]))  # fmt: skip
    return [{"model": model, "task": task, "seed": seed, "method": method, "top1": report["accuracy"],
             "images": report["test_images"], "macs": report["macs"], "merge": report["merge"],
             "epochs": report["epochs"], "protocol": report["protocol"], "device": report["device"],
             "dtype": report["dtype"], "train_seconds": report["train_seconds"]}]  # fmt: skip


def all_jobs(options, schedules):
    """(model, file, task, data, method, settings, seed): the small and the large dense model, then every point."""
    (large, large_file), (small, small_file) = *options.large.items(), *options.small.items()
    ways = [(small, small_file, "small", ["merge.name=none"]), (large, large_file, "large", ["merge.name=none"])]
    ways += [(large, large_file, f"{label} {name}", [f"merge.name={merger}", f"merge.schedule={schedule}"])
             for name, schedule in schedules.items() for label, merger in MERGERS.items()]  # fmt: skip
    return [(model, file, task, data, method, merge, int(seed)) for seed in options.seeds.split(",")
            for task, data in options.data.items() for model, file, method, merge in ways]  # fmt: skip


def scores(rows):
    """{method: {(task, seed): top-1 in %}}"""
    found = {}
    for r in rows:
        found.setdefault(r["method"], {})[r["task"], r["seed"]] = 100 * r["top1"]
    return found


def at_speed(points, speed):
    """Scores of the point within NEAR of the speed, else between its neighbours, by the logarithm of speed; and how.
    `points`: (speed, scores), ascending. Nothing outside of them."""
    near = min(points, key=lambda p: abs(p[0] / speed - 1))
    if abs(near[0] / speed - 1) <= NEAR:
        return near[1], f"the point at {near[0]:.2f}x"
    for (slow, below), (fast, above) in zip(points, points[1:]):
        if slow < speed < fast:
            share = math.log(speed / slow) / math.log(fast / slow)
            mixed = {key: (1 - share) * below[key] + share * above[key] for key in below.keys() & above.keys()}
            return mixed, f"between {slow:.2f}x and {fast:.2f}x"
    return None, None


def table(found, speeds):
    lines = ["| method | speed, times the dense large model | top-1, mean of tasks and seeds | runs |", "|---|---|---|---|"]
    for method, speed in speeds.items():
        if method in found:
            values = found[method].values()
            lines.append(f"| {method} | {speed:.2f} | {statistics.mean(values):.2f} | {len(values)} |")
    lines += ["", f"At the small model's speed ({speeds['small']:.2f}x):", "",
              "| large, merged − small | points | 95 % interval | pairs | taken from |", "|---|---|---|---|---|"]  # fmt: skip
    for label in MERGERS:
        points = points_of(label, found, speeds)
        reached, how = at_speed(points, speeds["small"]) if points else (None, None)
        small = found.get("small", {})
        pairs = [value - small[key] for key, value in (reached or {}).items() if key in small]
        if not pairs:  # no point near that speed, or trainings that failed
            lines.append(f"| {label} | not reached | | | |")
            continue
        mean, half = interval(pairs)
        lines.append(f"| {label} | {mean:+.2f} | {mean - half:+.2f} to {mean + half:+.2f} | {len(pairs)} | {how} |")
    return "\n".join(lines) + "\n"


def points_of(label, found, speeds):
    """(speed, scores) of the dense large model and of its merged ones, ascending."""
    names = [m for m in speeds if m in found and (m == "large" or m.startswith(label + " "))]
    return sorted(((speeds[m], found[m]) for m in names), key=lambda p: p[0])


def svg(found, speeds, large, small):
    """Accuracy against speed: a curve a merger, a cross for the small model."""
    mean = {m: statistics.mean(found[m].values()) for m in speeds if m in found}
    xs, ys = [speeds[m] for m in mean], list(mean.values())
    left, right, low, high = min(xs), max(xs), math.floor(min(ys)), math.ceil(max(ys) + 0.01)

    def place(speed, score):
        return (MARGIN + (speed - left) / max(right - left, 1e-9) * (WIDTH - 2 * MARGIN),
                HEIGHT - MARGIN - (score - low) / (high - low) * (HEIGHT - 2 * MARGIN))  # fmt: skip

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']  # fmt: skip

    def text(x, y, what, anchor="middle", colour="black"):
        out.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(what)}</text>')

    text(WIDTH / 2, HEIGHT - 10, f"speed, times the dense {large}")
    text(MARGIN, MARGIN - 24, "top-1 in %, mean of tasks and seeds", "start")
    for i in range(6):
        score, speed = low + (high - low) * i / 5, left + (right - left) * i / 5
        y, x = place(left, score)[1], place(speed, low)[0]
        out.append(f'<path d="M{MARGIN} {y:.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>')
        text(MARGIN - 8, y + 4, f"{score:.1f}", "end")
        text(x, HEIGHT - MARGIN + 18, f"{speed:.2f}")
    for label, colour in COLOURS.items():
        points = [place(speed, statistics.mean(of.values())) for speed, of in points_of(label, found, speeds)]
        if not points:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points]
        text(WIDTH - MARGIN, MARGIN + 16 * list(COLOURS).index(label), f"{large}, {label}", "end", colour)
    if "small" in mean:
        x, y = place(speeds["small"], mean["small"])
        out.append(f'<path d="M{x - 6:.1f} {y - 6:.1f}l12 12m0 -12l-12 12" stroke="black" stroke-width="3"/>')
        text(x, y + 22, f"{small}, LoRA")
    return "\n".join([*out, "</svg>"]) + "\n"


def named_schedules(text):
    """"low;deep=60,45,28,…" as {name: schedule}; one without a name is its own."""
    parts = [part.split("=", 1) for part in text.split(";")]
    names = [part[0] for part in parts]
    if len(set(names)) < len(names) or any(not name or "/" in name for name in names):
        raise argparse.ArgumentTypeError(f"{text}: a name is missing, stands twice or holds a /")
    return {part[0]: part[-1] for part in parts}


def one_model(text):
    models = named(text)
    if len(models) != 1:
        raise argparse.ArgumentTypeError(f"{text}: expected one NAME=FILE")
    return models


def main():
    parser = argparse.ArgumentParser(prog="adverse_compression.sh", description="See the head of the recipe.")
    parser.add_argument("--large", type=one_model, required=True, metavar="NAME=FILE")
    parser.add_argument("--small", type=one_model, required=True, metavar="NAME=FILE")
    parser.add_argument("--data", type=named, required=True, metavar="TASK,…")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--speedups", default="1.3,1.6,2,2.5,3.2,4")
    parser.add_argument("--schedules", type=named_schedules, metavar="S;S;…", help="instead: low;high;8;NAME=2,4,8,8,8,8,…")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--batch", type=int, default=128, help="images at once where speed is measured")
    parser.add_argument("--repetitions", type=int, help="of bench; default: until the noise is below 1 %%")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="for every training")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (large, large_file), (small, small_file) = *options.large.items(), *options.small.items()
    schedules = kept(options.out / "schedules.json", lambda: find_schedules(options, large_file))
    speeds = kept(options.out / "speeds.json", lambda: measure(options, large_file, small_file, schedules))
    log = options.out / "results.jsonl"
    rows = read_rows([log] if log.exists() else [])
    done = {(r["task"], r["method"], r["seed"]) for r in rows}
    jobs = [job for job in all_jobs(options, schedules) if (job[2], job[4], job[6]) not in done]
    failed = run_all("adverse_compression.sh", lambda *job: train(options, *job), jobs, options.jobs, log, rows)
    if not rows:
        return 1
    found = scores(rows)
    text = table(found, speeds)
    (options.out / "table.md").write_text(text)
    (options.out / "curve.svg").write_text(svg(found, speeds, large, small))
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
