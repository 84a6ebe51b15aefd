"""`python -m common.train`: a training from the command line; every field of `TrainConfig` is an option."""

import inspect
import sys
from dataclasses import dataclass, field

import tyro
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from common import WorkbookError, choose, data, models, params, report, train


@dataclass(frozen=True)
class Command(train.TrainConfig):
    """Train a network on CIFAR and keep its run in runs/; the same command again resumes or loads it.

    Several GPUs or machines: accelerate launch -m common.train, with the same options; machines share runs/. Several CPU
    processes: ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 -m common.train, with the same options.
    """

    init: tyro.conf.Suppress[str] = "random"  # what notebooks record here, the command line has no use for
    model: str = "resnet18"  # network: see common.models.MODELS
    dataset: str = "cifar10"  # "cifar10", "cifar100" or "cifar10-sample"
    width: int | float | None = None  # width of the network, where it has one; its own default otherwise
    network: dict[str, int | float | bool] = field(default_factory=dict)  # its other arguments: depth 3 se 16 dropout 0.1
    val: int | None = None  # images held out for validation; the data set's default otherwise
    run: str | None = None  # name of the run's folder; <model>-<dataset> otherwise
    every: int = 1  # epochs between checkpoints
    trackers: tuple[str, ...] = ()  # "tensorboard", "mlflow", "wandb" or "trackio"
    test: bool = False  # measure test accuracy at the end; do so when nothing is left to choose


def main(arguments=None) -> None:
    """Parse the command line, train, print the best epoch; a mistake ends in one line and exit status 1."""
    try:
        command = tyro.cli(Command, args=arguments, prog="python -m common.train")
        params.whole(1)("every", command.every)
        config = train.TrainConfig(**{name: getattr(command, name) for name in train.FIELDS})
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # several CPU processes would not be seen otherwise
        with state.local_main_process_first():  # so that one of them downloads
            split = data.load(command.dataset, command.val)
        known = set(inspect.signature(models.MODELS[choose("model", command.model, models.MODELS)]).parameters)
        for name in command.network:
            choose(f"argument of {command.model}", name, sorted(known - {"cfg", "classes", "width"}))
        sized = command.network | ({} if command.width is None else {"width": command.width})
        x = data.normalise(split.train.x[:5000], split.spec)
        model = models.fresh(command.model, config.seed, x, classes=split.spec.classes, **sized)
        folder = params.runs_folder() / (command.run or f"{command.model}-{command.dataset}")
        run = train.fit(model, split, config, folder, trackers=command.trackers, every=command.every)
        state.destroy_process_group()
        if not state.is_main_process:
            return
        print(f"{folder}: best epoch {run.manifest['best']['epoch']}, validation {run.manifest['best']['val_accuracy']:.2%}")
        if command.test:
            print(f"test {report.tested(run, split)['accuracy']:.2%} (single view, n = 1)")
    except WorkbookError as error:
        sys.exit(f"error: {error}")
