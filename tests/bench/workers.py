"""Trials an hour of the laptop study, by workers × threads of each: `python -m tests.bench.workers`.

Every way of sharing two cores runs the same trials, one epoch each, in runs of its own. From the first trial's start
to the last one's end; starting the processes does not count.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from common import ROOT, config, sweep


def main(trials=4, ways=((1, 2), (2, 1))):
    content = yaml.safe_load((ROOT / "Assignment_MobileNet" / "study.yaml").read_text())
    name, changes = next(iter(content["configurations"].items()))
    content |= dict(configurations={name: {**changes, "epochs": 1}}, seeds=list(range(trials)))
    for workers, threads in ways:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "study.yaml"
            file.write_text(yaml.safe_dump(content | dict(name="bench")))
            storage = f"sqlite:///{folder}/bench.db"
            words = ["--workers", str(workers), "--threads", str(threads), "--storage", storage]
            environment = {**os.environ, "RUNS_DIR": folder, "OMP_NUM_THREADS": str(threads)}
            command = [sys.executable, "-m", "common.sweep", str(file), *words]
            subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            done = sweep.open_study(config.read_study(file), storage, enqueue=False).get_trials()
            span = max(t.datetime_complete for t in done) - min(t.datetime_start for t in done)
        print(
            f"{workers} × {threads} threads: {3600 * trials / span.total_seconds():.1f} trials of one epoch an hour", flush=True
        )


if __name__ == "__main__":
    main()
