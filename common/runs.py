"""What does a run leave on disk, and how is it read back?

Two runs are the same if their identities are. One process at a time may write a run: the last that
claimed it. A manifest has an entry of `parts` for each time the run was begun or gone on with.
"""

import contextlib
import csv
import hashlib
import io
import json
import uuid
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
from torch import nn

from common import WorkbookError, folder_from, write_file
from common.config import TrainConfig, as_json
from common.data import Images, Split
from common.models import build

DIGESTS = ("pixels", "weights")  # not known of runs made before 2026-12


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
    """What makes two runs the same: config, network, its first weights, and the data.

    `sha256`: of the labels of both parts, which fix the split; `pixels`: of their images.
    """
    parts = split.train, split.val
    data = dict(name=split.spec.name, train=len(split.train), val=len(split.val))
    data |= dict(sha256=sha256(*(part.y.byte() for part in parts)), pixels=pixels(*parts))
    start = dict(weights=fingerprint(model))
    return dict(config=as_json(config), spec=as_json(model.spec), data=data, start=start)


def find_or_refuse(folder: Path, identity: dict) -> dict:
    """The state of the run in `folder`, or of one that has not begun.

    Raises WorkbookError if its settings are other ones, or its checkpoint cannot be read.
    """
    state = dict(history=[], best=None, seconds=0.0, finished=False, parts=[])
    if not (folder / "checkpoint.pt").exists():
        return state | identity
    state = dict(start={}) | load_checkpoint(folder / "checkpoint.pt")
    if "parts" not in state:
        before = dict(machines=[], epochs=len(state["history"]), seconds=state["seconds"])
        with contextlib.suppress(WorkbookError):  # a damaged manifest is written anew
            before["machines"] = [load_manifest(folder)["machine"]]
        state["parts"] = [before | {key: state.get(key, "?") for key in ("commit", "precision")}]
    state["config"] = as_json(TrainConfig()) | state["config"]  # older ones lack fields
    for part, wanted in identity.items():
        for key in {**state[part], **wanted}:
            old, new = state[part].get(key), wanted.get(key)
            if key in DIGESTS and old is None:
                print(f"{folder.name}: made before digests, so its {key} are not compared")
            elif old != new:
                problem = f"holds a run with {key}={old!r}, but {key}={new!r} was asked for"
                raise WorkbookError(f"{folder} {problem}; delete it or use another run name")
    return state


def claim(folder: Path) -> str:
    """Become the one process that may write a run; an earlier one stops when it saves next."""
    owner = uuid.uuid4().hex
    write_file(folder / "owner", owner)
    with locked(folder):  # a save that has begun ends first
        return owner


def owner_of(folder: Path) -> str | None:
    mark = folder / "owner"
    return mark.read_text() if mark.exists() else None


@contextlib.contextmanager
def locked(folder: Path):
    """One process at a time; the system lets go of it when that process dies."""
    lock = filelock.FileLock(folder / "lock", timeout=120, mode=0o666)
    try:
        lock.acquire()
    except filelock.Timeout:
        problem = "is held by a process that has stopped while it was saving"
        raise WorkbookError(f"{folder} {problem}; end that process") from None
    except (OSError, NotImplementedError) as error:
        advice = "make the folder writable, or choose another RUNS_DIR"
        raise WorkbookError(f"{folder} cannot be locked ({error}); {advice}") from None
    try:
        yield
    finally:
        lock.release()


def save_run(folder: Path, state: dict, owner: str) -> None:
    """Write history.csv, run.json, at the end best.pt; last checkpoint.pt: the epoch counts.

    Raises WorkbookError, and writes nothing, if another process has claimed the run.
    """
    best = {key: state["best"][key] for key in ("epoch", "val_accuracy")}
    manifest = dict(name=folder.name, epochs=len(state["history"]), best=best)
    manifest["machine"] = state["parts"][-1]["machines"][0]
    keys = "finished", "seconds", "config", "spec", "data", "start", "parts"
    manifest |= {key: state[key] for key in keys}
    for key in ("commit", "precision"):  # it may have gone on elsewhere
        names = ", ".join(part[key] for part in state["parts"]).split(", ")
        manifest[key] = ", ".join(dict.fromkeys(names))
    weights = dict(spec=state["spec"], state_dict=state["best"]["state_dict"])
    weights["meta"] = dict(run=folder.name, **best)
    with locked(folder):
        if owner_of(folder) != owner:
            raise WorkbookError(f"{folder} has another owner now, or is gone; this process stops")
        write_file(folder / "history.csv", csv_text(state["history"]))
        write_file(folder / "run.json", json.dumps(manifest, indent=1))
        if state["finished"]:
            write_file(folder / "best.pt", torch_bytes(weights))
        write_file(folder / "checkpoint.pt", torch_bytes(state))


def result(folder: Path, model: nn.Module, state: dict) -> Run:
    """The finished run, its best weights in `model`."""
    model.load_state_dict(state["best"]["state_dict"])
    return Run(model.eval(), state["history"], load_manifest(folder), folder)


def load_manifest(checkpoint) -> dict:
    """The manifest of a run's folder or a checkpoint: run.json there, or the .json of its name."""
    path = Path(checkpoint).expanduser()
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
    path = Path(path).expanduser()
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
    path = Path(path).expanduser()
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


def sha256(*tensors) -> str:
    """16 hex digits of the SHA-256 of tensors' values, one after the other."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().numpy())
    return sha.hexdigest()[:16]


def pixels(*parts: Images) -> str:
    """Digest of images, as they lie in memory: channels last."""
    return sha256(*(part.x.permute(0, 2, 3, 1) for part in parts))


def digest(model: nn.Module) -> str:
    """16 hex digits of the SHA-256 of all weights and their names: tells models apart."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def fingerprint(model: nn.Module) -> str:
    """Four digits of weighted sums of the trained weights, and of the squares of all else.

    Unlike a digest it does not see last bits and whitening's signs, in which machines differ.
    """
    state = {name: v.detach().cpu().double().flatten() for name, v in model.state_dict().items()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    flat = torch.cat([state.pop(name) for name in trained]) if trained else torch.zeros(3)
    waves = flat * torch.arange(len(flat), dtype=torch.float64).cos_()
    rest = sum(value.square().sum() for value in state.values())
    return " ".join(f"{float(value):.4g}" for value in (*map(torch.sum, waves.chunk(3)), rest))
