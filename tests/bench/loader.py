"""Images a second of `Loader` beside torchvision's DataLoader with PIL: `python -m tests.bench.loader`.

Both do padded random crop, flip, conversion to float and normalisation, in batches of 250, on images in memory.
The two take turns; the median of the rounds counts.
"""

import statistics
import time

import torch
from PIL import Image
from torchvision import transforms

from common.data import Images, Loader, load
from common.train import keep_freed_memory


class PilImages(torch.utils.data.Dataset):
    """The same images as PIL objects, transformed one by one."""

    def __init__(self, images, spec):
        self.images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images.x]
        self.labels = images.y.tolist()
        steps = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(spec.mean, spec.std)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


def images_per_second(batches, skip=2):
    """Throughput of an iterator after its first batches, which hold the start of worker processes."""
    count = 0
    for i, (x, _) in enumerate(batches):
        if i == skip:
            start = time.perf_counter()
        elif i > skip:
            count += len(x)
    return count / (time.perf_counter() - start)


def main(rounds=5):
    keep_freed_memory()  # as every training does
    split = load("cifar10-sample")
    repeat = lambda images, n: Images(
        images.x.repeat(n, 1, 1, 1).contiguous(memory_format=torch.channels_last), images.y.repeat(n)
    )
    tensors, pil = repeat(split.train, 25), PilImages(repeat(split.train, 10), split.spec)
    ours = Loader(tensors, split.spec, 250, ("flip", "crop:4"))
    theirs = torch.utils.data.DataLoader(pil, 250, shuffle=True, num_workers=2)
    rows = [(images_per_second(ours), images_per_second(theirs)) for _ in range(rounds)]
    a, b = (statistics.median(column) for column in zip(*rows))
    print(f"Loader {a:,.0f} images/s; DataLoader with PIL and 2 workers {b:,.0f} images/s; ratio {a / b:.1f}")


if __name__ == "__main__":
    main()
