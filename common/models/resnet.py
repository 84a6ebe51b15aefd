"""Residual networks (He et al., "Deep Residual Learning", CVPR 2016) for 32×32 images."""

import torch.nn.functional as F
from torch import nn

from common.models.groups import Group, Prunable, SqueezeExcite, Whiten, widths


def conv(inputs, outputs, kernel, stride=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Block(nn.Module):
    """relu(f(x) + shortcut(x)), where f is a chain conv1-bn1-relu-conv2-bn2-(relu-…).

    `channels`: the block's input and the width of each convolution. With `se`, f ends in
    squeeze-and-excitation of that hidden width.
    """

    def __init__(self, channels, kernels, stride, shortcut, affine, se):
        super().__init__()
        self.depth, self.stride = len(kernels), stride
        strides = [1] * len(kernels)
        strides[kernels.index(3)] = stride  # the first 3×3 carries it; in the paper, a 1×1
        for i, kernel in enumerate(kernels):
            inputs, outputs = channels[i : i + 2]
            setattr(self, f"conv{i + 1}", conv(inputs, outputs, kernel, strides[i]))
            setattr(self, f"bn{i + 1}", nn.BatchNorm2d(outputs))
        self.shortcut = nn.Sequential()
        if shortcut:
            norm = nn.BatchNorm2d(channels[-1], affine=affine)
            self.shortcut = nn.Sequential(conv(channels[0], channels[-1], 1), norm)
        self.se = SqueezeExcite(channels[-1], se) if se else None

    def forward(self, x):
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            out = F.relu(out) if i < self.depth else out
        # A 1×1 convolution with a stride skips pixels. Leaving them out here is the same, without
        # oneDNN's fault 6035: its gradients of strided 1×1 weights are wrong, or crash, below 16
        # input channels.
        x = x[:, :, :: self.stride, :: self.stride]
        return F.relu((self.se(out) if self.se else out) + self.shortcut(x))


class ResNet(Prunable, nn.Module):
    """Stem, stages of blocks, mean, linear classifier; x (N, 3, 32, 32) → logits (N, classes).

    `cfg` holds one width per prune group in forward order: the stem's stream, then for every block
    the stream it opens (where its shortcut has a convolution) and its inner widths. `stem`: "plain"
    (3×3), "pool" (3×3, then max-pool to 16×16) or "whiten". `affine`: whether shortcuts' BatchNorms
    have gamma and beta. `zero_last`: each block starts as its shortcut (Goyal et al. 2017). `se`:
    reduction of squeeze-and-excitation in every block, 0 for none. `dropout`: before the
    classifier.
    """

    def __init__(
        self,
        depths,
        planes,
        expansion=4,
        kernels=(1, 3, 1),
        stem="plain",
        affine=True,
        zero_last=False,
        se=0,
        dropout=0.0,
        cfg=None,
        classes=10,
    ):
        super().__init__()
        default, plan = layout(depths, planes, expansion, len(kernels) - 1)
        self.cfg = widths(cfg, default)
        queue = iter(self.cfg)
        stream = next(queue)
        self.stem = stem
        self.whiten = Whiten() if stem == "whiten" else None
        self.conv1 = conv(24 if stem == "whiten" else 3, stream, 3)
        self.bn1 = nn.BatchNorm2d(stream)
        self.blocks = nn.ModuleList()
        for stride, opens, unpruned in plan:
            channels = [stream]
            stream = next(queue) if opens else stream
            channels += [next(queue) for _ in kernels[1:]] + [stream]
            hidden = se and max(1, unpruned // se)
            self.blocks.append(Block(channels, kernels, stride, opens, affine, hidden))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(stream, classes)
        self._groups = groups_of([opens for _, opens, _ in plan], len(kernels), bool(se))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not isinstance(module, Whiten):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for block in self.blocks:
            last = getattr(block, f"bn{block.depth}")
            nn.init.constant_(last.weight, 0.0 if zero_last else 1.0)

    def forward(self, x):
        if self.whiten:
            # Pooling before BatchNorm and ReLU gives the same maxima for gamma > 0 at a quarter of
            # the cost.
            x = F.relu(self.bn1(F.max_pool2d(self.conv1(F.relu(self.whiten(x))), 2)))
        else:
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.max_pool2d(x, 3, 2, 1) if self.stem == "pool" else x
        for block in self.blocks:
            x = block(x)
        return self.fc(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))


def layout(depths, planes, expansion, inner):
    """Default widths, and for every block (stride, whether it opens a stream, stream's width)."""
    stream, plan = planes[0], []
    default = [stream]
    for stage, (depth, width) in enumerate(zip(depths, planes)):
        for i in range(depth):
            first = i == 0 and stage > 0
            opens = first or stream != width * expansion
            stream = width * expansion
            default += [stream] * opens + [width] * inner
            plan.append((2 if first else 1, opens, stream))
    return default, plan


def groups_of(opens, depth, se):
    """The prune groups of a chain of blocks of `depth` convolutions, in the order of `cfg`."""
    stream = dict(name="stem", out=["conv1"], norm=["bn1"], into=[], gates=[])
    groups = [stream]
    for n, opened in enumerate(opens):
        at = f"blocks.{n}"
        stream["into"].append(f"{at}.conv1")
        if opened:
            stream["into"].append(f"{at}.shortcut.0")
            stream = dict(name=f"{at}.stream", into=[], gates=[])
            stream |= dict(out=[f"{at}.shortcut.0"], norm=[f"{at}.shortcut.1"])
            groups.append(stream)
        for i in range(1, depth):
            one = dict(out=[f"{at}.conv{i}"], norm=[f"{at}.bn{i}"], into=[f"{at}.conv{i + 1}"])
            groups.append(dict(name=f"{at}.bn{i}", **one))
        stream["out"].append(f"{at}.conv{depth}")
        stream["norm"].append(f"{at}.bn{depth}")
        if se:
            stream["into"].append(f"{at}.se.squeeze")
            stream["gates"].append(f"{at}.se.excite")
    stream["into"].append("fc")
    made = []
    for group in groups:
        lists = {key: tuple(value) for key, value in group.items() if key != "name"}
        made.append(Group(group["name"], **lists, inner="gates" not in group))
    return made


def resnet50(cfg=None, classes=10):
    """Bottleneck [3, 4, 6, 3], 3×3 stem and max-pool (some courses call it "ResNet-56").

    As in such a course, the BatchNorms of its shortcuts have no gamma and beta; the paper's have.
    """
    planes = (64, 128, 256, 512)
    return ResNet((3, 4, 6, 3), planes, stem="pool", affine=False, cfg=cfg, classes=classes)


def resnet56(cfg=None, classes=10):
    """Bottlenecks [6, 6, 6], 9n + 2 layers, 0.59 M parameters.

    He et al.'s ResNet-56 for CIFAR has 6n + 2 layers, of basic blocks: 0.85 M.
    """
    return ResNet((6, 6, 6), (16, 32, 64), cfg=cfg, classes=classes)


def resnet18(cfg=None, classes=10, width=64, dropout=0.0):
    """Basic blocks [2, 2, 2, 2] after a 3×3 stem; `width` channels in the first stage."""
    planes = [width * 2**i for i in range(4)]
    options = dict(dropout=dropout, cfg=cfg, classes=classes)
    return ResNet((2, 2, 2, 2), planes, expansion=1, kernels=(3, 3), **options)


def seresnet44(cfg=None, classes=10, width=32, se=64, dropout=0.0):
    """Bottlenecks [2, 4, 6, 2], half ResNet-50's width, squeeze-and-excitation before the sum.

    Its reduction is 64, that of Hu et al. (CVPR 2018) 16.
    """
    planes = [width * 2**i for i in range(4)]
    return ResNet((2, 4, 6, 2), planes, se=se, dropout=dropout, cfg=cfg, classes=classes)


def resnet17(cfg=None, classes=10, width=64):
    """Lab 2's own network (not a published one): a whitened stem, bottlenecks of expansion 2.

    17 learned layers: the stem, five bottlenecks [1, 2, 2] of three convolutions, the classifier.
    """
    options = dict(expansion=2, stem="whiten", zero_last=True, cfg=cfg, classes=classes)
    return ResNet((1, 2, 2), [width, width * 2, width * 4], **options)


MODELS = {
    "resnet17": resnet17,
    "resnet18": resnet18,
    "seresnet44": seresnet44,
    "resnet50": resnet50,
    "resnet56": resnet56,
}
