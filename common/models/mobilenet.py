"""MobileNet v1 (Howard et al. 2017) for 32×32 images."""

from torch import nn

from common import WorkbookError, choose
from common.models.groups import Group, Prunable, widths

# (width of the pointwise convolution, stride of the depthwise one) of the 13 blocks
LAYOUT = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *[(512, 1)] * 5,
    *((1024, 2), (1024, 1)),
)
OTHERS = {"MultiheadAttention", "Threshold", "GLU"}  # not elementwise, as the next ones
OTHERS |= {"Softmin", "Softmax", "Softmax2d", "LogSoftmax"}
NAMES = [name for name in nn.modules.activation.__all__ if name not in OTHERS]
ACTIVATIONS = {name.lower(): getattr(nn, name) for name in NAMES}


class Block(nn.Module):
    """Depthwise 3×3 (conv1), pointwise 1×1 (conv2), each with BatchNorm and activation."""

    def __init__(self, inputs, outputs, stride, activation):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act = activation()

    def forward(self, x):
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))


class MobileNet(Prunable, nn.Module):
    """Stem, 13 depthwise-separable blocks, mean, linear; x (N, 3, 32, 32) → logits (N, classes).

    `cfg` holds 14 widths: the stem's and one a block (a depthwise convolution keeps its input's).
    The stem has a stride of 1, for small images; the paper's has 2, for 224 pixels.
    """

    def __init__(self, width, activation, activation_at, cfg, classes):
        super().__init__()
        if not isinstance(activation_at or {}, dict):
            way = "{'sigmoid': [4, 5]}"
            raise WorkbookError(f"activation_at={activation_at!r} must map names to blocks: {way}")
        names = [activation] * len(LAYOUT)
        for name, blocks in (activation_at or {}).items():
            for block in blocks:
                if block not in range(len(LAYOUT)):
                    last = len(LAYOUT) - 1
                    raise WorkbookError(f"block {block!r} is out of range; give 0 to {last}")
                names[block] = name
        names = [choose("activation", name, ACTIVATIONS) for name in [activation, *names]]
        acts = [ACTIVATIONS[name] for name in names]
        self.cfg = widths(cfg, [max(1, round(width * c)) for c in (32, *(c for c, _ in LAYOUT))])
        self.conv1 = nn.Conv2d(3, self.cfg[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.cfg[0])
        self.act = acts[0]()
        blocks = zip(self.cfg, self.cfg[1:], LAYOUT, acts[1:])
        self.layers = nn.ModuleList(Block(a, b, stride, act) for a, b, (_, stride), act in blocks)
        self.linear = nn.Linear(self.cfg[-1], classes)
        self._groups, out, norm = [], "conv1", "bn1"
        for n in range(len(LAYOUT)):
            at = f"layers.{n}"
            convs, norms = (out, f"{at}.conv1"), (norm, f"{at}.bn1")
            self._groups.append(Group(norm, convs, norms, (f"{at}.conv2",)))
            out, norm = f"{at}.conv2", f"{at}.bn2"
        self._groups.append(Group(norm, (out,), (norm,), ("linear",)))

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        for layer in self.layers:
            x = layer(x)
        return self.linear(x.mean((2, 3)))


def mobilenet(cfg=None, classes=10, width=1.0, activation="relu", activation_at=None):
    """46.4 M MACs, 3.3 M parameters for 100 classes at width 1.

    `activation` is any of torch's by name; `activation_at` gives some blocks another, as in
    {"sigmoid": [4, 5, 6]}.
    """
    return MobileNet(width, activation, activation_at, cfg, classes)


MODELS = {"mobilenet": mobilenet}
