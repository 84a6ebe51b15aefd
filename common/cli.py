"""How does one run a training, or a study, without a notebook? Settings are options."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn

from common import (
    WorkbookError,
    choose,
    data,
    models,
    params,
    report,
    runs,
    slimming,
    train,
)
from common.augment import normalise
from common.config import (
    DATA,
    FIELDS,
    TrainConfig,
    check_settings,
    config_and_network,
    parse_init,
)
from common.models import files


@dataclass(frozen=True)
class Command(TrainConfig):
    """Train a network on CIFAR, its run kept in runs/; the same command resumes or loads it.

    Several GPUs or machines: accelerate launch -m common.train, with the same options; machines
    share runs/. Several CPU processes: ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 -m
    -- common.train, with the same options.
    """

    init: tyro.conf.Suppress[str] = "random"  # only notebooks start from other weights
    model: str = "resnet18"  # network: see common.models.MODELS
    dataset: str = "cifar10"  # "cifar10", "cifar100" or "cifar10-sample"
    width: int | float | None = None  # width of the network, where it has one; default: its own
    # other arguments of the network: depth 3 se 16 dropout 0.1
    network: dict[str, int | float | bool] = field(default_factory=dict)
    val: int | None = None  # images held out for validation; default: the data set's
    run: str | None = None  # name of the run's folder; default: <model>-<dataset>
    every: int = 1  # epochs between checkpoints
    retrain: bool = False  # train it although it was recorded
    test: bool = False  # measure test accuracy at the end, when nothing is left to choose


@dataclass(frozen=True)
class StudyCommand:
    """Run a study; the same command again, here or on another machine, goes on with it."""

    file: tyro.conf.Positional[str]  # study file (YAML)
    workers: int = 2  # processes on this machine; 0 only queues the runs, requeues, and sums up
    threads: int | None = None  # threads of each; default: the cores are shared out
    # sqlite:///PATH, postgresql+psycopg://…, mysql://… or journal:PATH; default: sqlite in runs/
    storage: str | None = None
    requeue: bool = False  # first queue again what has failed
    # the same, and all that is said to run: when you know that its workers are gone
    requeue_all: bool = False
    # seconds between two signs of life; after four without one, a run is queued again
    heartbeat: int = 30


@dataclass(frozen=True)
class RecordCommand:
    """Record finished runs of runs/ in reports/: manifest, history, answers on the test images."""

    names: tyro.conf.Positional[list[str]]  # runs
    weights: bool = False  # their weights, too, in half precision


def start(settings: dict, split: data.Split, folder: Path, **options) -> runs.Run:
    """`fit` for a run's flat settings, from fresh weights or the run that `init` names."""
    config, network = config_and_network(settings)
    if config.init == "random":
        x = normalise(split.train.x[:5000], split.spec)
        model = models.fresh(seed=config.seed, x=x, **network)
    else:
        model = pruned(config.init, split, settings["model"])
    return train.fit(model, split, config, folder, **options)


def pruned(init: str, split: data.Split, expect: str | None = None) -> nn.Module:
    """The network that `init` tells of, as in "lab2-sparse-0, gap": cut and recalibrated.

    Weights are rounded as in recording, so that it does not matter where the run is read from.
    """
    name, ratio = parse_init(init)
    dense = files.rounded(runs.load_model(name, expect))
    found = slimming.scores(dense)
    ratio = slimming.gap(found) if ratio is None else ratio
    masks = slimming.make_masks(found, ratio, min_channels=4)
    images = data.Loader(split.train[:2500], split.spec, 250, shuffle=False)
    return slimming.recalibrate_bn(slimming.slim(dense, masks), images)


def folder_of(study: str, key: str) -> Path:
    """Where a run of a study is kept: `runs/<study>-<configuration>-<seed>/`."""
    return runs.folder(f"{study}-{key.replace('/', '-')}")


def record_main() -> None:
    """Parse the command line, record, write the index of reports."""
    try:
        command = tyro.cli(RecordCommand, prog="python -m common.report")
        for name in command.names:
            told = runs.load_manifest(runs.folder(name))["data"]
            report.record(name, data.load(told["name"], told["val"]), command.weights)
            print(f"recorded {name}")
        report.write_index(report.recorded_folder())
    except WorkbookError as error:
        sys.exit(f"error: {error}")


def main(arguments=None) -> None:
    """Parse the command line, train, print the best epoch; a mistake ends in one line, status 1."""
    try:
        command = tyro.cli(Command, args=arguments, prog="python -m common.train")
        params.whole(1)("every", command.every)
        settings = {key: getattr(command, key) for key in {*FIELDS} - {"init"} | DATA}
        for key in command.network:
            choose(f"argument of {command.model}", key, models.arguments_of(command.model))
        settings |= command.network
        if command.width is not None:
            settings["width"] = command.width
        check_settings(settings)
        # several CPU processes would not be seen otherwise
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        with state.local_main_process_first():  # one of them downloads
            split = data.load(command.dataset, command.val)
        folder = runs.folder(command.run or f"{command.model}-{command.dataset}")
        options = dict(every=command.every, retrain=command.retrain)
        run = start(settings, split, folder, **options)
        state.destroy_process_group()
        if not state.is_main_process:
            return
        best = run.manifest["best"]
        print(f"{folder}: best epoch {best['epoch']}, validation {best['val_accuracy']:.2%}")
        if command.test:
            test = report.tested(run, split)
            print(f"test {test['accuracy']:.2%} (single view, n = 1)")
    except WorkbookError as error:
        sys.exit(f"error: {error}")
