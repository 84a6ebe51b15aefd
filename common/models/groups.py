"""What a network says about itself so that slimming can be written once, by layer name."""

from dataclasses import dataclass

from common import WorkbookError, choose

KINDS = ("inner", "coupled")


@dataclass(frozen=True)
class Group:
    """Layers that must lose the same channel together.

    `out`: convolutions sliced on dim 0, each followed by the BatchNorm at the same place in `norm`;
    `into`: the layers that read these channels, sliced on dim 1. `inner` is False for a residual stream.
    """

    name: str
    out: tuple
    norm: tuple
    into: tuple
    inner: bool = True


class Prunable:
    """Mixin: `groups(kind)` for a network that filled `self._groups`, in the order of `cfg`."""

    def groups(self, kind: str = "inner") -> list:
        """Prune groups: `inner` (widths inside a block only) or `coupled` (the residual streams as well)."""
        choose("kind of groups", kind, KINDS)
        return [group for group in self._groups if group.inner or kind == "coupled"]


def widths(cfg, default: list) -> list:
    """Check `cfg` against the network's default widths, which it replaces; None means the default."""
    if cfg is None:
        return list(default)
    if len(cfg) != len(default) or any(not isinstance(c, int) or c < 1 for c in cfg):
        raise WorkbookError(f"cfg must hold {len(default)} channel widths of at least 1; got {list(cfg)}")
    return list(cfg)
