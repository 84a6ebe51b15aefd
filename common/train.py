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
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm.auto import tqdm

from common import ROOT, WorkbookError, choose, slimming, write_file
from common.data import Images, Loader, Spec, Split, parse_augment
from common.models import build

OPTIMIZERS = ("sgd", "adam", "muon")
SCHEDULES = ("cosine", "linear", "steps", "constant")
TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run, saved with it. Two runs with equal configs, model and data are the same run."""

    epochs: int = 20
    batch_size: int = 128  # images a step
    optimizer: str = "sgd"  # "sgd" (Nesterov), "adam" (AdamW) or "muon" (convolutions; the rest with SGD)
    lr: float = 0.1  # peak learning rate
    lr_other: float = 0.1  # with "muon": peak learning rate of everything that is not a convolution
    lr_bias: float = 1.0  # learning rate of biases and betas, as a multiple of the others'
    momentum: float = 0.9
    weight_decay: float = 5e-4  # on weights only: not on gammas, betas and biases
    schedule: str = "cosine"
    warmup: float = 0.0  # epochs of linear warm-up
    milestones: tuple = (0.5, 0.75)  # with "steps": shares of the run after which lr falls tenfold
    label_smoothing: float = 0.0
    augment: tuple = ("flip", "crop:4")
    accumulate: int = 1  # pieces a batch is cut into, one backward pass each
    clip: float | None = None  # largest gradient norm
    precision: str = "auto"  # "auto", "no", "fp16", "bf16"; auto is "no" on a CPU
    patience: int | None = None  # epochs without a better validation accuracy before stopping
    lam: float = 0.0  # L1 strength on the gammas of the inner prune groups
    penalty: str = "subgradient"  # or "proximal"
    seed: int = 0
    init: str = "random"  # where the first weights come from: digest of a checkpoint's weights

    def __post_init__(self):
        choose("optimizer", self.optimizer, OPTIMIZERS)
        choose("schedule", self.schedule, SCHEDULES)
        choose("precision", self.precision, ("auto", "no", "fp16", "bf16"))
        choose("penalty", self.penalty, slimming.PENALTIES)
        parse_augment(self.augment)
        for name, low in dict(
            epochs=1, batch_size=1, accumulate=1, lr=0, lr_other=0, lr_bias=0, lam=0, weight_decay=0, warmup=0
        ).items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < math.inf:
                raise WorkbookError(f"{name}={value!r} is not legal; give a number of at least {low}")
        for name, high in dict(label_smoothing=1, momentum=1).items():
            if not 0 <= getattr(self, name) < high:
                raise WorkbookError(f"{name}={getattr(self, name)!r} is not legal; give a number from 0 to below {high}")


@dataclass
class Run:
    """A finished run: the model with its best weights, one history row an epoch, the manifest, its folder."""

    model: nn.Module
    history: list
    manifest: dict
    folder: Path


class Muon(torch.optim.Optimizer):
    """Muon for 4-D weights, SGD with Nesterov momentum for the rest.

    Each convolution's momentum is orthogonalised by Newton-Schulz iterations, and its weight is kept at norm
    sqrt(outputs), which assumes that a BatchNorm follows (Jordan et al., "Muon", 2024; airbench94_muon).
    """

    def __init__(self, groups, lr, momentum=0.6, weight_decay=0.0):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                grad = p.grad if p.ndim == 4 else p.grad.add(p, alpha=group["weight_decay"])
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(grad)
                update = grad.add(buffer, alpha=group["momentum"])
                if p.ndim == 4:
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
    """Four parameter groups: convolutions, other weights, gammas, biases and betas. Each keeps its peak lr in `peak`."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)}
    conv, other, gamma, bias = [], [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (
                conv if p.ndim == 4 else other if p.ndim > 1 else gamma if name.endswith("weight") and id(p) in norms else bias
            ).append(p)
    rest = config.lr_other if config.optimizer == "muon" else config.lr
    rows = (
        (conv, config.lr, config.weight_decay),
        (other, rest, config.weight_decay),
        (gamma, rest, 0),
        (bias, rest * config.lr_bias, 0),
    )
    groups = [dict(params=params, lr=lr, peak=lr, weight_decay=decay) for params, lr, decay in rows]
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


def fit(model: nn.Module, split: Split, config: TrainConfig, folder, on_grad=None, on_epoch=None, trackers=()) -> Run:
    """Train, resume or load: the run in `folder` is finished and returned, whatever state it is in.

    `on_grad(model)` is called between backward and optimizer step, `on_epoch(row)` after each validation (for
    epochs that are already done, at once).
    A checkpoint is written every epoch; a stopped run goes on from it with the same results, bit for bit on
    a CPU. Raises WorkbookError if the folder holds a run with other settings, or if the loss diverges.
    """
    folder = Path(folder)
    for tracker in trackers:
        if importlib.util.find_spec(choose("tracker", tracker, TRACKERS)) is None:
            raise WorkbookError(f"tracker {tracker!r} is not installed; run: pip install {tracker}")
    identity = dict(config=_plain(config), spec=_plain(model.spec), data=describe(split))
    saved = load_checkpoint(folder / "checkpoint.pt") if (folder / "checkpoint.pt").exists() else None
    if saved:
        refuse_other_settings(saved, identity, folder)
        if saved["finished"]:
            model.load_state_dict(saved["best"]["state_dict"])
            for row in saved["history"] if on_epoch else ():
                on_epoch(row)
            return Run(model.eval(), saved["history"], json.loads((folder / "run.json").read_text()), folder)

    keep_freed_memory()
    AcceleratorState._reset_state()  # otherwise a second run in one process could not choose another precision
    accelerator = Accelerator(
        mixed_precision=native_precision(config.precision), log_with=list(trackers) or None, project_dir=folder
    )
    if trackers:
        accelerator.init_trackers(folder.name, {k: str(v) for k, v in identity["config"].items()})
    share = dict(rank=accelerator.process_index, world=accelerator.num_processes)
    train, val = split.train.to(accelerator.device), split.val.to(accelerator.device)
    loader = Loader(train, split.spec, config.batch_size, config.augment, seed=config.seed, **share)
    model = model.to(memory_format=torch.channels_last)
    net, optimizer = accelerator.prepare(model, make_optimizer(model, config))
    history, best, first, spent, started_at = [], None, 0, 0.0, commit()
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if accelerator.scaler and saved["scaler"]:
            accelerator.scaler.load_state_dict(saved["scaler"])
        history, best, first, spent = saved["history"], saved["best"], len(saved["history"]), saved["seconds"]
        started_at = saved.get("commit", started_at)
        for row in history if on_epoch else ():
            on_epoch(row)
    total, warmup = config.epochs * len(loader), round(config.warmup * len(loader))
    gammas = slimming.gammas(model) if config.lam else []

    for epoch in range(first, config.epochs):
        started, loader.epoch = time.perf_counter(), epoch
        torch.manual_seed(config.seed * 1_000_003 + epoch)  # dropout depends on the epoch alone, so a resumed run repeats it
        sums = torch.zeros(4, device=accelerator.device)  # loss, correct, images, gradient norm
        net.train()
        bar = tqdm(
            loader, f"epoch {epoch + 1}/{config.epochs}", leave=False, disable=not accelerator.is_main_process, mininterval=2
        )
        for step, (x, y) in enumerate(bar, start=epoch * len(loader)):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * lr_factor(step, total, warmup, config.schedule, config.milestones)
            pieces = list(zip(x.chunk(config.accumulate), y.chunk(config.accumulate)))
            for i, (xs, ys) in enumerate(pieces):
                with accelerator.no_sync(net) if i + 1 < len(pieces) else contextlib.nullcontext():
                    logits = net(xs).float()
                    loss = F.cross_entropy(logits, ys, label_smoothing=config.label_smoothing, reduction="sum")
                    accelerator.backward(loss / len(x))
                sums[:3] += torch.stack([loss.detach(), (logits.argmax(1) == ys).sum(), torch.tensor(len(ys), device=x.device)])
            sums[3] += accelerator.clip_grad_norm_(net.parameters(), config.clip or math.inf)
            if config.penalty == "subgradient":
                slimming.add_subgradient(gammas, config.lam)
            if on_grad:
                on_grad(model)
            optimizer.step()
            if config.penalty == "proximal":
                slimming.shrink(gammas, config.lam * optimizer.param_groups[2]["lr"])
            optimizer.zero_grad()
        norm = sums[3].item() / len(loader)
        loss, correct, images, _ = accelerator.reduce(sums).tolist()
        if not math.isfinite(loss):
            raise WorkbookError(
                f"the loss became {loss} in epoch {epoch + 1}; lower lr={config.lr} or set clip=1.0 (earlier epochs are kept)"
            )
        scores = evaluate(net, val, split.spec, accelerator=accelerator)
        seconds = time.perf_counter() - started
        spent += seconds
        row = dict(epoch=epoch + 1, lr=optimizer.param_groups[0]["lr"], train_loss=loss / images, train_accuracy=correct / images)
        row |= {f"val_{k}": v for k, v in scores.items()} | dict(grad_norm=norm, seconds=seconds, images_per_s=images / seconds)
        history.append(row)
        if best is None or row["val_accuracy"] > best["val_accuracy"]:
            weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            best = dict(epoch=epoch + 1, val_accuracy=row["val_accuracy"], state_dict=weights)
        stop = config.patience is not None and epoch + 1 - best["epoch"] >= config.patience
        finished = stop or epoch + 1 == config.epochs
        if accelerator.is_main_process:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
            state = dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler, seconds=spent, commit=started_at
            )
            save(folder / "checkpoint.pt", {**identity, **state, "history": history, "best": best, "finished": finished})
            write_manifest(folder, identity, history, best, spent, finished, started_at, accelerator.device)
            print(
                f"{folder.name} epoch {epoch + 1:3d}/{config.epochs}  lr {row['lr']:.4f}  loss {row['train_loss']:.3f}  "
                f"train {row['train_accuracy']:.2%}  val {row['val_accuracy']:.2%}  {seconds:.0f} s",
                flush=True,
            )
        if trackers:
            accelerator.log({k: v for k, v in row.items() if k != "epoch"}, step=epoch + 1)
        if on_epoch:
            on_epoch(row)
        if stop:
            break
    if trackers:
        accelerator.end_training()
    accelerator.wait_for_everyone()
    manifest = json.loads((folder / "run.json").read_text())
    model = accelerator.unwrap_model(net, keep_fp32_wrapper=False).cpu()
    model.load_state_dict(best["state_dict"])
    if accelerator.is_main_process:
        save_model(folder / "best.pt", model, run=folder.name, epoch=best["epoch"], val_accuracy=best["val_accuracy"])
    return Run(model.eval(), history, manifest, folder)


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, spec: Spec, batch_size: int = 500, accelerator=None) -> dict:
    """Mean cross-entropy `loss` and `accuracy` (0..1, single view) of a model in eval mode."""
    share = dict(rank=accelerator.process_index, world=accelerator.num_processes) if accelerator else {}
    sums = torch.zeros(3, device=images.x.device)
    model.eval()
    for x, y in Loader(images, spec, batch_size, shuffle=False, **share):
        logits = model(x).float()
        loss = F.cross_entropy(logits, y, reduction="sum")
        sums += torch.stack([loss, (logits.argmax(1) == y).sum(), torch.tensor(len(y), device=x.device)])
    loss, correct, n = (accelerator.reduce(sums) if accelerator else sums).tolist()
    return dict(loss=loss / n, accuracy=correct / n)


