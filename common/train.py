"""Training: one plain loop on accelerate, a schedule as a function of the step, checkpoints that resume exactly."""

import contextlib
import csv
import ctypes
import dataclasses
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from tqdm.auto import tqdm

from common import ROOT, WorkbookError, choose, params, slimming, write_file
from common.data import Images, Loader, Spec, Split, parse_augment
from common.models import build
from common.models.groups import Whiten

OPTIMIZERS = ("sgd", "adam", "muon")
SCHEDULES = ("cosine", "linear", "steps", "constant")
PRECISIONS = ("auto", "no", "fp16", "bf16")
SELECT = ("best", "last")
TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run, saved with it. Two runs with equal configs, model and data are the same run."""

    epochs: int = 20  # passes over the training images
    batch_size: int = 128  # images a step
    optimizer: str = "sgd"  # "sgd" (Nesterov), "adam" (AdamW) or "muon" (convolutions; the rest with SGD)
    lr: float = 0.1  # peak learning rate
    lr_other: float = 0.1  # with "muon": peak learning rate of everything that is not a convolution
    lr_gamma: float = 1.0  # learning rate of gammas, as a multiple of the others'
    lr_bias: float = 1.0  # learning rate of biases and betas, as a multiple of the others'
    momentum: float = 0.9  # of "sgd" and "muon"
    momentum_other: float | None = None  # with "muon": of everything that is not a convolution; None: the same
    weight_decay: float = 5e-4  # on weights only: not on gammas, betas and biases
    decay_bias: bool = False  # biases and betas decay too, as fast as the other weights do
    schedule: str = "cosine"  # or "linear", "steps", "constant"; all but the last end near 0
    warmup: float = 0.0  # epochs of linear warm-up
    milestones: tuple[float, ...] = (0.5, 0.75)  # with "steps": shares of the run after which lr falls tenfold
    label_smoothing: float = 0.0  # share of the target spread over all classes
    augment: tuple[str, ...] = ("flip", "crop:4")  # see common.data.AUGMENT
    low_res: float = 0.0  # share of the epochs, from the first on, trained on shrunken images
    low_sizes: tuple[int, ...] = (24,)  # side lengths of those images in pixels, one after the other for equal shares
    accumulate: int = 1  # pieces a batch is cut into, one backward pass each
    clip: float | None = None  # largest gradient norm
    precision: str = "auto"  # "auto", "no", "fp16", "bf16"; auto is what the machine computes natively
    select: str = "best"  # whose weights are kept: of the "best" epoch on validation, or of the "last"
    patience: int | None = None  # epochs without a better validation accuracy before stopping
    lam: float = 0.0  # L1 strength on the gammas of the inner prune groups
    penalty: str = "subgradient"  # how the L1 term acts: or "proximal", which reaches exact zeros
    watch: str | None = None  # parameter whose gradient norm is recorded, before clipping, as the mean over an epoch's steps
    seed: int = 0  # order of images, augmentation, dropout
    init: str = "random"  # where the first weights come from: digest of a checkpoint's weights

    def __post_init__(self):
        choices = dict(optimizer=OPTIMIZERS, schedule=SCHEDULES, precision=PRECISIONS, penalty=slimming.PENALTIES, select=SELECT)
        rules = {name: params.one_of(legal) for name, legal in choices.items()}
        rules |= dict.fromkeys(("epochs", "batch_size", "accumulate"), params.whole(1))
        rules |= dict.fromkeys(("lr", "lr_other", "lr_gamma", "lr_bias", "weight_decay", "warmup", "lam"), params.number(0))
        rules |= dict.fromkeys(("momentum", "label_smoothing", "low_res"), params.number(0, below=1))
        rules |= dict(seed=params.whole(0), patience=params.optional(params.whole(1)), clip=params.optional(params.number(1e-9)))
        rules |= dict(momentum_other=params.optional(params.number(0, below=1)), decay_bias=params.switch)
        rules |= dict(watch=params.optional(params.text), init=params.text)
        rules |= dict(milestones=params.several(params.number(0, 1)), low_sizes=params.several(params.whole(16, 32)))
        for name, rule in rules.items():
            rule(name, getattr(self, name))
        parse_augment(self.augment)
        if self.patience and self.select == "last":
            raise WorkbookError("patience waits for a better epoch, select='last' takes the last one; leave one of them out")
        if self.warmup and self.warmup >= self.epochs:
            raise WorkbookError(f"warmup={self.warmup} fills all of epochs={self.epochs}; give fewer epochs of warm-up")


FIELDS = tuple(field.name for field in dataclasses.fields(TrainConfig))


@dataclass
class Run:
    """A finished run: the model with its best weights, one history row an epoch, the manifest, its folder."""

    model: nn.Module
    history: list
    manifest: dict
    folder: Path


class Muon(torch.optim.Optimizer):
    """Muon for convolutions, SGD with Nesterov momentum for the rest.

    Groups with `orthogonal`: a convolution's momentum is orthogonalised by Newton-Schulz iterations, and its weight
    kept at norm sqrt(outputs), which assumes that a BatchNorm follows (Jordan et al., "Muon", 2024; airbench94_muon).
    torch.optim.Muon takes 2-D parameters alone and does not renormalise weights.
    """

    def __init__(self, groups, lr, momentum=0.6, weight_decay=0.0):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                grad = p.grad if group["orthogonal"] else p.grad.add(p, alpha=group["weight_decay"])
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(grad)
                update = grad.add(buffer, alpha=group["momentum"])
                if group["orthogonal"]:
                    update = orthogonalise(update.flatten(1)).view_as(p)
                    p.mul_(len(p) ** 0.5 / p.norm())
                p.add_(update, alpha=-group["lr"])


def orthogonalise(matrix: Tensor, steps: int = 3) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values are driven towards 1 by a quintic iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315  # coefficients of Jordan et al. 2024
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Four parameter groups: convolutions, other weights, gammas, biases and betas. Each keeps its peak lr in `peak`.

    A convolution with a bias of its own (in squeeze-and-excitation, say) has no BatchNorm after it: all of it counts
    among the other weights, except for the bias of the whitening layer.
    """
    kinds = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, nn.BatchNorm2d):
                kinds[p] = 2 if name == "weight" else 3
            elif isinstance(module, nn.Conv2d) and (module.bias is None or isinstance(module, Whiten)):
                kinds[p] = 0 if name == "weight" else 3
            else:
                kinds[p] = 3 if name == "bias" and not isinstance(module, nn.Conv2d) else 1
    rest, decay = config.lr_other if config.optimizer == "muon" else config.lr, config.weight_decay
    # A step takes lr × decay off a weight: dividing by lr_bias keeps that product.
    bias = decay / config.lr_bias if config.decay_bias and config.lr_bias else 0
    rates = (config.lr, decay), (rest, decay), (rest * config.lr_gamma, 0), (rest * config.lr_bias, bias)
    groups = [dict(params=[], lr=lr, peak=lr, weight_decay=decay, orthogonal=i == 0) for i, (lr, decay) in enumerate(rates)]
    for group in groups[1:] if config.optimizer == "muon" and config.momentum_other is not None else ():
        group["momentum"] = config.momentum_other
    for p in model.parameters():
        if p.requires_grad:
            groups[kinds[p]]["params"].append(p)
    if config.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=config.lr)
    if config.optimizer == "muon":
        return Muon(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def lr_factor(step: int, total: int, warmup: int = 0, schedule: str = "cosine", milestones=(0.5, 0.75)) -> float:
    """Share of the peak learning rate at `step` of `total`: linear warm-up, then the schedule, ending near 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "steps":
        return 0.1 ** sum(step >= m * total for m in milestones)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]


def image_sizes(epochs: int, low_res: float = 0.0, low_sizes=(24,)) -> list[int]:
    """Side length, in pixels, of the training images in each epoch: `low_sizes` in equal shares, then 32.

    Large structures are learnt first, and small images cost less (progressive resizing, Howard 2018).
    """
    low = low_res * epochs
    return [low_sizes[int(epoch / low * len(low_sizes))] if epoch < low else 32 for epoch in range(epochs)]


def fit(model: nn.Module, split: Split, config: TrainConfig, folder, on_grad=None, on_epoch=None, trackers=(), every=1) -> Run:
    """Train, resume or load: the run in `folder` is finished and returned, whatever state it is in.

    `on_grad(model)` is called between backward and optimizer step, `on_epoch(row)` after each validation (for
    epochs that are already done, at once). A checkpoint is written after every `every` epochs; a stopped run goes
    on from it with the same results, bit for bit on a CPU. Raises WorkbookError if the folder holds a run with other
    settings, if the training diverges, or if several processes cannot share the work.
    """
    folder, identity = Path(folder), dict(config=_plain(config), spec=_plain(model.spec), data=describe(split))
    if config.lam and not all(gamma.requires_grad for gamma in slimming.gammas(model)):
        raise WorkbookError(
            f"lam={config.lam} acts on gammas, which this network keeps fixed; build it with gammas=True, or lam=0"
        )
    check_trackers(trackers)
    saved = load_checkpoint(folder / "checkpoint.pt") if (folder / "checkpoint.pt").exists() else None
    if saved:
        refuse_other_settings(saved, identity, folder)
        for row in saved["history"] if on_epoch else ():
            on_epoch(row)
    state = saved or dict(history=[], best=None, seconds=0.0, finished=False)
    history = state["history"]
    refuse_uneven_processes(folder, len(history), len(split.train), config.batch_size, PartialState().num_processes)

    if not state["finished"]:
        keep_freed_memory()
        AcceleratorState._reset_state()  # otherwise a second run in one process could not choose another precision
        precision, log_with = native_precision(config.precision, model), list(trackers) or None
        for key, value in dict(commit=commit(), precision=precision).items():  # it may go on under newer code, or elsewhere
            known = state[key].split(", ") if key in state else []
            state[key] = ", ".join(dict.fromkeys([*known, value]))
        accelerator = Accelerator(mixed_precision=precision, log_with=log_with, project_dir=folder)
        if accelerator.is_main_process:
            write_file(folder / "config.json", json.dumps(identity, indent=1))  # also shows now that the folder can be written
        accelerator.wait_for_everyone()
        if not (folder / "config.json").exists():
            raise WorkbookError(f"{folder} is not that of the main process; let the machines share it")
        share = dict(rank=accelerator.process_index, world=accelerator.num_processes)
        train, val = split.train.to(accelerator.device), split.val.to(accelerator.device)
        loader = Loader(train, split.spec, config.batch_size, config.augment, seed=config.seed, **share)
        model = model.to(memory_format=torch.channels_last)
        net, optimizer = accelerator.prepare(model, make_optimizer(model, config))
        if saved:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            if accelerator.scaler and saved["scaler"]:
                accelerator.scaler.load_state_dict(saved["scaler"])
        if trackers:
            os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder.parent / 'mlflow.db'}")
            settings = {k: str(v) for k, v in identity["config"].items()}
            accelerator.init_trackers(folder.name, settings, {"wandb": {"dir": str(folder)}})
        measured = lambda row: {k: v for k, v in row.items() if k != "epoch"}
        for tracker in accelerator.trackers:
            for row in history if tracker.name != "tensorboard" else ():  # to the others, a resumed run is a new one
                tracker.log(measured(row), step=row["epoch"])

    while not state["finished"]:
        started, loader.epoch = time.perf_counter(), len(history)
        row = dict(epoch=len(history) + 1, **train_epoch(model, net, optimizer, loader, config, accelerator, on_grad))
        row |= {f"val_{k}": v for k, v in evaluate(net, val, split.spec, accelerator=accelerator).items()}
        row["seconds"] = time.perf_counter() - started
        row["images_per_s"] = len(split.train) / row["seconds"]
        history.append(row)
        if not state["best"] or config.select == "last" or row["val_accuracy"] > state["best"]["val_accuracy"]:
            weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            state["best"] = dict(epoch=row["epoch"], val_accuracy=row["val_accuracy"], state_dict=weights)
        stop = config.patience is not None and row["epoch"] - state["best"]["epoch"] >= config.patience
        state["finished"] = stop or row["epoch"] == config.epochs
        state["seconds"] += row["seconds"]
        if accelerator.is_main_process and (state["finished"] or row["epoch"] % every == 0):
            state |= dict(model=model.state_dict(), optimizer=optimizer.state_dict())
            state["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else None
            write_run(folder, state | identity, accelerator.device)
        if accelerator.is_main_process:
            print(
                f"{folder.name} epoch {row['epoch']:3d}/{config.epochs}  lr {row['lr']:.4f}  loss {row['train_loss']:.3f}  "
                f"train {row['train_accuracy']:.2%}  val {row['val_accuracy']:.2%}  {row['seconds']:.0f} s",
                flush=True,
            )
        if trackers:
            accelerator.log(measured(row), step=row["epoch"])
        if on_epoch:
            on_epoch(row)
        if state["finished"]:
            accelerator.wait_for_everyone()
            for tracker in accelerator.trackers:  # end_training would also end the processes' ties, which a next fit may need
                tracker.finish()
            model = accelerator.unwrap_model(net, keep_fp32_wrapper=False).cpu()

    model.load_state_dict(state["best"]["state_dict"])
    try:
        manifest = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        raise WorkbookError(f"{folder} has lost its run.json; restore that file, or delete the folder and train again") from None
    return Run(model.eval(), history, manifest, folder)


def refuse_uneven_processes(folder: Path, epochs: int, images: int, batch_size: int, world: int) -> None:
    if (last := images % batch_size or batch_size) < world:
        raise WorkbookError(
            f"batch_size={batch_size} leaves {last} of {images} images for the last batch, too few for {world} processes; "
            "choose another batch_size"
        )
    if len(set(gather_object([epochs]))) > 1:
        raise WorkbookError(f"not all processes find the same checkpoint in {folder}; let their machines share that folder")


def check_trackers(trackers) -> None:
    """Raise WorkbookError for the name of a tracker that is unknown or not installed."""
    for tracker in trackers:
        if importlib.util.find_spec(choose("tracker", tracker, TRACKERS)) is None:
            raise WorkbookError(f"tracker {tracker!r} is not installed; run: pip install {tracker}")


def fit_in_memory(make_model, split: Split, config: TrainConfig, folder, **hooks) -> Run:
    """`fit`, started again with twice as many pieces a batch (`accumulate`) whenever memory runs out; says so.

    `make_model()` gives a fresh model for each try. Batch size and recipe stay; only BatchNorm sees smaller pieces. A
    run in more pieces has a folder of its own, `<folder>-accumulate<n>`.
    """
    first = Path(folder)
    while True:
        try:
            return fit(make_model(), split, config, folder, **hooks)
        except RuntimeError as error:
            if config.accumulate >= config.batch_size or not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # the next try's memory is to be measured, not this one's
        config = dataclasses.replace(config, accumulate=2 * config.accumulate)
        folder = first.with_name(f"{first.name}-accumulate{config.accumulate}")
        print(f"memory ran out: trying again with each batch in {config.accumulate} pieces", flush=True)


def train_epoch(model, net, optimizer, loader, config, accelerator, on_grad=None) -> dict:
    """One pass over the images. `net` is `model` as accelerate wraps it; returns part of a history row.

    Each step: backward for every piece of the batch → unscale and clip → L1 term and hook → optimizer → zero.
    """
    epoch, total = loader.epoch, config.epochs * len(loader)
    size = image_sizes(config.epochs, config.low_res, config.low_sizes)[epoch]
    # Dropout depends on epoch and process alone, so that a resumed run repeats it.
    torch.manual_seed((config.seed * 1_000_003 + epoch) * accelerator.num_processes + accelerator.process_index)
    sums = torch.zeros(5, device=accelerator.device)  # loss, correct, images, gradient norm, norm of the watched gradient
    named = dict(model.named_parameters())
    watched = named[choose("parameter", config.watch, named)] if config.watch else None
    gammas = slimming.gammas(model) if config.lam else []
    quiet = not accelerator.is_main_process
    net.train()
    for i, (x, y) in enumerate(tqdm(loader, f"epoch {epoch + 1}/{config.epochs}", leave=False, disable=quiet, mininterval=2)):
        factor = lr_factor(epoch * len(loader) + i, total, round(config.warmup * len(loader)), config.schedule, config.milestones)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        pieces = list(zip(x.chunk(config.accumulate), y.chunk(config.accumulate)))
        for j, (xs, ys) in enumerate(pieces):
            if size < 32:
                xs = F.interpolate(xs, size=size, mode="bilinear", antialias=True)
            with accelerator.no_sync(net) if j + 1 < len(pieces) else contextlib.nullcontext():
                logits = net(xs).float()
                loss = F.cross_entropy(logits, ys, label_smoothing=config.label_smoothing, reduction="sum")
                accelerator.backward(loss / len(x))
            sums[:3] += torch.stack([loss.detach(), (logits.argmax(1) == ys).sum(), torch.tensor(len(ys), device=x.device)])
        norm = accelerator.clip_grad_norm_(net.parameters(), config.clip or math.inf)  # unscales, and returns the norm before
        sums[3] += torch.nan_to_num(norm, 0, 0)  # with fp16 a step may overflow, and is skipped
        if config.watch:  # as it was before clipping
            scale = (norm / config.clip).clamp(min=1) if config.clip else 1
            sums[4] += torch.nan_to_num(watched.grad.norm() * scale, 0, 0)
        if config.penalty == "subgradient":
            slimming.add_subgradient(gammas, config.lam)
        if on_grad:
            on_grad(model)
        optimizer.step()
        if config.penalty == "proximal":
            # Under momentum a constant force moves a weight by lr / (1 - momentum) a step: lam means the same in both forms.
            of_gammas = optimizer.param_groups[2]
            slimming.shrink(gammas, config.lam * of_gammas["lr"] / (1 - of_gammas.get("momentum", 0)))
        optimizer.zero_grad()
    norms = dict(zip(("grad_norm", "watched_norm"), (sums[3:] / len(loader)).tolist()))
    loss, correct, images, *_ = accelerator.reduce(sums).tolist()
    if not math.isfinite(loss) or not all(p.isfinite().all() for p in model.parameters()):  # the last step has no loss yet
        problem = "weights" if math.isfinite(loss) else "loss"
        raise WorkbookError(f"the {problem} became infinite in epoch {epoch + 1}; lower lr={config.lr} or set clip=1.0")
    lr = optimizer.param_groups[0]["lr"]
    row = dict(lr=lr, images=round(images), train_loss=loss / images, train_accuracy=correct / images, **norms)
    return row if config.watch else {k: v for k, v in row.items() if k != "watched_norm"}


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, spec: Spec, batch_size: int = 500, accelerator=None, tta: int = 0) -> dict:
    """Mean cross-entropy `loss`, `accuracy` and `top5` (0..1) of a model in eval mode; `tta` as in `views`."""
    share = dict(rank=accelerator.process_index, world=accelerator.num_processes) if accelerator else {}
    sums = torch.zeros(4, device=accelerator.device if accelerator else "cpu")
    for logits, y in _logits(model, images, spec, batch_size, tta, accelerator is None, **share):
        hits = logits.topk(5).indices == y[:, None]
        loss = F.cross_entropy(logits, y, reduction="sum")
        sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(y), device=y.device)]).to(sums.device)
    *sums, n = (accelerator.reduce(sums) if accelerator else sums).tolist()
    return dict(zip(("loss", "accuracy", "top5"), (value / n for value in sums)))


@torch.no_grad()
def predict(model: nn.Module, images: Images, spec: Spec, batch_size: int = 500, tta: int = 0) -> Tensor:
    """Logits (N, classes), on the CPU, of a model in eval mode; `tta` as in `views`."""
    return torch.cat([logits.cpu() for logits, _ in _logits(model, images, spec, batch_size, tta)])


def _logits(model, images, spec, batch_size, tta, move=True, **share):
    """Yield (logits, labels) of each batch; with `move` on a GPU if there is one, where the model is only for that time."""
    home = next(model.parameters()).device
    if move and torch.cuda.is_available():
        model, images = model.to("cuda"), images.to("cuda")
    model.eval()
    try:
        for x, y in Loader(images, spec, batch_size, shuffle=False, **share):
            yield views(model, x, tta), y
    finally:
        if move:
            model.to(home)


def views(model, x: Tensor, tta: int = 0) -> Tensor:
    """Logits averaged over views of x: 0 the images alone, 1 with their mirror images, 2 also shifted by a pixel.

    Level 2 weighs the two diagonal shifts as much as the unshifted image (airbench, Jordan 2024): six views.
    """
    if tta == 0:
        return model(x).float()
    mirrored = (model(x).float() + model(x.flip(3)).float()) / 2
    if tta == 1:
        return mirrored
    size, padded = x.shape[2], F.pad(x, (1, 1, 1, 1), "reflect")
    return mirrored / 2 + sum(views(model, padded[:, :, at : at + size, at : at + size], 1) for at in (0, 2)) / 4


def native_precision(precision: str, model: nn.Module) -> str:
    """Resolve "auto": bf16 where GPU (capability ≥ 8) or CPU (AVX-512 BF16, AMX) compute it, fp16 on older GPUs, else "no".

    Raises WorkbookError if fp16 is asked for without a GPU.
    """
    if precision == "fp16" and not torch.cuda.is_available():
        raise WorkbookError("precision='fp16' needs a GPU; choose 'auto', 'no' or 'bf16'")
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    # On a CPU, bf16 takes 0.6 × the time of dense convolutions, but 1.7 × that of depthwise ones.
    depthwise = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in model.modules())
    native = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return "bf16" if native and not depthwise else "no"


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory in the process: handing it back and faulting it in costs 10-20 % on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):  # M_MMAP_THRESHOLD; some versions allow 32 MB at most
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _plain(value) -> dict:
    """What JSON makes of a dataclass or dict, so that saved and new settings compare equal."""
    return json.loads(json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value))


def describe(split: Split) -> dict:
    """Name, sizes and a fingerprint of the data a run sees (labels of both parts, which fix the split)."""
    labels = torch.cat([split.train.y, split.val.y]).to(torch.uint8).cpu().numpy().tobytes()
    return dict(name=split.spec.name, train=len(split.train), val=len(split.val), sha256=hashlib.sha256(labels).hexdigest()[:16])


def digest(model: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 of all weights: names where a run started from."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def refuse_other_settings(saved: dict, identity: dict, folder: Path) -> None:
    defaults = _plain(TrainConfig())
    for part in identity:
        old, new = ({**(defaults if part == "config" else {}), **side[part]} for side in (saved, identity))
        if differing := [key for key in {**old, **new} if old.get(key) != new.get(key)]:
            key = differing[0]
            raise WorkbookError(
                f"{folder} holds a run with {key}={old.get(key)!r}, but {key}={new.get(key)!r} was asked for; "
                "delete that folder or use another run name"
            )


def write_run(folder: Path, state: dict, device) -> None:
    """Write `history.csv`, `run.json`, at the end `best.pt`, and last `checkpoint.pt`, which makes the epoch count."""
    history, best = state["history"], {k: state["best"][k] for k in ("epoch", "val_accuracy")}
    write_file(folder / "history.csv", csv_text(history))
    manifest = dict(name=folder.name, epochs=len(history), best=best, machine=machine(device))
    manifest |= {key: state[key] for key in ("finished", "seconds", "commit", "precision", "config", "spec", "data")}
    write_file(folder / "run.json", json.dumps(manifest, indent=1))
    if state["finished"]:
        meta = dict(run=folder.name, **best)
        save(folder / "best.pt", dict(spec=state["spec"], state_dict=state["best"]["state_dict"], meta=meta))
    save(folder / "checkpoint.pt", state)


def csv_text(history: list) -> str:
    """History rows as CSV with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, history[0])
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


