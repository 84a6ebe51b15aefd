"""What a network says about itself, so that slimming is written once, by name; shared parts."""

from dataclasses import dataclass

import torch
from torch import nn

from common import WorkbookError, choose

KINDS = ("inner", "coupled")


@dataclass(frozen=True)
class Group:
    """Layers that must lose the same channel together.

    `out`: convolutions sliced on dim 0, each followed by the BatchNorm at the same place in `norm`;
    `into`: the layers that read these channels, sliced on dim 1; `gates`: the layers that scale
    these channels without a BatchNorm, sliced on dim 0. `inner` is False for a residual stream.
    """

    name: str
    out: tuple
    norm: tuple
    into: tuple
    inner: bool = True
    gates: tuple = ()


class Prunable:
    """Mixin: `groups(kind)` for a network that filled `self._groups`, in the order of `cfg`."""

    def groups(self, kind: str | None = None) -> list:
        """Prune groups: `inner` (widths inside a block), `coupled` (residual streams), or all."""
        if kind is None:
            return list(self._groups)
        inner = choose("kind of groups", kind, KINDS) == "inner"
        return [group for group in self._groups if group.inner == inner]


def widths(cfg, default: list) -> list:
    """Check `cfg` against the default widths, which it replaces; None means the default."""
    if cfg is None:
        return list(default)
    if len(cfg) != len(default) or any(not isinstance(c, int) or c < 1 for c in cfg):
        legal = f"{len(default)} channel widths of at least 1"
        raise WorkbookError(f"cfg must hold {legal}; got {list(cfg)}")
    return list(cfg)


class Whiten(nn.Conv2d):
    """A fixed 2×2 convolution to 24 decorrelated channels; only its bias is trained.

    From airbench94 (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024).
    """

    def __init__(self):
        super().__init__(3, 24, 2)
        self.weight.requires_grad_(False)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def fit(self, x):
        """Set the filters from normalised images x (N, 3, H, W).

        They are the eigenvectors of the covariance of 2×2 patches, each divided by the root of its
        eigenvalue, and their negatives.
        """
        patches = x.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5)
        patches = patches.reshape(-1, 12).double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.weight.copy_(torch.cat([filters, -filters]))


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the means of all (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
