"""How does one run a study? Configurations × seeds, each run once, by any number of workers.

`python -m common.sweep Assignment_MobileNet/study.yaml --workers 2`; a second machine joins by the
same command on the same storage. Optuna keeps the queue.
"""

import collections
import contextlib
import functools
import os
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import optuna
import torch
import tyro
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from common import ROOT, WorkbookError, cli, data, measure, params, runs
from common.cli import StudyCommand, folder_of
from common.config import Study, read_study
from common.storage import MISSED, RETRIES, open_storage, without_secrets

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
    url = storage or os.environ.get("STUDY_STORAGE") or f"sqlite:///{runs.folder(study.name)}.db"
    options = dict(study_name=study.name, direction="maximize", load_if_exists=True)
    try:
        kept = open_storage(url, heartbeat)
        opened = optuna.create_study(storage=kept, **options)
    except Exception as error:  # each database and driver has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = without_secrets(f"storage {url} cannot be reached ({reason})", url)
        raise WorkbookError(f"{problem}; check it") from None
    # Of a study that was opened before, workers beat as the first of them did.
    if (first := opened.user_attrs.get("heartbeat", heartbeat)) != heartbeat:
        print(f"{study.name} was opened with --heartbeat {first}, which stays")
    heartbeat = first
    opened.set_user_attr("heartbeat", heartbeat)
    kept.heartbeat_interval, kept.grace_period = heartbeat, MISSED * heartbeat
    trials = trials_with_runs(opened)
    if trials and not {key for key, _ in trials} & set(study.runs):
        raise WorkbookError(f"the storage holds another study {study.name!r}; use another name")
    trials = trials_with_runs(opened, study)
    known = {key for key, t in trials if t.state in TAKEN or "error" in t.user_attrs}
    for key in study.runs if enqueue else ():
        if key not in known:  # two machines may get here at once: see `objective`
            queue(opened, key, study.runs[key])
    return opened


def trials_with_runs(opened: optuna.Study, study: Study | None = None) -> list:
    """(key, trial) of the trials that have a run, with the settings that `study` gives it."""
    trials = [t for t in opened.get_trials(deepcopy=False) if "key" in t.user_attrs]
    same = lambda kept: study is None or study.runs.get(kept["key"]) == kept["settings"]
    return [(t.user_attrs["key"], t) for t in trials if same(t.user_attrs)]


def queue(opened: optuna.Study, key: str, settings: dict) -> None:
    opened.enqueue_trial({}, user_attrs=dict(key=key, settings=settings))


def requeue(opened: optuna.Study, study=None, failed=True, dead=lambda trial: False) -> list:
    """Queue again the runs that `failed`, and running ones whose trial is `dead`; their keys."""
    mark = lambda key, trial: (key, repr(trial.user_attrs["settings"]))
    lost, trials = {}, [(mark(key, t), t) for key, t in trials_with_runs(opened, study)]
    for key, trial in trials:
        if trial.state == TrialState.RUNNING and dead(trial):
            with contextlib.suppress(*FINISHED):  # another worker was first
                opened.tell(trial.number, state=TrialState.FAIL)
                lost[key] = trial
        elif failed and trial.state == TrialState.FAIL:
            lost[key] = trial
    there = {key for key, t in trials if t.state in TAKEN and lost.get(key) is not t}
    tries = collections.Counter(key for key, t in trials if t.state == TrialState.FAIL)
    spent = lambda key: not failed and tries[key] >= RETRIES  # what kills its worker is given up
    again = {key: t for key, t in lost.items() if key not in there and not spent(key)}
    for (key, _), trial in again.items():
        queue(opened, key, trial.user_attrs["settings"])
    return [key for key, _ in again]


