"""A study: a fixed list of configurations × seeds, each run exactly once, however many workers take part (Optuna).

`python -m common.sweep Assignment_MobileNet/study.yaml --workers 2`; a second machine joins by running the same
command on the same storage.
"""

import functools
import inspect
import multiprocessing
import os
import re
import socket
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import optuna
import psutil
import sqlalchemy
import torch
import tyro
import yaml
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from common import ROOT, WorkbookError, choose, data, models, params, train

CONFIG = set(train.FIELDS) - {"seed", "init"}
SECTIONS = dict(name=str, base=dict, seeds=list, configurations=dict)
NAME = r"[\w.-]*\w[\w.-]*"  # of studies and configurations: a part of a folder's name
FINISHED = (ValueError, optuna.exceptions.UpdateFinishedTrialError)  # what telling a finished trial raises, by its timing
THERE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)  # a trial in another state does not have its run


class Loader(yaml.SafeLoader):
    """YAML in which a key given twice is a mistake; YAML itself would keep the second."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]!r} is a duplicate; rename or remove one")
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Study:
    """A study file, read and checked: `runs` maps `configuration/seed` to the complete settings of a run."""

    name: str
    runs: dict


def read(path) -> Study:
    """Read a study file (YAML): its name, `base` settings, `seeds`, and what each of `configurations` changes.

    Settings are the fields of `TrainConfig`, `model`, `dataset`, `val`, and the arguments of the network. A
    configuration may have `seeds` of its own. Every network is built once, small as it may be, so that a mistake
    shows before anything runs. Raises WorkbookError naming an unknown key, a duplicate or an illegal value.
    """
    try:
        content = yaml.load(Path(path).read_text(), Loader)
    except (OSError, yaml.YAMLError) as error:
        raise WorkbookError(f"study file {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or set(content) != set(SECTIONS):
        odd = sorted(set(content) ^ set(SECTIONS)) if isinstance(content, dict) else "no keys"
        raise WorkbookError(f"study file {path} must have exactly the keys {', '.join(SECTIONS)}; look at: {odd}")
    for key, kind in SECTIONS.items():
        if not isinstance(content[key], kind) or not content[key]:
            raise WorkbookError(f"study file {path}: {key} must be a {kind.__name__} that is not empty; got {content[key]!r}")
    if not re.fullmatch(NAME, content["name"]):
        raise WorkbookError(f"study file {path}: name must consist of letters, digits, '.', '-' and '_'; got {content['name']!r}")
    runs, seen = {}, {}
    for name, changes in content["configurations"].items():
        where = f"study file {path}, configuration {name!r}"
        if not re.fullmatch(NAME, str(name)) or not isinstance(changes or {}, dict):
            raise WorkbookError(f"{where}: give a name of letters, digits, '.', '-' and '_', and under it settings")
        settings = {**content["base"], **(changes or {})}
        seeds = settings.pop("seeds", content["seeds"])
        try:
            made = repr(check(settings, seeds))
        except (TypeError, ValueError, ArithmeticError, RuntimeError, WorkbookError) as error:
            raise WorkbookError(f"{where}: {' '.join(str(error).split())}") from None
        twin = seen.setdefault(made, name)
        if twin != name or len(set(seeds)) < len(seeds):
            other = f"configurations {twin!r} and {name!r} are" if twin != name else f"seeds of {name!r} hold"
            raise WorkbookError(f"study file {path}: {other} duplicates; remove one")
        runs |= {f"{name}/{seed}": {**settings, "seed": seed} for seed in seeds}
    return Study(content["name"], runs)


def check(settings: dict, seeds: list) -> tuple:
    """What makes a configuration, all defaults filled in; raises WorkbookError for an unknown key or an illegal value."""
    if not isinstance(seeds, list) or not seeds:
        raise WorkbookError(f"seeds must be a list of whole numbers that is not empty; got {seeds!r}")
    name = choose("model", settings.get("model"), models.MODELS)
    arguments = inspect.signature(models.MODELS[name]).parameters
    for key in settings:
        choose("key", key, sorted(CONFIG | {"model", "dataset", "val", "seeds"} | set(arguments) - {"cfg", "classes"}))
    spec = data.SPECS[choose("dataset", settings.get("dataset"), data.SPECS)]
    params.optional(params.whole(1))("val", settings.get("val"))
    val = data.check_val(settings.get("val"), spec)
    for seed in seeds:
        parts({**settings, "seed": seed})
    config, network = parts(settings)
    model = models.build(**network)
    if config.watch:
        choose("parameter", config.watch, dict(model.named_parameters()))
    return config, {key: argument.default for key, argument in arguments.items()} | network, spec, val


def parts(settings: dict) -> tuple:
    """The `TrainConfig` of a run's settings, and the arguments of its network."""
    own = CONFIG | {"seed"}
    settings = {key: tuple(v) if isinstance(v, list) and key in own else v for key, v in settings.items()}
    config = train.TrainConfig(**{key: settings[key] for key in settings if key in own})
    network = {key: settings[key] for key in settings if key not in own | {"model", "dataset", "val"}}
    return config, dict(name=settings["model"], classes=data.SPECS[settings["dataset"]].classes, **network)


