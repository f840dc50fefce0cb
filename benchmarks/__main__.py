"""Run the benchmarks, print them as a table, and keep a full run in results/benchmarks.json.

    python -m benchmarks [--only NAME ...] [--quick] [--out FILE]
"""
import argparse
import json
import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from repspace import records

from . import attack, batches, centers, ece, training
from .race import GPU

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("repspace", "torch", "torchvision", "numpy", "scipy", "torchattacks", "torchmetrics", "cvxpy")
BENCHMARKS = {  # name → function that yields rows, and what makes it quick
    "pgd": (attack.pgd, dict(count=64, train_images=500, repeats=1)),
    "auto-attack": (attack.auto, dict(count=16, train_images=500, repeats=1, steps=5, queries=20)),
    "ece": (ece.ece, dict(count=50_000, repeats=1)),
    "centers": (centers.centers, dict(sizes=((10, 64),), repeats=1, alone=(100, 200))),
    "batches": (batches.augmented, dict(count=1024, sizes=(128,), repeats=1)),
    "mixing": (batches.mixed, dict(batches=4, repeats=1)),
    "training": (training.on_cpu, dict(train_images=256, epochs=1, repeats=1)),
}
ON_GPU = {
    "pgd": lambda **quick: attack.pgd("cuda", **{"count": 4000} | quick),
    "auto-attack": lambda **quick: attack.auto("cuda", **{"count": 1000} | quick),
    "training": lambda **quick: training.on_gpu(**{k: v for k, v in quick.items() if k == "repeats"}),
}


# ---- where and with what ----

def installed(name):
    """The version of a library, or None: not every machine has the peers."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine():
    """What the figures depend on besides the code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.system(),
            "gpu": torch.cuda.get_device_name() if GPU else None, "python": platform.python_version(),
            "libraries": {name: installed(name) for name in LIBRARIES}}


def commit():
    """The commit of this code, with a + where the package or the benchmarks differ from it; None without git."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--", "repspace", "benchmarks")) or None
    except OSError:
        return None


def keep(path, run):
    """Put `run` into the file, by its machine's name, beside the runs of other machines."""
    runs = json.loads(path.read_text()) if path.exists() else {}
    made_on = run["machine"]["gpu"] or f"{run['machine']['cpu']}, {run['machine']['cores']} cores"
    text = json.dumps(runs | {made_on: run}, indent=1) + "\n"
    records.write_file(path, lambda temporary: temporary.write_text(text))


# ---- the table ----

HEADER = f"{'what':58} {'ours':>10} {'peer':>10} {'ratio':>7}  {'target':12} {'same answer':11} against"


def number(value, unit=""):
    if value is None:
        return "-"
    return (f"{value:.0f}" if value >= 100 else f"{value:.3g}") + {"1/s": "/s", "s": " s"}.get(unit, unit)


def line(row):
    """A row as it is printed."""
    what = row["what"] + (" (GPU)" if row["device"] == "cuda" else "")
    same = {True: "yes", False: "NO", None: "-"}[row["same"]]
    target = row["target"] + ("" if row["reached"] else " missed")
    return (f"{what:58} {number(row['ours'], row['unit']):>10} {number(row['theirs'], row['unit']):>10} "
            f"{number(row['ratio'], '×'):>7}  {target:12} {same:11} {row['peer'] or ''}: {row['answer']}")


def tasks(only, quick):
    """name, function and arguments of all benchmarks that are wanted, those on a GPU last."""
    wanted = [name for name in BENCHMARKS if not only or name in only]
    for table in [{name: function for name, (function, _) in BENCHMARKS.items()}] + [ON_GPU] * GPU:
        yield from ((name, table[name], BENCHMARKS[name][1] if quick else {}) for name in wanted if name in table)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--out", type=Path, help="where to keep the results (a full run: results/benchmarks.json)")
    options = parser.parse_args()
    out = options.out or (None if options.only or options.quick else ROOT / "results/benchmarks.json")

    start, rows = time.monotonic(), []
    print(HEADER, flush=True)
    for name, function, sizes in tasks(options.only, options.quick):
        for found in function(**sizes):
            rows.append({"benchmark": name} | found)
            print(line(rows[-1]), flush=True)
            for what, share in found["profile"]:
                print(f"    {share:6.1%}  {what}")
    print(f"{len(rows)} rows in {time.monotonic() - start:.0f} s, {torch.get_num_threads()} threads")
    if out:
        keep(out, {"made": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "commit": commit(), "quick": options.quick,
                   "machine": machine(), "rows": rows})
        print(f"kept in {out}")


if __name__ == "__main__":
    main()
