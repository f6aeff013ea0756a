"""What the recipes that run pyractl many times share: one call, names of files, a log of runs that are done."""
import concurrent.futures
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

# Student's t for 95 %, by degrees of freedom.
T95 = [0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
       2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045]  # fmt: skip


def interval(values):
    """Mean of the values, and half its 95 % interval; that of a single one is without bound."""
    if len(values) < 2:
        return statistics.mean(values), math.inf
    t = T95[len(values) - 1] if len(values) <= len(T95) else 1.96
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def pyractl(*arguments):
    command = [os.environ["PYRACTL"], *map(str, arguments), "--json", "--quiet"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {answer.returncode}: {answer.stderr.strip()}")
    return json.loads(answer.stdout)


def sets(settings):
    return [word for setting in settings for word in ("--set", setting)]


def named(text):
    """"ti=FILE,s=FILE" or "FILE,FILE" as {name: path}; a file's name without its ending is its name."""
    pairs = [part.split("=", 1) if "=" in part else (Path(part).stem, part) for part in text.split(",")]
    return {name: Path(path) for name, path in pairs}


def read_rows(files):
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def run_all(name, work, jobs, at_once, log, rows):
    """work(*job) for every job; the rows that it returns go to the end of `rows` and of the file `log`, a line each, as
    soon as they are there. A job that fails is told and left out. How many failed."""
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool, log.open("a") as out:
        for future in concurrent.futures.as_completed(pool.submit(work, *job) for job in jobs):
            try:
                found = future.result()
            except RuntimeError as error:
                failed += 1
                print(f"{name}: {error}", file=sys.stderr)
                continue
            for new in found:
                rows.append(new)
                print(json.dumps(new), file=out, flush=True)
                print(f"{new['model']} {new['task']} {new['method']} seed {new['seed']}: {100 * new['top1']:.1f} %",
                      file=sys.stderr)  # fmt: skip
    return failed
