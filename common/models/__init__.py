"""Networks by name. Each is built from `cfg`, one width per prune group, so a pruned network is just another `cfg`."""

from torch import nn

from common import WorkbookError, choose
from common.models import resnet, vgg
from common.models.groups import KINDS, Group

__all__ = ["KINDS", "MODELS", "Group", "build"]

MODELS = {**resnet.MODELS, **vgg.MODELS}


def build(name: str, **arguments) -> nn.Module:
    """Build a network: `build("vgg16", classes=10, cfg=None)`. It carries `spec`, from which it can be built again.

    Raises WorkbookError for an unknown name, unknown arguments or a `cfg` of the wrong length or with a width < 1.
    """
    choose("model", name, MODELS)
    try:
        model = MODELS[name](**arguments)
    except TypeError as error:
        raise WorkbookError(f"model {name!r} cannot be built: {str(error).split(') ')[-1]}") from None
    model.spec = {"name": name, **arguments, "cfg": model.cfg}
    return model
