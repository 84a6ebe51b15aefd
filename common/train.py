"""How does a network learn? One plain loop on accelerate, which resumes exactly."""

import contextlib
import copy
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, gather_object, parse_flag_from_env
from torch import nn
from tqdm.auto import tqdm

from common import WorkbookError, choose, claim, measure, owner_of, runs, slimming
from common.config import TrainConfig, identity
from common.data import Loader, Split
from common.evaluate import evaluate
from common.optim import (
    GROUPS,
    image_sizes,
    lr_factor,
    make_optimizer,
    native_precision,
    refuse_lonely_images,
)


def fit(model, split, config, folder, on_grad=None, on_epoch=None, every=1, retrain=False):
    """Train, resume or load: the run in `folder` is finished and returned (`runs.Run`).

    A run without a folder is taken from the recorded ones, but not with `retrain`. `on_grad(model)`
    is called between backward and step, `on_epoch(row)` after each validation, for earlier epochs
    of a run at once. From its checkpoint, after `every` epochs, a run goes on bit for bit the same
    (CPU, as many threads). The model given keeps its weights. Raises WorkbookError for another run
    in the folder, divergence, and processes that cannot share.
    """
    folder, hook = Path(folder), on_epoch or (lambda row: None)
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # or it would train alone
    wanted = identity(model, split, config)
    state = runs.find_or_refuse(folder, wanted)
    refuse_unshared(folder, len(state["history"]))
    if run := runs.finished(folder, model, state, retrain):
        for row in run.history:
            hook(row)
        return run
    with measure.idle_threads(folder):
        learner = Learner(copy.deepcopy(model), split, config, folder)
        state = learner.begin(wanted)
        for row in state["history"]:
            hook(row)
        while not state["finished"]:
            row = learner.epoch(on_grad)
            learner.record(state, row)
            if state["finished"] or row["epoch"] % every == 0:
                learner.save(state)
            learner.accelerator.print(line(folder.name, row, config.epochs), flush=True)
            hook(row)
        run = runs.result(folder, learner.finish(), state)
        if learner.accelerator.is_main_process:
            add_clean_accuracy(run, split)
        return run


