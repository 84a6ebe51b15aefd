"""Images a second of a training by threads and load: `python -m tests.bench.threads`.

One and two threads, and what `fit` chooses by itself; alone, and beside a process that keeps a core
busy all the time; with OpenMP's threads spinning for a while when they wait (its default) or not.
"""

import os
import statistics
import subprocess
import sys
import tempfile

from common import ROOT, report

CODE = """
import sys, torch
from common import augment, config, data, models, train
split = data.load("cifar10-sample")
options = dict(lr=0.01, precision="no", augment=("flip", "crop:2"), select="last")
settings = config.TrainConfig(epochs=int(sys.argv[2]), batch_size=125, **options)
x = augment.normalise(split.train.x, split.spec)
run = train.fit(models.fresh(sys.argv[1], 0, x, width=16), split, settings, sys.argv[3])
rows = run.history[1:]
rate = sum(row["images"] for row in rows) / sum(row["seconds"] for row in rows)
print("RATE", rate, torch.get_num_threads())
"""
BUSY = [sys.executable, "-c", "while True: pass"]


def rate(network: str, epochs: int, threads, policy: str):
    """Images a second after the first epoch (validation included), and the threads taken."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    if policy == "passive":
        environment["OMP_WAIT_POLICY"] = policy
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", CODE, network, str(epochs), folder]
        out = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    line = next(line for line in out.stdout.splitlines() if line.startswith("RATE"))
    return float(line.split()[1]), int(line.split()[2])


def main(rounds=3, networks=(("resnet18", 4), ("fastnet", 6))):
    for network, epochs in networks:
        found = {}
        for _ in range(rounds):
            for load in ("alone", "beside a busy process"):
                busy = subprocess.Popen(BUSY) if load != "alone" else None
                for threads in (1, 2, None):
                    for policy in ("default", "passive") if threads != 1 else ("default",):
                        key = load, threads or "chosen", policy
                        found.setdefault(key, []).append(rate(network, epochs, threads, policy))
                if busy:
                    busy.kill()
        rows = []
        for (load, threads, policy), values in found.items():
            rates = [value for value, _ in values]
            row = {"network": network, "load": load, "threads": str(threads), "waiting": policy}
            row["images a second"] = f"{statistics.median(rates):.0f}"
            row["lowest to highest"] = f"{min(rates):.0f} to {max(rates):.0f}"
            rows.append(row | {"taken": ", ".join(str(taken) for _, taken in values)})
        print(report.table(rows), flush=True)


if __name__ == "__main__":
    main()
