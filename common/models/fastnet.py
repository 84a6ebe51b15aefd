"""After airbench (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024)."""

import torch.nn.functional as F
from torch import nn

from common import WorkbookError
from common.models.groups import Group, Prunable, SqueezeExcite, Whiten, widths


class Stage(nn.Module):
    """conv1 – max-pool – bn1 – gelu, then conv – bn – gelu each; with three, a shortcut."""

    def __init__(self, inputs, channels, hidden):
        super().__init__()
        self.depth = len(channels)
        for i, (before, width) in enumerate(zip([inputs, *channels], channels), 1):
            conv = nn.Conv2d(before, width, 3, padding=1, bias=False)
            if width >= before:
                # the first filters start by handing their input on; not where a stage is narrower
                nn.init.dirac_(conv.weight.data[:before])
            setattr(self, f"conv{i}", conv)
            # The network changes fast: statistics of a few steps, so a momentum of 0.4, not 0.1.
            setattr(self, f"bn{i}", nn.BatchNorm2d(width, eps=1e-12, momentum=0.4))
        self.se = SqueezeExcite(channels[-1], hidden) if hidden else None

    def forward(self, x):
        x = first = F.gelu(self.bn1(F.max_pool2d(self.conv1(x), 2)))
        for i in range(2, self.depth + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            x = F.gelu(x + first if i == 3 else x)
        return self.se(x) if self.se else x


class FastNet(Prunable, nn.Module):
    """Whitening, three stages, max-pool, linear; x (N, 3, H, W), H, W ≥ 19 → logits (N, classes).

    `cfg` holds the widths of conv1 and conv2 of every stage (with `depth` 3, conv3 shares conv1's
    channels). `gammas`: whether BatchNorm scales are trained (airbench fixes them at 1; slimming
    needs them). `se`: reduction of squeeze-and-excitation at the end of each stage, 0 for none.
    `dropout`: before the classifier.
    """

    def __init__(self, stages, depth, gammas, se, dropout, cfg, classes):
        super().__init__()
        self.cfg = widths(cfg, [width for width in stages for _ in range(2)])
        self.whiten, inputs = Whiten(), 24
        self.stages, self._groups = nn.ModuleList(), []
        for n, (outer, inner) in enumerate(zip(self.cfg[::2], self.cfg[1::2])):
            at, last = f"stages.{n}", n + 1 == len(stages)
            hidden = se and max(1, stages[n] // se)
            self.stages.append(Stage(inputs, [outer, inner, outer][:depth], hidden))
            following = ("head" if last else f"stages.{n + 1}.conv1",)
            gates = (f"{at}.se.excite",) if se else ()
            if se:
                following += (f"{at}.se.squeeze",)
            one = dict(out=(f"{at}.conv1",), norm=(f"{at}.bn1",), into=(f"{at}.conv2",))
            two = dict(out=(f"{at}.conv2",), norm=(f"{at}.bn2",), into=following, gates=gates)
            inputs = inner
            if depth == 3:  # conv3 adds to conv1's channels, and they go on
                one = dict(out=(*one["out"], f"{at}.conv3"), norm=(*one["norm"], f"{at}.bn3"))
                one |= dict(into=(f"{at}.conv2", *following), gates=gates, inner=False)
                two |= dict(into=(f"{at}.conv3",), gates=())
                inputs = outer
            self._groups += [Group(f"{at}.bn1", **one), Group(f"{at}.bn2", **two)]
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(inputs, classes, bias=False)
        for module in self.stages.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.requires_grad_(gammas)

    def forward(self, x):
        x = F.gelu(self.whiten(x))
        for stage in self.stages:
            x = stage(x)
        # small logits at the start; the classifier learns at a high rate
        return self.head(self.dropout(x.amax((2, 3)))) / 9


def fastnet(cfg=None, classes=10, width=64, depth=2, gammas=False, se=0, dropout=0.0):
    """airbench94's shape at the defaults: 118 M MACs; stages of `width`, 4·`width`, 4·`width`."""
    if depth not in (2, 3):
        raise WorkbookError(f"depth={depth!r} is not legal; give 2 or 3 convolutions a stage")
    return FastNet((width, 4 * width, 4 * width), depth, gammas, se, dropout, cfg, classes)


MODELS = {"fastnet": fastnet}
