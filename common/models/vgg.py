"""VGG with BatchNorm (Simonyan & Zisserman 2015), as in network slimming (Liu et al. 2017)."""

from torch import nn

from common.models.groups import Group, Prunable, widths

POOL = "M"
START = (64, 64, POOL, 128, 128, POOL)
LAYOUT = {
    16: (*START, *[256] * 3, POOL, *[512] * 3, POOL, *[512] * 3),
    19: (*START, *[256] * 4, POOL, *[512] * 4, POOL, *[512] * 4),
}


class VGG(Prunable, nn.Module):
    """3×3 convolutions, BatchNorm, ReLU, four max-pools, mean, linear; `cfg`: a width a layer."""

    def __init__(self, depth, cfg=None, classes=10):
        super().__init__()
        self.cfg = widths(cfg, [width for width in LAYOUT[depth] if width != POOL])
        queue, layers, inputs, names = iter(self.cfg), [], 3, []
        for item in LAYOUT[depth]:
            if item == POOL:
                layers.append(nn.MaxPool2d(2))
                continue
            names.append(len(layers))
            outputs = next(queue)
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(inputs, classes)
        readers = [f"features.{i}" for i in names[1:]] + ["fc"]
        self._groups = []
        for i, reader in zip(names, readers):
            conv, norm = f"features.{i}", f"features.{i + 1}"
            self._groups.append(Group(conv, (conv,), (norm,), (reader,)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return self.fc(self.features(x))


def vgg16(cfg=None, classes=10):
    """13 convolutions and the classifier: 14.72 M parameters."""
    return VGG(16, cfg, classes)


def vgg19(cfg=None, classes=10):
    """16 convolutions and the classifier: 20.04 M parameters."""
    return VGG(19, cfg, classes)


MODELS = {"vgg16": vgg16, "vgg19": vgg19}
