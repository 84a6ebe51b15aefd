"""How does one run a study? Configurations × seeds, each run once, by any number of workers.

`python -m common.sweep Assignment_MobileNet/study.yaml --workers 2`; a second machine joins by the
same command on the same storage. Optuna keeps the queue.
"""

import collections
import contextlib
import functools
import os
import re
import socket
import subprocess
import sys
import time
import warnings
from datetime import datetime
from pathlib import Path

import optuna
import sqlalchemy
import torch
import tyro
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from common import ROOT, WorkbookError, cli, data, params, runs, train
from common.cli import StudyCommand, folder_of
from common.config import Study, read_study

MISSED = 4  # heartbeats, after which a worker is taken for dead
RETRIES = 10  # times that a run whose worker died is queued again by itself
OPEN = {TrialState.WAITING, TrialState.RUNNING}
TAKEN = OPEN | {TrialState.COMPLETE}
FINISHED = (ValueError, optuna.exceptions.UpdateFinishedTrialError)  # raised if told once more
load = functools.lru_cache(data.load)


def open_study(study: Study, storage=None, heartbeat=30, enqueue=True) -> optuna.Study:
    """The Optuna study in `storage`, with every run of the file queued (if `enqueue`).

    `storage`: a database URL (a trial silent for four heartbeats, in seconds, is queued again) or
    "journal:PATH"; by default sqlite in runs/. Raises WorkbookError if it cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = storage or f"sqlite:///{runs.folder(study.name)}.db"
    options = dict(study_name=study.name, direction="maximize", load_if_exists=True)
    try:
        opened = optuna.create_study(storage=open_storage(url, heartbeat), **options)
    except Exception as error:  # each database and driver has errors of its own
        shown = re.sub(r"(?<=:)[^/@]+(?=@)", "***", url)  # no password in a message
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WorkbookError(f"storage {shown} cannot be reached ({reason}); check it") from None
    trials = trials_with_runs(opened)
    if trials and not {key for key, _ in trials} & set(study.runs):
        raise WorkbookError(f"the storage holds another study {study.name!r}; use another name")
    trials = trials_with_runs(opened, study)
    known = {key for key, t in trials if t.state in TAKEN or "error" in t.user_attrs}
    for key in study.runs if enqueue else ():
        if key not in known:  # two machines may get here at once: see `objective`
            queue(opened, key, study.runs[key])
    return opened


def open_storage(url: str, heartbeat: int):
    """A journal file, or a database, which queues again the runs of workers that died."""
    kind = next((kind for kind in ("sqlite:///", "journal:") if url.startswith(kind)), "")
    if kind:  # a file; its path begins at the repository
        path = ROOT / Path(url.removeprefix(kind)).expanduser()
        if set("%?#") & set(str(path)):
            raise ValueError("a path of a storage must not hold %, ? or #")
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"{kind}{path}"
    if kind == "journal:":
        return JournalStorage(JournalFileBackend(str(path)))
    sqlite = url.startswith("sqlite")
    arguments = dict(timeout=60, isolation_level=None) if sqlite else dict(connect_timeout=20)
    options = dict(pool_pre_ping=True, connect_args=arguments)
    beat = dict(heartbeat_interval=heartbeat, grace_period=MISSED * heartbeat)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    beat["heartbeat_stale_trial_callback"] = RetryHeartbeatStaleTrialCallback(RETRIES)
    storage = RDBStorage(url, options, **beat)
    if sqlite:
        # It locks at the first write: two workers could read "waiting" and take the same trial.
        begin = lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE")
        sqlalchemy.event.listen(storage.engine, "begin", begin)
    return storage


def trials_with_runs(opened: optuna.Study, study: Study | None = None) -> list:
    """(key, trial) of the trials that have a run, with the settings that `study` gives it."""
    trials = [t for t in opened.get_trials(deepcopy=False) if "key" in t.user_attrs]
    same = lambda kept: study is None or study.runs.get(kept["key"]) == kept["settings"]
    return [(t.user_attrs["key"], t) for t in trials if same(t.user_attrs)]


def queue(opened: optuna.Study, key: str, settings: dict) -> None:
    opened.enqueue_trial({}, user_attrs=dict(key=key, settings=settings))


def requeue(opened: optuna.Study, study=None, failed=True, dead=lambda trial: False) -> list:
    """Queue again the runs that `failed`, and running ones whose trial is `dead`; their keys."""
    lost, trials = {}, trials_with_runs(opened, study)
    for key, trial in trials:
        if trial.state == TrialState.RUNNING and dead(trial):
            with contextlib.suppress(*FINISHED):  # another worker was first
                opened.tell(trial.number, state=TrialState.FAIL)
                lost[key] = trial
        elif failed and trial.state == TrialState.FAIL:
            lost[key] = trial
    there = {key for key, t in trials if t.state in TAKEN and lost.get(key) is not t}
    again = {key: t for key, t in lost.items() if key not in there}
    for key, trial in again.items():
        queue(opened, key, trial.user_attrs["settings"])
    return list(again)


def objective(trial: optuna.Trial) -> float:
    """Train one run, or go on with it: best validation accuracy; keeps history and manifest."""
    opened, kept = trial.study, trial.user_attrs
    same = lambda other: all(kept.get(name) == other[name] for name in ("key", "settings"))
    others = [t for _, t in trials_with_runs(opened) if t.state in TAKEN and same(t.user_attrs)]
    if "key" not in kept or any(t.number < trial.number for t in others):
        raise optuna.TrialPruned("nothing left to run, or two machines queued this run")
    trial.set_user_attr("worker", (socket.gethostname(), os.getpid(), trial.number))
    tell = lambda row: trial.report(row["val_accuracy"], row["epoch"])
    try:
        settings, folder = (
            kept["settings"],
            folder_of(opened.study_name, kept["key"]),
        )
        split = load(settings["dataset"], settings.get("val"))
        run = cli.start(settings, split, folder, on_epoch=tell)
    except Exception as error:
        trial.set_user_attr("error", f"{type(error).__name__}: {error}")
        raise
    # By column and to five digits: an attribute must fit into 64 KB on MySQL.
    columns = {k: [float(f"{row[k]:.5g}") for row in run.history] for k in run.history[0]}
    trial.set_user_attr("history", columns)
    trial.set_user_attr("manifest", run.manifest)
    return run.manifest["best"]["val_accuracy"]


def work(opened: optuna.Study, heartbeat: int = 30) -> None:
    """Run waiting trials until none waits; then stay while others run, in case one dies."""

    def unborn(trial):  # its worker died before its first heartbeat
        silent = (datetime.now() - trial.datetime_start).total_seconds() > MISSED * heartbeat
        # (host, process, number) of the last try; versions before had a time for the number
        mark = trial.user_attrs.get("worker", [-1])[-1]
        return silent and isinstance(mark, int) and mark != trial.number

    while states := OPEN & {trial.state for _, trial in trials_with_runs(opened)}:
        if TrialState.WAITING in states:
            try:
                opened.optimize(objective, n_trials=1, catch=(Exception,))
            except FINISHED as error:  # silent for too long: the run was given to another worker
                if isinstance(error, ValueError) and "Cannot tell" not in str(error):
                    raise
        elif isinstance(opened._storage, JournalStorage):
            return  # no heartbeat: nobody would know
        else:
            time.sleep(heartbeat)
            optuna.storages.fail_stale_trials(opened)
            requeue(opened, failed=False, dead=unborn)


def results(opened: optuna.Study, study: Study) -> dict:
    """By key: `state` of every run; `history` (rows) and `manifest` of a complete one."""
    found = {key: dict(state="not run") for key in study.runs}
    for key, trial in trials_with_runs(opened, study):
        kept, state = trial.user_attrs, trial.state.name.lower().replace("waiting", "not run")
        if state != "pruned" and found[key]["state"] != "complete":
            found[key] = dict(state=state, error=kept.get("error", "interrupted"))
        if state == "complete":
            columns = kept["history"] | dict(epoch=[int(e) for e in kept["history"]["epoch"]])
            rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
            found[key] |= dict(history=rows, manifest=kept["manifest"])
    return found


def run(command: StudyCommand) -> None:
    """Check everything, queue what is left, work, and print what came of it."""
    params.whole(0)("workers", command.workers)
    params.whole(1)("heartbeat", command.heartbeat)
    params.optional(params.whole(1))("threads", command.threads)
    study, workers = read_study(command.file), command.workers
    for settings in study.runs.values() if workers else ():
        load(settings["dataset"], settings.get("val"))  # downloads once, before workers would
    if command.in_order:
        return cli.in_order(study, load, only_report=not workers)
    opened = open_study(study, command.storage, command.heartbeat)
    if command.requeue or command.requeue_all:
        again = requeue(opened, study, dead=lambda trial: command.requeue_all)
        print("queued again:", ", ".join(again) or "nothing")
    if workers == 1:
        if command.threads:
            torch.set_num_threads(command.threads)
            os.environ["OMP_NUM_THREADS"] = str(command.threads)  # a choice, which `fit` keeps
        work(opened, command.heartbeat)
    elif workers:
        start_workers(command)
    found = results(opened, study)
    counts = sorted(collections.Counter(done["state"] for done in found.values()).items())
    print(f"{study.name}: " + ", ".join(f"{count} {state}" for state, count in counts))
    for key, done in found.items():
        if done["state"] == "fail":
            print(f"  {key} failed: {done['error']} (--requeue runs it again)")


def start_workers(command: StudyCommand) -> None:
    """Processes of this machine that work on a study whose runs are queued; waits for them."""
    words = str(Path(command.file).resolve()), command.storage, command.heartbeat
    threads = command.threads or max(1, train.CORES // command.workers)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = dict(OMP_NUM_THREADS=str(threads), PYTHONPATH=paths)
    call = [sys.executable, "-c", f"from common import sweep; sweep.worker_main{words!r}"]
    started = [subprocess.Popen(call, env=os.environ | settings) for _ in range(command.workers)]
    try:
        died = [process.wait() for process in started]
    finally:
        for process in started:
            process.terminate()
    if all(died):
        raise WorkbookError("all workers died, see above; the same command goes on")


def worker_main(file: str, storage, heartbeat: int) -> None:
    """What one of several worker processes does."""
    work(open_study(read_study(file), storage, heartbeat, enqueue=False), heartbeat)


if __name__ == "__main__":
    try:
        run(tyro.cli(StudyCommand, prog="python -m common.sweep"))
    except WorkbookError as error:
        sys.exit(f"error: {error}")