def commit() -> str:
    """The commit of the checkout, with "+" where tracked files but reports differ from it; "unknown" outside git."""
    git = lambda *words: subprocess.check_output(["git", "-C", str(ROOT), *words], text=True, stderr=subprocess.DEVNULL).strip()
    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(
            git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/reports")
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine(device="cpu") -> dict:
    """Names of processor and GPU, cores, vector instructions, processes, threads of each, and torch version."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = re.search(r"model name\s*: (.*)", info)
    cpu = named[1] if named else platform.processor() or platform.machine()
    kind = torch.device(device).type
    gpu = torch.cuda.get_device_name(device) if kind == "cuda" else None if kind == "cpu" else kind
    processes = PartialState().num_processes
    names = dict(cpu=cpu, instructions=torch.backends.cpu.get_cpu_capability(), gpu=gpu, torch=torch.__version__)
    return names | dict(cores=os.cpu_count(), processes=processes, threads=torch.get_num_threads())


def save(path, content: dict) -> Path:
    """torch.save to memory, then an atomic write, so that a full disk never costs the previous file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return write_file(path, buffer.getvalue())


def save_model(path, model: nn.Module, half: bool = False, **meta) -> Path:
    """Write deployable weights (no optimizer state); `half` stores them as float16 at half the size."""
    shrink = lambda v: v.half() if half and v.is_floating_point() else v
    state = {name: shrink(value.detach().cpu()) for name, value in model.state_dict().items()}
    return save(path, dict(spec=_plain(model.spec), state_dict=state, meta=meta))


def load_checkpoint(path) -> dict:
    """Read a training checkpoint or a weights file; never executes code from it.

    Raises WorkbookError if the file is missing, truncated, not a checkpoint, or holds pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise WorkbookError(f"checkpoint {path} does not exist; train it first or give another path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # pickle, zip and runtime errors, by how the file is damaged
        reason = "it is truncated, of another kind, or holds code, which is not run"
        raise WorkbookError(f"{path} cannot be read as a checkpoint: {reason}; give one written by this workbook") from None
    if not isinstance(content, dict) or not isinstance(content.get("spec"), dict) or not {"state_dict", "best"} & set(content):
        raise WorkbookError(f"{path} is not a checkpoint of this workbook (no 'spec' and weights in it); give another path")
    return content


def load_model(path, expect: str | None = None) -> nn.Module:
    """Rebuild a model, in eval mode, from a weights file, a training checkpoint (best epoch) or a run's folder.

    `expect` is the architecture the caller can use. Raises WorkbookError for another one, or unusable files.
    """
    path = Path(path)
    path = path / "best.pt" if path.is_dir() else path
    content = load_checkpoint(path)
    name = content["spec"].get("name", "nameless network")
    if expect and name != expect:
        raise WorkbookError(f"{path} holds a {name!r}, not a {expect!r}; set model={name!r} or give another checkpoint")
    model = build(**content["spec"])
    try:
        model.load_state_dict(content.get("state_dict") or content["best"]["state_dict"])
    except RuntimeError:
        raise WorkbookError(f"the weights in {path} do not fit the {name!r} it describes; give another checkpoint") from None
    return model.eval()


if __name__ == "__main__":
    from common.cli import main

    main()