def add_clean_accuracy(run: runs.Run, split: Split) -> None:
    """Note the accuracy on training images as they are, in eval mode: as many as in validation."""
    few = split.train[:: max(1, len(split.train) // len(split.val))][: len(split.val)]
    found = evaluate(run.model, few, split.spec)["accuracy"]
    run.manifest = runs.save_result(run.folder, clean_train_accuracy=found)


def line(name: str, row: dict, epochs: int) -> str:
    """What is printed of an epoch."""
    accuracies = f"train {row['train_accuracy']:.2%}  val {row['val_accuracy']:.2%}"
    rates = f"lr {row['lr']:.4f}  loss {row['train_loss']:.3f}  {accuracies}"
    return f"{name} epoch {row['epoch']:3d}/{epochs}  {rates}  {row['seconds']:.0f} s"


class Learner:
    """A model in training, and what moves it; `net` is `model` as accelerate wraps it."""

    def __init__(self, model: nn.Module, split: Split, config: TrainConfig, folder: Path):
        self.model, self.config, self.spec, self.folder = model, config, split.spec, folder
        self.gammas = slimming.trained_gammas(model) if config.lam else []
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.watched = named[choose("parameter", config.watch, named)] if config.watch else None
        refuse_lonely_images(model, len(split.train), config)
        measure.keep_freed_memory()
        AcceleratorState._reset_state()  # so that a second run may choose another precision
        precision = native_precision(config.precision, model)
        self.notes = dict(commit=measure.COMMIT, precision=precision)
        # Without these, variables of the environment would choose.
        own = dict(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))
        self.accelerator = Accelerator(mixed_precision=precision, dynamo_backend="no", **own)
        refuse_unknown_ways(self.accelerator)
        self.device = self.accelerator.device
        self.share = self.accelerator.process_index, self.accelerator.num_processes
        self.val, images = split.val.to(self.device), split.train.to(self.device)
        options = dict(seed=config.seed, share=self.share)
        self.loader = Loader(images, self.spec, config.batch_size, config.augment, **options)
        optimizer = make_optimizer(model.to(memory_format=torch.channels_last), config)
        self.net, self.optimizer = self.accelerator.prepare(model, optimizer)

    def begin(self, identity: dict) -> dict:
        """Claim the run and return its state, from which training goes on."""
        self.owner = claim(self.folder) if self.accelerator.is_main_process else None
        self.accelerator.wait_for_everyone()
        state = runs.find_or_refuse(self.folder, identity)  # as its last owner left it
        refuse_unshared(self.folder, (len(state["history"]), owner_of(self.folder)))
        machines = measure.distinct(gather_object([measure.machine(self.device)]))
        state["parts"] += [dict(self.notes, machines=machines, epochs=0, seconds=0.0)]
        if state["history"]:
            self.loader.epoch = len(state["history"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        return state

    def epoch(self, on_grad=None) -> dict:
        """Train on all images once, then validate: a row of the history."""
        started = time.perf_counter()
        row = dict(epoch=self.loader.epoch + 1) | train_epoch(self, on_grad)
        trained = time.perf_counter() - started
        found = evaluate(self.net, self.val, self.spec, accelerator=self.accelerator)
        row |= {f"val_{key}": value for key, value in found.items()}
        row["seconds"] = time.perf_counter() - started
        return row | dict(images_per_s=len(self.loader.images) / trained)

    def record(self, state: dict, row: dict) -> None:
        """Add an epoch to a state: history, best weights, whether the run is finished."""
        config, best = self.config, state["best"]
        if not best or config.select == "last" or row["val_accuracy"] > best["val_accuracy"]:
            weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
            best = {key: row[key] for key in ("epoch", "val_accuracy")} | dict(state_dict=weights)
        waited = row["epoch"] - best["epoch"]
        out_of_patience = config.patience is not None and waited >= config.patience
        state["finished"] = out_of_patience or row["epoch"] == config.epochs
        state["best"], state["seconds"] = best, state["seconds"] + row["seconds"]
        state["history"].append(row)
        part = state["parts"][-1]
        part["epochs"], part["seconds"] = part["epochs"] + 1, part["seconds"] + row["seconds"]

    def save(self, state: dict) -> None:
        """Write the run as it stands; one process does."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state |= dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict())
            state["scaler"] = scaler and scaler.state_dict()
            runs.save_run(self.folder, state, self.owner)

    def finish(self) -> nn.Module:
        """Wait for the other processes; the model, unwrapped, on the CPU."""
        self.accelerator.wait_for_everyone()
        return self.accelerator.unwrap_model(self.net, keep_fp32_wrapper=False).cpu()


def train_epoch(learner: Learner, on_grad=None) -> dict:
    """One pass over the images; returns part of a history row.

    Each step: backward for every piece of the batch → unscale and clip → L1 term and hook →
    optimizer → zero.
    """
    config, net, loader = learner.config, learner.net, learner.loader
    accelerator, optimizer, gammas = learner.accelerator, learner.optimizer, learner.gammas
    epoch, total = loader.epoch, config.epochs * len(loader)
    size = image_sizes(config.epochs, config.low_res, config.low_sizes)[epoch]
    plan = total, round(config.warmup * len(loader)), config.schedule, config.milestones
    # Dropout depends on epoch and process alone, so that a resumed run repeats it.
    rank, world = learner.share
    torch.manual_seed((config.seed * 1_000_003 + epoch) * world + rank)
    sums = torch.zeros(5, device=learner.device)  # loss, correct, images, norm, watched norm
    shown = dict(leave=False, disable=not accelerator.is_main_process, mininterval=2)
    net.train()
    for i, (x, y) in enumerate(tqdm(loader, f"epoch {epoch + 1}/{config.epochs}", **shown)):
        factor = lr_factor(epoch * len(loader) + i, *plan)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        if size < 32:
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        whole = min(config.batch_size, len(loader.images) - i * config.batch_size)
        backward(learner, x, y, whole, sums[:3])
        norm = accelerator.clip_grad_norm_(net.parameters(), config.clip or math.inf)  # unscales
        sums[3] += torch.nan_to_num(norm, 0, 0)  # with fp16 a step may overflow, and is skipped
        if learner.watched is not None:
            scale = (norm / config.clip).clamp(min=1) if config.clip else 1
            sums[4] += torch.nan_to_num(learner.watched.grad.norm() * scale, 0, 0)
        if config.penalty == "subgradient":
            slimming.add_subgradient(gammas, config.lam)
        if on_grad:
            on_grad(learner.model)
        optimizer.step()
        if config.penalty == "proximal":
            # A constant force moves a weight by lr / (1 − momentum) a step: lam means the same.
            group = optimizer.param_groups[GROUPS.index("gammas")]
            slimming.shrink(gammas, config.lam * group["lr"] / (1 - group.get("momentum", 0)))
        optimizer.zero_grad()
    loss, correct, images, *_ = accelerator.reduce(sums).tolist()
    refuse_divergence(learner, loss)
    row = dict(lr=optimizer.param_groups[0]["lr"], images=round(images))
    row |= dict(train_loss=loss / images, train_accuracy=correct / images)
    names = ["grad_norm", "watched_norm"] if config.watch else ["grad_norm"]
    return row | dict(zip(names, (sums[3:] / len(loader)).tolist()))


def backward(learner: Learner, x, y, whole: int, sums) -> None:
    """Gradients of a batch's mean loss, piece by piece; adds loss, correct answers, images.

    x, y: the share of this process in a batch of `whole` images. Processes average their gradients.
    """
    config, accelerator = learner.config, learner.accelerator
    pieces = list(zip(x.chunk(config.accumulate), y.chunk(config.accumulate)))
    for i, (xs, ys) in enumerate(pieces, 1):
        # Processes may have different numbers of pieces: they meet in the last one alone.
        with contextlib.nullcontext() if i == len(pieces) else accelerator.no_sync(learner.net):
            logits, smoothing = learner.net(xs).float(), config.label_smoothing
            loss = F.cross_entropy(logits, ys, reduction="sum", label_smoothing=smoothing)
            accelerator.backward(loss * accelerator.num_processes / whole)
        correct = (logits.argmax(1) == ys).sum()
        sums += torch.stack([loss.detach(), correct, xs.new_tensor(len(ys))])


def refuse_unshared(folder: Path, seen) -> None:
    """Raise WorkbookError unless all processes have seen the same."""
    if len(set(gather_object([seen]))) > 1:
        raise WorkbookError(f"not all processes find the same run in {folder}; share it")


def refuse_unknown_ways(accelerator: Accelerator) -> None:
    """Raise WorkbookError for ways to train that accelerate takes from its environment."""
    if (started := int(os.environ.get("WORLD_SIZE") or 1)) != accelerator.num_processes:
        problem = f"{started} processes were started, but each would train alone"
        raise WorkbookError(f"{problem}; set ACCELERATE_USE_CPU=1, or start one")
    way = accelerator.distributed_type.value
    if way != "NO" and not way.startswith("MULTI"):
        raise WorkbookError(f"{way} is not tried with this workbook; use several GPUs or CPUs")


def refuse_divergence(learner: Learner, loss: float) -> None:
    finite = all(p.isfinite().all() for p in learner.model.parameters())
    if not finite or not math.isfinite(loss):  # the last step's loss is not known yet
        what = "weights" if math.isfinite(loss) else "loss"
        problem = f"the {what} became infinite in epoch {learner.loader.epoch}"
        raise WorkbookError(f"{problem}; lower lr={learner.config.lr} or set clip=1.0")


if __name__ == "__main__":
    from common.cli import main

    main()
