"""Is this machine ready for the lessons? `python -m common.doctor`: [OK], or [FIX] and how.

Packages are imported inside the checks: one that is missing is named, and the rest still told.
"""

import contextlib
import csv
import io
import os
import platform
import re
import shutil
import statistics
import sys
import time
from importlib import metadata
from threading import Thread

from common import ROOT, WorkbookError, folder_from, install_command, requirements, write_file

PYTHON = f'"{sys.executable}"'
REFERENCE = "lab1-laptop-baseline"  # the recorded run that the benchmark repeats in small


def packages():
    """Everything in requirements.txt, at least as new as there."""
    bad = []
    for name, line in requirements().items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            bad.append(f"{name} is missing")
            continue
        if numbers(found) < numbers(line.partition(">=")[2]):
            bad.append(f"{name} {found} is older than {line}")
    if bad:
        yield "; ".join(bad), install_command()
    import torch
    import torchvision

    yield f"torch {torch.__version__}, torchvision {torchvision.__version__}", None


def numbers(version: str) -> list:
    """The numbers that a version begins with: [2, 9, 1] of "2.9.1+cu130"."""
    return [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]


def place():
    """Which clone this is, and whether runs can be kept."""
    from common import measure

    yield f"Python {platform.python_version()}, workbook in {ROOT}, commit {measure.COMMIT}", None
    runs = folder_from("RUNS_DIR", "runs")
    write_file(runs / ".doctor", "")
    (runs / ".doctor").unlink()
    free = shutil.disk_usage(runs).free / 1e9
    mend = None if free > 2 else "free some, or set RUNS_DIR to a folder on another disk"
    yield f"{runs} can be written; {free:.0f} GB free, 2 needed", mend


def device():
    """What computes, and with which precision."""
    import psutil
    import torch

    from common import measure, models, optim, report

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    kind = "mps" if torch.backends.mps.is_available() else kind
    machine = measure.machine(kind)
    precision = optim.native_precision("auto", models.build("resnet18"))
    words = {"no": "32 bits", "bf16": "bf16", "fp16": "fp16"}[precision]
    cores = "no GPU" if kind == "cpu" else "GPU"
    yield f"{report.device_of(machine)}; {cores}; precision 'auto' means {words}", None
    free = psutil.virtual_memory().available / 1e9
    yield f"{free:.1f} GB of memory free, 2 needed", None if free > 2 else "close other programs"


def data():
    """Both data sets, whole; where one is missing, how fast each mirror answers."""
    from common import sources

    folder, lacking = folder_from("CIFAR_DIR", "data"), []
    for name in ("cifar10", "cifar100"):
        if (folder / f"{name}.npz").exists():
            sources.cached(name, folder)
            yield f"{name}: {folder / name}.npz is whole", None
        else:
            lacking.append(name)
    if lacking:
        rates = ask_mirrors(f"{lacking[0].replace('cifar', 'cifar-')}-python.tar.gz")
        told = ", ".join(f"{host} {rate}" for host, rate in rates.items())
        names = " ".join(lacking)
        problem = f"{' and '.join(lacking)}: not here (scale quick needs none); mirrors: {told}"
        yield problem, f"{PYTHON} -m common.sources {names}"


def ask_mirrors(name: str, seconds: float = 5) -> dict:
    """Server → how fast it sends the start of a file, all asked at once; or "no answer"."""
    from common import mirrors, sources

    rates = {}

    def ask(base):
        rate = mirrors.rate(f"{base.rstrip('/')}/{name}", seconds)
        rates[base] = f"{rate / 1e6:.1f} MB/s" if rate else "no answer"

    bases = [*filter(None, [os.environ.get("CIFAR_URL")]), *sources.MIRRORS]
    threads = [Thread(target=ask, args=(base,), daemon=True) for base in bases]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds + 1
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
    return {mirrors.host(base): rates.get(base, "no answer") for base in bases}


def speed(seconds: float = 5):
    """Five seconds of the training of Lab 1.1, beside its recorded run."""
    from common import config, data, models, train

    with open(ROOT / "reports" / "runs" / f"{REFERENCE}.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    recorded = [float(row["images_per_s"]) for row in rows]
    minutes = sum(float(row["seconds"]) for row in rows) / 60
    told = config.TrainConfig(epochs=1000, batch_size=125, precision="no", schedule="constant")
    sample = data.load("cifar10-sample")
    few = data.Split(sample.train[:500], sample.val, sample.test, sample.spec, sample.class_names)
    learner = train.Learner(models.build("resnet18", width=16), few, told, folder=None)
    began, rates = time.monotonic(), []
    with contextlib.redirect_stderr(io.StringIO()):  # bars
        while not rates or time.monotonic() - began < seconds:
            start = time.monotonic()
            train.train_epoch(learner)
            rates.append(len(few.train) / (time.monotonic() - start))
    here, there = statistics.median(rates[1:] or rates), statistics.median(recorded)
    told = f"{here:,.0f} images/s in the training of Lab 1.1; {there:,.0f} in its recorded run"
    slow = "close other programs; OMP_NUM_THREADS=1 suits a machine that is busy"
    yield f"{told}, which took {minutes:.0f} minutes", slow if here < there / 3 else None


def main(checks=(packages, place, device, data, speed)) -> int:
    """Print what each check finds; 1 if something is to be mended, else 0."""
    status = 0
    for check in checks:
        for text, mend in findings(check):
            print(f"[FIX] {text}\n      → {mend}" if mend else f"[OK]  {text}", flush=True)
            status |= bool(mend)
    print("Something is to be mended, see above." if status else "This machine is ready.")
    return status


def findings(check):
    """What a check yields, and what it ends with, if that is an error."""
    try:
        yield from check()
    except WorkbookError as error:  # "what is wrong; what to do"
        problem, _, mend = str(error).rpartition("; ")
        yield problem or mend, mend
    except ImportError as error:
        yield f"{check.__name__}: {error}", install_command()
    except Exception as error:  # whatever else may be wrong with a machine
        told = " ".join(f"{check.__name__}: {type(error).__name__}: {error}".split())
        yield told, "report it, with all that stands here"


if __name__ == "__main__":
    sys.exit(main())
