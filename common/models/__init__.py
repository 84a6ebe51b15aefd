"""Networks by name. Each is built from `cfg`, one width per prune group, so a pruned network is just another `cfg`."""

import inspect

import torch
from torch import Tensor, nn

from common import WorkbookError, choose, params
from common.models import fastnet, mobilenet, resnet, vgg
from common.models.groups import KINDS, Group, Whiten

__all__ = ["KINDS", "MODELS", "Group", "build", "fresh", "pytorch_init"]

MODELS = {**resnet.MODELS, **vgg.MODELS, **fastnet.MODELS, **mobilenet.MODELS}


def build(name: str, **arguments) -> nn.Module:
    """Build a network: `build("vgg16", classes=10, cfg=None)`. It carries `spec`, from which it can be built again.

    Raises WorkbookError for an unknown name, unknown arguments, an illegal `width`, or a `cfg` of the wrong length or
    with a width < 1.
    """
    choose("model", name, MODELS)
    width = inspect.signature(MODELS[name]).parameters.get("width")
    if width and "width" in arguments:  # channels, or a multiplier
        rule = params.whole(1) if isinstance(width.default, int) else params.number(1e-3)
        rule(f"width of {name}", arguments["width"])
    try:
        model = MODELS[name](**arguments)
    except (TypeError, ValueError) as error:
        raise WorkbookError(f"model {name!r} cannot be built: {str(error).split(') ')[-1]}") from None
    model.spec = {"name": name, **arguments, "cfg": model.cfg}
    return model


def fresh(name: str, seed: int, x: Tensor, **arguments) -> nn.Module:
    """`build` with first weights drawn by `seed`; a whitening layer is fitted to normalised images x (N, 3, H, W)."""
    torch.manual_seed(seed)
    model = build(name, **arguments)
    if getattr(model, "whiten", None):
        model.whiten.fit(x)
    return model


def pytorch_init(model: nn.Module) -> nn.Module:
    """Draw the weights of all convolutions anew as PyTorch does by default: uniform, of variance 1 / (3 fan-in)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, Whiten):
            module.reset_parameters()
    return model
