"""How is a network written to a file, and read back? Never with code in it."""

import copy
import io
import json
import zipfile
from pathlib import Path

import torch
from torch import nn

from common import WorkbookError, write_file
from common.models import build


def torch_bytes(content: dict) -> bytes:
    """What torch.save makes of it, in memory: a full disk then never costs the previous file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def halved(model: nn.Module) -> dict:
    """The weights by name, those of convolutions and linear layers in half precision.

    BatchNorm stays: gammas decide ranks, and running variances may not fit.
    """
    fits = {name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    return {k: v.half() if k.rpartition(".")[0] in fits else v for k, v in state.items()}


def rounded(model: nn.Module) -> nn.Module:
    """A copy that has the weights as a recorded run keeps them."""
    copied = copy.deepcopy(model)
    copied.load_state_dict(halved(model))
    return copied


def deployable(model: nn.Module, **meta) -> dict:
    """What a weights file holds: all but the optimizer's state."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    spec, meta = json.loads(json.dumps([model.spec, meta], default=lambda value: value.item()))
    return dict(spec=spec, state_dict=state, meta=meta)


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
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch does not look at checksums
                raise ValueError
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # pickle, zip and runtime errors, by how the file is damaged
        reason = "it is truncated, of another kind, or holds code, which is not run"
        advice = "restore it, or train again"
        raise WorkbookError(f"{path} cannot be read as a checkpoint: {reason}; {advice}") from None
    content = content if isinstance(content, dict) else {}
    spec, holder = content.get("spec"), content if "state_dict" in content else content.get("best")
    weights = holder.get("state_dict") if isinstance(holder, dict) else None
    if not isinstance(weights, dict) or not isinstance(spec, dict) or "name" not in spec:
        raise WorkbookError(f"{path} is not a checkpoint of this workbook; give another path")
    return content


def load_model(path, expect: str | None = None) -> nn.Module:
    """Rebuild a model, in eval mode, from a weights file or a checkpoint (best epoch).

    `expect`: the architecture the caller can use. Raises WorkbookError for another one, or
    unusable files.
    """
    content = load_checkpoint(path)
    name = content["spec"]["name"]
    if expect and name != expect:
        raise WorkbookError(f"{path} holds a {name!r}, not a {expect!r}; set model={name!r}")
    model = build(**content["spec"])
    try:
        model.load_state_dict(content.get("state_dict") or content["best"]["state_dict"])
    except (RuntimeError, AttributeError):  # of other names and shapes; of no tensors
        raise WorkbookError(f"the weights in {path} do not fit the {name!r} it names") from None
    return model.eval()