def folder_of(study: str, key: str) -> Path:
    """Where a run of a study is kept: `runs/<study>-<configuration>-<seed>/`."""
    return params.runs_folder() / f"{study}-{key.replace('/', '-')}"


def queue_run(opened: optuna.Study, attributes: dict) -> None:
    """Queue a run, from the attributes of a trial: its key and settings alone, not the worker that had it."""
    if "key" in attributes:
        opened.enqueue_trial({}, user_attrs={name: attributes[name] for name in ("key", "settings")})


load = functools.lru_cache(data.load)


def open_study(study: Study, storage: str | None = None, heartbeat: int = 30, enqueue: bool = True) -> optuna.Study:
    """The Optuna study in `storage`, with every run of the file enqueued (unless `enqueue` is False).

    `storage`: a database URL (with heartbeat every `heartbeat` seconds; a trial silent for four of them is queued
    again), or "journal:PATH" for a file on a shared disk; default sqlite in runs/. Paths that are not absolute begin at
    the repository. Raises WorkbookError if it cannot be reached, or holds runs of other settings under the same names.
    """
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # heartbeat and retry are
    folder = params.runs_folder()
    url = storage or f"sqlite:///{folder / study.name}.db"
    for kind in ("sqlite:///", "journal:"):
        url = f"{kind}{ROOT / url.removeprefix(kind)}" if url.startswith(kind) else url
    shown = re.sub(r"(?<=:)[^/@]+(?=@)", "***", url)  # no password in a message
    try:
        if url.startswith("journal:"):
            path = Path(url.removeprefix("journal:"))
            path.parent.mkdir(parents=True, exist_ok=True)
            backend = JournalStorage(JournalFileBackend(str(path)))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            sqlite = url.startswith("sqlite")
            arguments = dict(timeout=60, isolation_level=None) if sqlite else dict(connect_timeout=20)
            arguments = dict(pool_pre_ping=True, connect_args=arguments)
            retry = lambda study, trial: queue_run(study, trial.user_attrs)
            beat = dict(heartbeat_interval=heartbeat, grace_period=4 * heartbeat, heartbeat_stale_trial_callback=retry)
            backend = RDBStorage(url, arguments, **beat)
            if sqlite:
                # SQLite locks at the first write, so that two workers could both read "waiting" and both take a trial.
                sqlalchemy.event.listen(backend.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        opened = optuna.create_study(storage=backend, study_name=study.name, direction="maximize", load_if_exists=True)
    except Exception as error:  # each database and driver has errors of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WorkbookError(f"storage {shown} cannot be reached ({reason}); check the address, or leave it out") from None
    trials = [trial for trial in opened.get_trials(deepcopy=False) if "key" in trial.user_attrs]
    if trials and not {trial.user_attrs["key"] for trial in trials} & set(study.runs):
        raise WorkbookError(f"storage {shown} holds another study {study.name!r}, with none of these runs; use another name")
    for trial in trials:
        key, saved = trial.user_attrs["key"], trial.user_attrs["settings"]
        wanted = study.runs.get(key, saved)
        if odd := [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]:
            raise WorkbookError(
                f"storage {shown} holds a study {study.name!r} whose run {key!r} has {odd[0]}={saved.get(odd[0])!r}, not "
                f"{wanted.get(odd[0])!r}; change the study's name or the storage"
            )
    known = {trial.user_attrs["key"] for trial in trials if trial.state in THERE or "error" in trial.user_attrs}
    for key, settings in study.runs.items() if enqueue else ():
        if key not in known:  # two machines may both get here; `objective` lets the first of equal trials run
            queue_run(opened, dict(key=key, settings=settings))
    return opened


def gone(trial, everywhere: bool = False) -> bool:
    """Whether a running trial's worker is known to be dead: no such process here; `everywhere`: or not of this machine."""
    host, pid, began = trial.user_attrs.get("worker", (None, None, None))
    if not pid:  # it died before it could leave its name
        return (datetime.now() - trial.datetime_start).total_seconds() > 120
    if host != socket.gethostname():
        return everywhere
    try:
        return abs(psutil.Process(pid).create_time() - began) > 10  # another process by now
    except psutil.NoSuchProcess:
        return True


def return_lost(opened: optuna.Study, failed: bool = True, everywhere: bool = False) -> list:
    """Queue again the runs whose worker is `gone`, and with `failed` those that failed; their keys."""
    trials = [trial for trial in opened.get_trials(deepcopy=False) if "key" in trial.user_attrs]
    dead = [trial for trial in trials if trial.state == TrialState.RUNNING and gone(trial, everywhere)]
    for trial in list(dead):
        try:
            opened.tell(trial.number, state=TrialState.FAIL)
        except FINISHED:  # another worker was first
            dead.remove(trial)
    there = {trial.user_attrs["key"] for trial in trials if trial.state in THERE and trial not in dead}
    lost = {t.user_attrs["key"]: t for t in trials if t in dead or (failed and t.state == TrialState.FAIL)}
    lost = {key: trial for key, trial in lost.items() if key not in there}
    for trial in lost.values():
        queue_run(opened, trial.user_attrs)
    return list(lost)


def objective(trial: optuna.Trial, trackers=()) -> float:
    """Train one run, or go on with it: best validation accuracy; history and manifest are kept with the trial."""
    key = trial.user_attrs.get("key")
    others = [t for t in trial.study.get_trials(deepcopy=False) if t.number < trial.number and t.user_attrs.get("key") == key]
    if key is None or any(t.state in THERE for t in others):
        raise optuna.TrialPruned("nothing left to run, or another trial has this run")
    trial.set_user_attr("worker", (socket.gethostname(), os.getpid(), psutil.Process().create_time()))
    try:
        settings = trial.user_attrs["settings"]
        config, network = parts(settings)
        split = load(settings["dataset"], settings.get("val"))
        model = models.fresh(seed=config.seed, x=data.normalise(split.train.x[:5000], split.spec), **network)
        report = lambda row: trial.report(row["val_accuracy"], row["epoch"])
        run = train.fit(model, split, config, folder_of(trial.study.study_name, key), on_epoch=report, trackers=trackers)
    except Exception as error:
        trial.set_user_attr("error", f"{type(error).__name__}: {error}")
        raise
    # By column and to five digits: an attribute must fit into 64 KB on MySQL, 300 epochs included.
    columns = {name: [float(f"{row[name]:.5g}") for row in run.history] for name in run.history[0]}
    trial.set_user_attr("history", columns)
    trial.set_user_attr("manifest", run.manifest)
    return run.manifest["best"]["val_accuracy"]


def work(opened: optuna.Study, heartbeat: int = 30, trackers=()) -> None:
    """Run waiting trials until none waits; then stay while others run, in case one of them dies."""
    count = lambda *states: sum("key" in trial.user_attrs for trial in opened.get_trials(deepcopy=False, states=states))
    while count(TrialState.WAITING, TrialState.RUNNING):
        if count(TrialState.WAITING):
            try:
                opened.optimize(functools.partial(objective, trackers=trackers), n_trials=1, catch=(Exception,))
            except FINISHED as error:  # silent for too long (a sleeping laptop): the run was given to another worker
                if isinstance(error, ValueError) and "Cannot tell" not in str(error):
                    raise
                print(f"a run of this worker was finished by another one ({error})")
        elif isinstance(opened._storage, JournalStorage):
            return  # no heartbeat: nobody would know
        else:
            time.sleep(heartbeat)
            optuna.storages.fail_stale_trials(opened)
            return_lost(opened, failed=False)


def results(opened: optuna.Study, study: Study) -> dict:
    """By key, for every run of the study: its state, and for a finished one `history` (rows) and `manifest`."""
    found = {key: dict(state="not run") for key in study.runs}
    for trial in opened.get_trials(deepcopy=False):
        key, state = trial.user_attrs.get("key"), trial.state.name.lower()
        if key not in found or trial.state == TrialState.PRUNED or found[key]["state"] == "complete":
            continue
        found[key] = dict(state={"waiting": "not run"}.get(state, state), error=trial.user_attrs.get("error", "interrupted"))
        if trial.state == TrialState.COMPLETE:
            columns = trial.user_attrs["history"]
            rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
            found[key] |= dict(
                history=[row | {"epoch": int(row["epoch"])} for row in rows], manifest=trial.user_attrs["manifest"]
            )
    return found


def worker(study: Study, storage, heartbeat: int, threads: int, trackers) -> None:
    """What each of several processes of one machine does."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(threads)
    work(open_study(study, storage, heartbeat, enqueue=False), heartbeat, trackers)


def main(
    file: Annotated[str, tyro.conf.Positional],
    workers: int = 2,
    threads: int | None = None,
    storage: str | None = None,
    requeue: bool = False,
    requeue_all: bool = False,
    heartbeat: int = 30,
    trackers: tuple[str, ...] = (),
) -> None:
    """Run a study; the same command again, here or on another machine, goes on with what is left.

    Raises WorkbookError for an illegal value, and if all workers of this machine died.

    Args:
        file: study file (YAML).
        workers: processes on this machine; 0 only queues the runs, requeues, and sums up.
        threads: threads of each; by default the cores are shared out.
        storage: sqlite:///PATH, postgresql+psycopg://…, mysql://… or journal:PATH; sqlite in runs/ by default.
        requeue: first queue again what has failed, and what a worker of this machine that is gone left behind.
        requeue_all: the same, and everything that runs on other machines: when you know that they are gone.
        heartbeat: seconds between two signs of life; after four without one, a trial is queued again.
        trackers: "tensorboard", "mlflow", "wandb" or "trackio".
    """
    params.whole(0)("workers", workers)
    params.whole(1)("heartbeat", heartbeat)
    params.optional(params.whole(1))("threads", threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = read(file)
    train.check_trackers(trackers)
    # Downloads once, before several workers would; and before anything is queued.
    for dataset, val in {(settings["dataset"], settings.get("val")) for settings in study.runs.values()} if workers else ():
        load(dataset, val)
    opened = open_study(study, storage, heartbeat)
    if requeue or requeue_all:
        print("queued again:", ", ".join(return_lost(opened, everywhere=requeue_all)) or "nothing")
    if workers == 1:
        torch.set_num_threads(threads or torch.get_num_threads())
        work(opened, heartbeat, trackers)
    elif workers:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = threads or max(1, cores // workers)
        context = multiprocessing.get_context("spawn")
        words = (study, storage, heartbeat, threads, trackers)
        processes = [context.Process(target=worker, args=words, daemon=True) for _ in range(workers)]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.terminate()
        if all(process.exitcode for process in processes):
            raise WorkbookError(f"all {workers} workers died; what they printed says why, and the same command goes on")
    found = results(opened, study)
    states = [run["state"] for run in found.values()]
    print(f"{study.name}: " + ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))))
    if failures := [f"{key}: {run['error']}" for key, run in found.items() if run["state"] == "fail"]:
        print("failed:", *failures, "(--requeue runs them again)", sep="\n  ")


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m common.sweep")
    except WorkbookError as error:
        sys.exit(f"error: {error}")