def native_precision(precision: str) -> str:
    """Resolve "auto": bf16 where the GPU computes it natively (capability ≥ 8), fp16 on older ones, none elsewhere."""
    if precision != "auto":
        return precision
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory in the process: handing it back and faulting it in costs 10-20 % on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


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


def write_manifest(folder, identity, history, best, seconds, finished, commit, device) -> None:
    """Write `history.csv` and `run.json`: settings, data, commit at the start, machine, seconds, best epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, history[0])
    writer.writeheader()
    writer.writerows(history)
    write_file(folder / "history.csv", text.getvalue())
    manifest = dict(name=folder.name, finished=finished, epochs=len(history), seconds=round(seconds, 1), **identity)
    manifest |= dict(best={k: best[k] for k in ("epoch", "val_accuracy")}, commit=commit, machine=machine(device))
    write_file(folder / "run.json", json.dumps(manifest, indent=1))


def commit() -> str:
    """The commit of the checkout, with "+" where tracked files differ from it; "unknown" outside git."""
    git = lambda *words: subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine(device="cpu") -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    cpu = names[0] if names else platform.processor() or platform.machine()
    return dict(cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu, torch=torch.__version__)


def save(path, content: dict) -> Path:
    """torch.save to memory, then an atomic write, so that a full disk never costs the previous file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return write_file(path, buffer.getvalue())


def save_model(path, model: nn.Module, half: bool = False, **meta) -> Path:
    """Write deployable weights (no optimizer state); `half` stores them as float16 at half the size."""
    state = {
        k: v.detach().cpu().half() if half and v.is_floating_point() else v.detach().cpu() for k, v in model.state_dict().items()
    }
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
    except Exception as error:  # pickle, zip and runtime errors, by how the file is damaged
        reason = (
            "it holds code, which is not run" if "weights_only" in str(error).lower() else "it is truncated or of another kind"
        )
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
    name = content["spec"].get("name")
    if expect and name != expect:
        raise WorkbookError(f"{path} holds a {name!r}, not a {expect!r}; set model={name!r} or give another checkpoint")
    model = build(**content["spec"])
    try:
        model.load_state_dict(content.get("state_dict") or content["best"]["state_dict"])
    except RuntimeError:
        raise WorkbookError(f"the weights in {path} do not fit the {name!r} it describes; give another checkpoint") from None
    return model.eval()
