"""The networks by name, built from `cfg`, one width a prune group: pruned, it is another `cfg`."""

import inspect

import torch
from torch import Tensor, nn

from common import WorkbookError, choose, params
from common.models import fastnet, mobilenet, resnet, vgg
from common.models.groups import KINDS, Group, Whiten

__all__ = ["KINDS", "MODELS", "Group", "arguments_of", "build", "fresh", "pytorch_init"]

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
        model.whiten.fit(x)
    return model


def pytorch_init(model: nn.Module) -> nn.Module:
    """Draw convolutions anew as PyTorch does by default: uniform, of variance 1 / (3 fan-in)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, Whiten):
            module.reset_parameters()
    return model
