"""Draw the embedded sample from all of CIFAR-10: `python -m tests.make_sample`.

The rule: with the split that seed 0 gives (45,000 training, 5,000 validation, 10,000 test images), take the
first 200 training, 50 validation and 100 test images of every class, in the data set's order. Training and
validation images stand in one sheet, validation images last, so a network trained on the 45,000 has not
seen the sample's validation part.
"""

import io
import json

import torch
from PIL import Image

from common import write_file
from common.data import Images, load
from common.sources import SAMPLE


def first(images: Images, per_class: int) -> Images:
    """The first `per_class` images of every class, in order."""
    index = torch.cat([(images.y == label).nonzero()[:per_class, 0] for label in images.y.unique()])
    return images[index.sort().values]


def main() -> None:
    full, labels = load("cifar10"), {}
    train, val, test = first(full.train, 200), first(full.val, 50), first(full.test, 100)
    parts = dict(train=Images(torch.cat([train.x, val.x]), torch.cat([train.y, val.y])), test=test)
    for name, images in parts.items():
        tiles = images.x.permute(0, 2, 3, 1).reshape(-1, 50, 32, 32, 3).permute(0, 2, 1, 3, 4)
        buffer = io.BytesIO()
        Image.fromarray(tiles.reshape(-1, 50 * 32, 3).numpy()).save(buffer, "WEBP", lossless=True, quality=100, method=6)
        write_file(SAMPLE / f"{name}.webp", buffer.getvalue())
        labels[name] = images.y.tolist()
    write_file(SAMPLE / "labels.json", json.dumps(labels))


if __name__ == "__main__":
    main()
