"""How does one run a training, or a study, without a notebook? Settings are options."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from common import WorkbookError, choose, data, models, params, report, runs, train
from common.augment import normalise
from common.config import DATA, FIELDS, TrainConfig, check_settings, config_and_network


@dataclass(frozen=True)
class Command(TrainConfig):
    """Train a network on CIFAR, its run kept in runs/; the same command resumes or loads it.

    Several GPUs or machines: accelerate launch -m common.train, with the same options; machines
    share runs/. Several CPU processes: ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 -m
    common.train, with the same options.
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


def start(settings: dict, split: data.Split, folder: Path, **hooks) -> runs.Run:
    """`fit` for a run's flat settings, from fresh weights."""
    config, network = config_and_network(settings)
    x = normalise(split.train.x[:5000], split.spec)
    model = models.fresh(seed=config.seed, x=x, **network)
    return train.fit(model, split, config, folder, **hooks)


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
        run = start(settings, split, folder, every=command.every)
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
