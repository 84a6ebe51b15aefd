"""What does a run leave on disk, and how is it read back? On which machine did it run?"""

import csv
import ctypes
import functools
import hashlib
import io
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from torch import nn

from common import ROOT, WorkbookError, folder_from, write_file
from common.config import TrainConfig, as_json
from common.data import Split
from common.models import build


@dataclass
class Run:
    """A finished run: model with its best weights, a history row an epoch, manifest, folder."""

    model: nn.Module
    history: list
    manifest: dict
    folder: Path


def folder(name: str = "") -> Path:
    """Where a run is kept: `$RUNS_DIR/<name>`, by default in `runs/` of the repository."""
    return folder_from("RUNS_DIR", "runs") / name


def identity(model: nn.Module, split: Split, config: TrainConfig) -> dict:
    """What makes two runs the same: config, network, and the data's name, sizes and fingerprint.

    The fingerprint is that of the labels of both parts, which fix the split.
    """
    labels = torch.cat([split.train.y, split.val.y]).to(torch.uint8).cpu().numpy().tobytes()
    data = dict(name=split.spec.name, train=len(split.train), val=len(split.val))
    data["sha256"] = hashlib.sha256(labels).hexdigest()[:16]
    return dict(config=as_json(config), spec=as_json(model.spec), data=data)


def find_or_refuse(folder: Path, identity: dict) -> dict:
    """The state of the run in `folder`, or of one that has not begun.

    Raises WorkbookError if its settings are other ones, or its checkpoint cannot be read.
    """
    state = dict(history=[], best=None, seconds=0.0, finished=False)
    if not (folder / "checkpoint.pt").exists():
        return state | identity
    state = load_checkpoint(folder / "checkpoint.pt")
    state["config"] = as_json(TrainConfig()) | state["config"]  # older ones lack fields
    for part, wanted in identity.items():
        for key in {**state[part], **wanted}:
            old, new = state[part].get(key), wanted.get(key)
            if old != new:
                problem = f"holds a run with {key}={old!r}, but {key}={new!r} was asked for"
                raise WorkbookError(f"{folder} {problem}; delete it or use another run name")
    return state


def save_run(folder: Path, state: dict, device="cpu") -> None:
    """Write history.csv, run.json, at the end best.pt; last checkpoint.pt: the epoch counts."""
    best = {key: state["best"][key] for key in ("epoch", "val_accuracy")}
    manifest = dict(name=folder.name, epochs=len(state["history"]), best=best)
    manifest["machine"] = machine(device)
    for key in ("finished", "seconds", "commit", "precision", "config", "spec", "data"):
        manifest[key] = state[key]
    write_file(folder / "history.csv", csv_text(state["history"]))
    write_file(folder / "run.json", json.dumps(manifest, indent=1))
    if state["finished"]:
        weights = dict(spec=state["spec"], state_dict=state["best"]["state_dict"])
        weights["meta"] = dict(run=folder.name, **best)
        write_file(folder / "best.pt", torch_bytes(weights))
    write_file(folder / "checkpoint.pt", torch_bytes(state))


def result(folder: Path, model: nn.Module, state: dict) -> Run:
    """The finished run, its best weights in `model`."""
    model.load_state_dict(state["best"]["state_dict"])
    return Run(model.eval(), state["history"], load_manifest(folder), folder)


def load_manifest(checkpoint) -> dict:
    """The manifest of a run's folder or a checkpoint: run.json there, or the .json of its name."""
    path = Path(checkpoint)
    beside = [path.with_suffix(".json"), path.parent / "run.json"]
    for place in [path / "run.json"] if path.is_dir() else beside:
        if place.is_file():
            try:
                return json.loads(place.read_text())
            except ValueError:
                raise WorkbookError(f"{place} is damaged; restore it, or train again") from None
    raise WorkbookError(f"no manifest beside {path}; restore its run.json, or train again")


