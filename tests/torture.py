"""A study under fire: three workers, ten of them killed, a database that is away for five seconds, twice.

`python -m tests.torture sqlite` or `python -m tests.torture postgresql` (some minutes). Every run must be there, once.
"""

import collections
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from common import ROOT, config, runs, sweep

TINY = dict(dataset="cifar10-sample", model="fastnet", width=4, epochs=2, batch_size=250, lr=0.05)
STUDY = dict(name="fire", base=TINY, seeds=list(range(15)), configurations=dict(plain=None, decay=dict(weight_decay=0.01)))
BINARIES = os.pathsep.join([*map(str, Path("/usr/lib/postgresql").glob("*/bin")), os.environ["PATH"]])


class Sqlite:
    def __init__(self, folder):
        self.url, self.file = f"sqlite:///{folder}/fire.db", folder / "fire.db"

    def away(self, seconds):
        connection = sqlite3.connect(self.file, timeout=60, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
        time.sleep(seconds)
        connection.close()

    def stop(self):
        pass


class Postgresql:
    def __init__(self, folder):
        self.folder, port = folder / "server", 20000 + os.getpid() % 20000
        self.folder.mkdir()
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(self.folder, "nobody")
            os.chmod(folder, 0o755)
        self.options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        self.call("initdb", "-U", "student", "-A", "trust")
        self.start()
        self.url = f"postgresql+psycopg://student@127.0.0.1:{port}/postgres"

    def call(self, name, *words):
        user = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []
        words = [*user, shutil.which(name, path=BINARIES), "-D", str(self.folder / "db"), *words]
        subprocess.run(words, check=True, capture_output=True, cwd=self.folder)

    def start(self):
        self.call("pg_ctl", "-l", str(self.folder / "log"), "-w", "-o", self.options, "start")

    def away(self, seconds):
        self.stop()
        time.sleep(seconds)
        self.start()

    def stop(self):
        self.call("pg_ctl", "-m", "immediate", "stop")


def main(kind):
    folder = Path(tempfile.mkdtemp())
    os.environ["RUNS_DIR"] = str(folder / "runs")
    path = folder / "study.yaml"
    path.write_text(yaml.dump(STUDY))
    study, database = config.read_study(path), dict(sqlite=Sqlite, postgresql=Postgresql)[kind](folder)
    sweep.open_study(study, database.url, heartbeat=3)
    log = (folder / "log").open("w")
    words = [sys.executable, "-m", "common.sweep", str(path), "--storage", database.url, "--workers", "1"]
    start = lambda: subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, env=os.environ | dict(OMP_NUM_THREADS="1"))
    workers, draw, kills, rests, began = [start() for _ in range(3)], random.Random(0), 10, 2, time.monotonic()
    while any(worker.poll() is None for worker in workers):
        time.sleep(draw.uniform(4, 12))
        done = len(list(runs.folder().glob("*/best.pt")))
        if rests and done >= 10 * (3 - rests):
            database.away(5)
            rests -= 1
            print(f"{done} runs done; the database was away", flush=True)
        elif kills:
            victim = draw.randrange(3)
            workers[victim].send_signal(signal.SIGKILL)
            workers[victim].wait()
            workers[victim], kills = start(), kills - 1
            print(f"{done} runs done; killed a worker", flush=True)
    opened = sweep.open_study(study, database.url)
    states = collections.Counter(run["state"] for run in sweep.results(opened, study).values())
    once = collections.Counter(key for key, trial in sweep.trials_with_runs(opened) if trial.state.name == "COMPLETE")
    whole = all(runs.load_run(f"fire-{key.replace('/', '-')}").manifest["epochs"] == 2 for key in study.runs)
    database.stop()
    print(f"{kind}: {dict(states)}, each once: {set(once.values()) == {1}}, whole: {whole}, {time.monotonic() - began:.0f} s")
    print((folder / "log").read_text()[-3000:])
    return states == {"complete": 30} and set(once.values()) == {1} and whole and not kills and not rests


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1]))