def objective(trial: optuna.Trial, study: Study | None = None) -> float:
    """Train one run, or go on with it: best validation accuracy; keeps history and manifest.

    What `study` has no longer, or with other settings, is not trained.
    """
    opened, kept = trial.study, trial.user_attrs
    same = lambda other: all(kept.get(name) == other[name] for name in ("key", "settings"))
    others = [t for _, t in trials_with_runs(opened) if t.state in TAKEN and same(t.user_attrs)]
    if "key" not in kept or any(t.number < trial.number for t in others):
        raise optuna.TrialPruned("nothing left to run, or two machines queued this run")
    if study and study.runs.get(kept["key"]) != kept["settings"]:
        raise optuna.TrialPruned("the study file has no such run now")
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


def work(opened: optuna.Study, study: Study | None = None) -> None:
    """Run waiting trials until none waits; then stay while others run, in case one dies."""
    heartbeat = opened.user_attrs["heartbeat"]

    def unborn(trial):  # its worker died before its first heartbeat
        silent = (datetime.now() - trial.datetime_start).total_seconds() > MISSED * heartbeat
        # (host, process, number) of the last try; versions before had a time for the number
        mark = trial.user_attrs.get("worker", [-1])[-1]
        return silent and isinstance(mark, int) and mark != trial.number

    while states := OPEN & {trial.state for _, trial in trials_with_runs(opened)}:
        if TrialState.WAITING in states:
            try:
                train_one = functools.partial(objective, study=study)
                opened.optimize(train_one, n_trials=1, catch=(Exception,))
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


def run(command: StudyCommand) -> list:
    """Check everything, queue what is left, work, print what came of it; runs that failed."""
    params.whole(0)("workers", command.workers)
    params.whole(1)("heartbeat", command.heartbeat)
    params.optional(params.whole(1))("threads", command.threads)
    study, workers = read_study(command.file), command.workers
    for settings in study.runs.values() if workers else ():
        load(settings["dataset"], settings.get("val"))  # downloads once, before workers would
    opened = open_study(study, command.storage, command.heartbeat)
    if command.requeue or command.requeue_all:
        again = requeue(opened, study, dead=lambda trial: command.requeue_all)
        print("queued again:", ", ".join(again) or "nothing")
    if workers == 1:
        if command.threads:
            torch.set_num_threads(command.threads)
            os.environ["OMP_NUM_THREADS"] = str(command.threads)  # a choice, which `fit` keeps
        work(opened, study)
    elif workers:
        start_workers(command)
    found = results(opened, study)
    counts = sorted(collections.Counter(done["state"] for done in found.values()).items())
    print(f"{study.name}: " + ", ".join(f"{count} {state}" for state, count in counts))
    failed = [key for key, done in found.items() if done["state"] == "fail"]
    for key in failed:
        print(f"  {key}: {found[key]['error']}")
    return failed


def start_workers(command: StudyCommand) -> None:
    """Processes of this machine that work on a study whose runs are queued; waits for them."""
    words = str(Path(command.file).resolve()), command.heartbeat, os.getpid()
    threads = command.threads or max(1, measure.CORES // command.workers)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = dict(OMP_NUM_THREADS=str(threads), PYTHONPATH=paths)
    if command.storage:
        settings["STUDY_STORAGE"] = command.storage  # not in a command line, which others can read
    call = [sys.executable, "-c", f"from common import sweep; sweep.worker_main{words!r}"]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    started = []
    for i in range(command.workers):
        own = {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}
        started.append(subprocess.Popen(call, env=os.environ | settings | own))
    try:
        died = [process.wait() for process in started]
    finally:
        for process in started:
            process.terminate()
    if all(died):
        raise WorkbookError("all workers died, see above; the same command goes on")


def worker_main(file: str, heartbeat: int, parent: int) -> None:
    """What one of several worker processes does; it ends with the process that started it."""
    study = read_study(file)

    def watch():
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    work(open_study(study, heartbeat=heartbeat, enqueue=False), study)


if __name__ == "__main__":
    try:
        if failed := run(tyro.cli(StudyCommand, prog="python -m common.sweep")):
            raise WorkbookError(f"{', '.join(failed)} failed, see above; --requeue runs them again")
    except WorkbookError as error:
        sys.exit(f"error: {error}")