def save_result(folder, **results) -> dict:
    """Add results to a run's manifest, as in `test={"accuracy": 0.91}`; returns the manifest."""
    manifest = load_manifest(folder) | results
    write_file(Path(folder) / "run.json", json.dumps(manifest, indent=1))
    return manifest


def csv_text(history: list) -> str:
    """History rows as CSV with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, history[0])
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


def commit() -> str:
    """The commit of the checkout, "+" where tracked files but reports differ; or "unknown"."""
    git = ["git", "-C", str(ROOT)]
    changes = ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/reports"]
    ask = functools.partial(subprocess.check_output, text=True, stderr=subprocess.DEVNULL)
    try:
        head = ask([*git, "rev-parse", "--short=12", "HEAD"]).strip()
        return head + "+" * bool(ask([*git, *changes]))
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine(device="cpu") -> dict:
    """Names of processor and GPU, vector instructions, cores, processes, threads, torch version."""
    info, kind = Path("/proc/cpuinfo"), torch.device(device).type
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return dict(
        cpu=named[1] if named else platform.processor() or platform.machine(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        gpu=torch.cuda.get_device_name(device) if kind == "cuda" else {"cpu": None}.get(kind, kind),
        torch=torch.__version__,
        cores=os.cpu_count(),
        processes=PartialState().num_processes,
        threads=torch.get_num_threads(),
    )


def idle_cores(seconds: float = 0.5) -> float:
    """Cores that no other process uses, as a mean over some time."""
    own = psutil.Process()
    own.cpu_percent()
    idle = psutil.cpu_count() * (1 - psutil.cpu_percent(interval=seconds) / 100)
    return idle + own.cpu_percent() / 100


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory: handing it back and faulting it in costs 10-20 % on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD, which some versions allow up to 32 MB; M_TRIM_THRESHOLD
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):
            libc.mallopt(-1, 2**31 - 1)


def torch_bytes(content: dict) -> bytes:
    """What torch.save makes of it, in memory: a full disk then never costs the previous file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def deployable(model: nn.Module, **meta) -> dict:
    """What a weights file holds: all but the optimizer's state."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    return dict(spec=as_json(model.spec), state_dict=state, meta=meta)


def save_model(path, model: nn.Module, **meta) -> Path:
    """Write deployable weights, from which `load_model` rebuilds the model."""
    return write_file(path, torch_bytes(deployable(model, **meta)))


def load_checkpoint(path) -> dict:
    """Read a training checkpoint or a weights file; never executes code from it.

    Raises WorkbookError if it is missing, truncated, not a checkpoint, or holds pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise WorkbookError(f"checkpoint {path} does not exist; train it or give another path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # pickle, zip and runtime errors, by how the file is damaged
        reason = "it is truncated, of another kind, or holds code, which is not run"
        raise WorkbookError(f"{path} cannot be read as a checkpoint: {reason}") from None
    weights = isinstance(content, dict) and {"state_dict", "best"} & set(content)
    if not weights or not isinstance(content.get("spec"), dict):
        raise WorkbookError(f"{path} is not a checkpoint of this workbook; give another path")
    return content


def load_model(path, expect: str | None = None) -> nn.Module:
    """Rebuild a model, in eval mode, from weights, a checkpoint (best epoch) or a run's folder.

    `expect`: the architecture the caller can use. Raises WorkbookError for another one, or
    unusable files.
    """
    path = Path(path)
    path = path / "best.pt" if path.is_dir() else path
    content = load_checkpoint(path)
    name = content["spec"].get("name", "nameless network")
    if expect and name != expect:
        raise WorkbookError(f"{path} holds a {name!r}, not a {expect!r}; set model={name!r}")
    model = build(**content["spec"])
    try:
        model.load_state_dict(content.get("state_dict") or content["best"]["state_dict"])
    except RuntimeError:
        raise WorkbookError(f"the weights in {path} do not fit the {name!r} it names") from None
    return model.eval()


def digest(model: nn.Module) -> str:
    """16 hex digits of the SHA-256 of all weights: names where a run started from."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
