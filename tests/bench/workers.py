"""Trials an hour of the laptop study, by workers × threads of each: `python -m tests.bench.workers`.

Every way of sharing two cores runs the same trials, one epoch each, in a process group of its own; start-up counts.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from common import ROOT


def main(trials=4, ways=((1, 2), (2, 1), (2, 2))):
    content = yaml.safe_load((ROOT / "Assignment_MobileNet" / "study.yaml").read_text())
    name, changes = next(iter(content["configurations"].items()))
    content |= dict(configurations={name: {**changes, "epochs": 1}}, seeds=list(range(trials)))
    for workers, threads in ways:
        with tempfile.TemporaryDirectory() as folder:
            study = Path(folder) / "study.yaml"
            study.write_text(yaml.safe_dump(content | dict(name=f"bench-{workers}-{threads}")))
            words = [sys.executable, "-m", "common.sweep", str(study), "--workers", str(workers), "--threads", str(threads)]
            environment = dict(RUNS_DIR=folder, OMP_NUM_THREADS=str(threads))
            start = time.perf_counter()
            subprocess.run(words, check=True, cwd=ROOT, env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
            rate = 3600 * trials / (time.perf_counter() - start)
        print(f"{workers} workers with {threads} threads each: {rate:.1f} trials of one epoch an hour", flush=True)


if __name__ == "__main__":
    main()
