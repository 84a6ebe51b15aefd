"""Residual networks (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016) for 32×32 images."""

import torch
import torch.nn.functional as F
from torch import nn

from common.models.groups import Group, Prunable, widths


def conv(inputs, outputs, kernel, stride=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Block(nn.Module):
    """relu(f(x) + shortcut(x)), where f is a chain conv1-bn1-relu-conv2-bn2-(relu-…) with the given widths."""

    def __init__(self, channels, kernels, stride, shortcut, affine):
        super().__init__()
        self.depth = len(kernels)
        strided = kernels.index(3)  # the first 3×3 carries the stride
        for i, kernel in enumerate(kernels):
            setattr(self, f"conv{i + 1}", conv(channels[i], channels[i + 1], kernel, stride if i == strided else 1))
            setattr(self, f"bn{i + 1}", nn.BatchNorm2d(channels[i + 1]))
        self.shortcut = nn.Sequential()
        if shortcut:
            norm = nn.BatchNorm2d(channels[-1], affine=affine)
            self.shortcut = nn.Sequential(conv(channels[0], channels[-1], 1, stride), norm)

    def forward(self, x):
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            out = F.relu(out) if i < self.depth else F.relu(out + self.shortcut(x))
        return out


class ResNet(Prunable, nn.Module):
    """Stem, stages of blocks, average pooling, linear classifier; x (N, 3, 32, 32) → logits (N, classes).

    `cfg` holds one width per prune group in forward order: the stem's stream, then for every block the
    stream it opens (where its shortcut has a convolution) and its inner widths.
    `stem`: "plain" (3×3), "pool" (3×3, then max-pool to 16×16) or "whiten" (see `whiten_stem`). `affine`: whether
    shortcuts' BatchNorms have gamma and beta. `zero_last`: each block starts as its shortcut (Goyal et al. 2017).
    """

    def __init__(
        self, depths, planes, expansion=4, kernels=(1, 3, 1), stem="plain", affine=True, zero_last=False, cfg=None, classes=10
    ):
        super().__init__()
        plan, stream = [], planes[0]
        default = [stream]
        for stage, (depth, width) in enumerate(zip(depths, planes)):
            for i in range(depth):
                opens = stream != width * expansion or (i == 0 and stage > 0)
                stream = width * expansion
                default += [stream] * opens + [width] * (len(kernels) - 1)
                plan.append((2 if i == 0 and stage > 0 else 1, opens))
        self.cfg = widths(cfg, default)
        queue = iter(self.cfg)

        stream = next(queue)
        self.stem = stem
        self.whiten = nn.Conv2d(3, 24, 2) if stem == "whiten" else None
        self.conv1 = conv(24 if stem == "whiten" else 3, stream, 3)
        self.bn1 = nn.BatchNorm2d(stream)
        self.blocks = nn.ModuleList()
        groups = [dict(name="stem", out=["conv1"], norm=["bn1"], into=[], inner=False)]
        current = groups[0]
        for n, (stride, opens) in enumerate(plan):
            at, channels = f"blocks.{n}", [stream]
            current["into"].append(f"{at}.conv1")
            if opens:
                current["into"].append(f"{at}.shortcut.0")
                stream = next(queue)
                current = dict(name=f"{at}.stream", out=[f"{at}.shortcut.0"], norm=[f"{at}.shortcut.1"], into=[], inner=False)
                groups.append(current)
            for i in range(1, len(kernels)):
                channels.append(next(queue))
                groups.append(dict(name=f"{at}.bn{i}", out=[f"{at}.conv{i}"], norm=[f"{at}.bn{i}"], into=[f"{at}.conv{i + 1}"]))
            current["out"].append(f"{at}.conv{len(kernels)}")
            current["norm"].append(f"{at}.bn{len(kernels)}")
            self.blocks.append(Block(channels + [stream], kernels, stride, opens, affine))
        current["into"].append("fc")
        self.fc = nn.Linear(stream, classes)
        self._groups = [Group(**{k: tuple(v) if isinstance(v, list) else v for k, v in group.items()}) for group in groups]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for block in self.blocks:
            nn.init.constant_(getattr(block, f"bn{block.depth}").weight, 0.0 if zero_last else 1.0)
        if self.whiten:
            self.whiten.weight.requires_grad_(False)
            nn.init.zeros_(self.whiten.bias)

    def forward(self, x):
        if self.whiten:
            # Pooling before BatchNorm and ReLU gives the same maxima for gamma > 0 at a quarter of the cost.
            x = F.relu(self.bn1(F.max_pool2d(self.conv1(F.relu(self.whiten(x))), 2)))
        else:
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.max_pool2d(x, 3, 2, 1) if self.stem == "pool" else x
        for block in self.blocks:
            x = block(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))

    @torch.no_grad()
    def whiten_stem(self, x):
        """Set the fixed 2×2 stem filters to ± the whitening transform of the patches of x (N, 3, H, W), normalised.

        From airbench94 (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024): the eigenvectors of the
        patch covariance, each divided by the root of its eigenvalue, and their negatives (24 filters).
        """
        patches = x.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


def resnet50(cfg=None, classes=10):
    """Bottleneck [3, 4, 6, 3] after a 3×3 stem and a max-pool (some course material calls it "ResNet-56")."""
    return ResNet((3, 4, 6, 3), (64, 128, 256, 512), stem="pool", affine=False, cfg=cfg, classes=classes)


def resnet56(cfg=None, classes=10):
    """He et al.'s CIFAR ResNet-56 with bottlenecks: depth 9n + 2, n = 6."""
    return ResNet((6, 6, 6), (16, 32, 64), cfg=cfg, classes=classes)


def resnet18(cfg=None, classes=10, width=64):
    """Basic blocks [2, 2, 2, 2] after a 3×3 stem; `width` channels in the first stage."""
    return ResNet((2, 2, 2, 2), [width * 2**i for i in range(4)], expansion=1, kernels=(3, 3), cfg=cfg, classes=classes)


def resnet17(cfg=None, classes=10, width=64):
    """Lab 2's own network (not a published one): a whitened stem and bottlenecks [1, 2, 2] of expansion 2.

    17 learned layers: the stem, five bottlenecks of three convolutions, the classifier.
    """
    planes = [width, width * 2, width * 4]
    return ResNet((1, 2, 2), planes, expansion=2, stem="whiten", zero_last=True, cfg=cfg, classes=classes)


MODELS = {"resnet17": resnet17, "resnet18": resnet18, "resnet50": resnet50, "resnet56": resnet56}
