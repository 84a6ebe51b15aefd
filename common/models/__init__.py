"""The networks by name, built from `cfg`, one width a prune group: pruned, it is another `cfg`."""

import hashlib
import inspect

import torch
from torch import Tensor, nn

from common import WorkbookError, choose, params
from common.models import fastnet, mobilenet, resnet, vgg
from common.models.groups import KINDS, Group, Whiten

__all__ = [
    "KINDS",
    "MODELS",
    "Group",
    "arguments_of",
    "build",
    "digest",
    "fingerprint",
    "fresh",
    "pytorch_init",
]

MODELS = {**resnet.MODELS, **vgg.MODELS, **fastnet.MODELS, **mobilenet.MODELS}


def arguments_of(name: str) -> dict:
    """What a network by name takes besides `cfg` and `classes`, with its default."""
    signature = inspect.signature(MODELS[choose("model", name, MODELS)])
    own = {key: argument.default for key, argument in signature.parameters.items()}
    return {key: default for key, default in own.items() if key not in ("cfg", "classes")}


def build(name: str, **arguments) -> nn.Module:
    """Build a network: `build("vgg16", classes=10, cfg=None)`; its `spec` builds it again.

    Raises WorkbookError for an unknown name, unknown arguments, an illegal `width`, or a `cfg` of
    the wrong length or with a width < 1.
    """
    width = arguments_of(name).get("width")
    if width and "width" in arguments:  # channels, or a multiplier
        rule = params.whole(1) if isinstance(width, int) else params.number(1e-3)
        rule(f"width of {name}", arguments["width"])
    try:
        model = MODELS[name](**arguments)
    except (TypeError, ValueError) as error:
        reason = str(error).split(") ")[-1]
        raise WorkbookError(f"model {name!r} cannot be built: {reason}") from None
    model.spec = {"name": name, **arguments, "cfg": model.cfg}
    return model


def fresh(name: str, seed: int, x: Tensor, **arguments) -> nn.Module:
    """`build` with weights drawn by `seed`; whitening is fitted to normalised x (N, 3, H, W)."""
    torch.manual_seed(seed)
    model = build(name, **arguments)
    if getattr(model, "whiten", None):
        if not len(x):
            raise WorkbookError(f"{name!r} is whitened, but x holds no images; give some thousand")
        model.whiten.fit(x)
    return model


def pytorch_init(model: nn.Module) -> nn.Module:
    """Draw convolutions anew as PyTorch does by default: uniform, of variance 1 / (3 fan-in)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, Whiten):
            module.reset_parameters()
    return model


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
