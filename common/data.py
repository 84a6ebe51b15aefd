"""What does a network see? Images as uint8 tensors: load, split, iterate."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import WorkbookError, choose, folder_from
from common.augment import mirror, normalise, parse_augment, take
from common.params import whole
from common.sources import KEYS, SPECS, Spec, cached, read_sample

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Images:
    """uint8 images (N, 3, 32, 32), channels last in memory, and their int64 labels (N,)."""

    x: Tensor
    y: Tensor

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return Images(self.x[index], self.y[index])

    def to(self, device):
        return Images(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Split:
    """Training, validation and test images of one data set."""

    train: Images
    val: Images
    test: Images
    spec: Spec
    class_names: tuple


def sha256(*tensors) -> str:
    """16 hex digits of the SHA-256 of tensors' values, one after the other."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().numpy())
    return sha.hexdigest()[:16]


def text_digest(text: str) -> str:
    return sha256(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))


def pixels(*parts: Images) -> str:
    """Digest of images, as they lie in memory: channels last."""
    return sha256(*(part.x.permute(0, 2, 3, 1) for part in parts))


def load(name: str = "cifar10", val: int | None = None, seed: int = 0, folder=None) -> Split:
    """Load a data set and hold out a class-balanced validation part of `val` training images.

    `folder` defaults to $CIFAR_DIR or `data/` in the repository. The sample comes split already.
    Raises WorkbookError for an unknown name, unusable files, or an illegal `val`.
    """
    spec = SPECS[choose("dataset", name, SPECS)]
    val = check_val(val, spec)
    if name == "cifar10-sample":
        arrays = read_sample()
        held = torch.arange(len(arrays["y_train"])) >= len(arrays["y_train"]) - val
    else:
        arrays = cached(name, Path(folder or folder_from("CIFAR_DIR", "data")))
        held = held_out(arrays["y_train"], val // spec.classes, seed)
    x, y, xt, yt = (torch.from_numpy(arrays[key]) for key in KEYS)
    train = Images(x.permute(0, 3, 1, 2), y.long())
    test = Images(xt.permute(0, 3, 1, 2), yt.long())
    numbered = [f"class {i}" for i in range(spec.classes)]
    names = arrays.get("classes", NAMES if spec.classes == 10 else numbered)
    names = (
        name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names
    )
    return Split(train[~held], train[held], test, spec, tuple(names))


def labels(name: str) -> Tensor:
    """Labels (N,), uint8, of the test images that recorded answers belong to; needs no images."""
    path = folder_from("REPORTS_DIR", "reports") / "runs" / f"{name}-labels.bin"
    spec = SPECS[choose("dataset", name, SPECS)]
    found = path.read_bytes() if path.is_file() else b""
    if len(found) != spec.counts[1] * spec.classes or max(found) >= spec.classes:
        raise WorkbookError(f"{path} is missing or damaged; restore it (git checkout)")
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)


def check_val(val: int | None, spec: Spec) -> int:
    """The number of validation images, by default the data set's; WorkbookError if not legal."""
    whole(1)("val", val := spec.default_val if val is None else val)
    n = spec.counts[0] * spec.classes
    if spec.name == "cifar10-sample" and val != spec.default_val:
        raise WorkbookError(f"val={val!r} is not legal; the sample has {spec.default_val}")
    if val % spec.classes or not 0 < val < n:
        legal = f"a multiple of {spec.classes} between {spec.classes} and {n - spec.classes}"
        raise WorkbookError(f"val={val!r} is not legal; give {legal}")
    return val


def all_training(split: Split) -> Split:
    """The split with its validation images among the training images: for a frozen recipe."""
    x, y = (torch.cat([getattr(part, key) for part in (split.train, split.val)]) for key in "xy")
    return Split(Images(x, y), split.val, split.test, split.spec, split.class_names)


def held_out(labels: np.ndarray, per_class: int, seed: int) -> Tensor:
    """Mask (N,): True for `per_class` images of every class, drawn by `seed`."""
    generator, labels = torch.Generator().manual_seed(seed), torch.from_numpy(labels)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        held[members[torch.randperm(len(members), generator=generator)[:per_class]]] = True
    return held


class Loader:
    """Batches of normalised, augmented images; each image exactly once an epoch.

    Yields (x float32 (B, 3, 32, 32) channels last, y int64 (B,)). Order and augmentation depend
    only on `seed` and `epoch`, so setting `epoch` is all it takes to resume. With `share` (rank,
    world), a process gets its part of every batch.
    """

    def __init__(self, images, spec, batch_size, augment=(), shuffle=True, seed=0, share=(0, 1)):
        # Channels last already, unless somebody made them: else each batch would copy them all.
        images = Images(images.x.contiguous(memory_format=torch.channels_last), images.y)
        self.images, self.spec, self.batch_size, self.shuffle = images, spec, batch_size, shuffle
        self.augment, self.seed, self.epoch = parse_augment(augment), seed, 0
        self.rank, self.world = share
        last = len(images) % batch_size or batch_size
        if shuffle and last < self.world:
            problem = f"leaves {last} of {len(images)} images for the last batch, too few for"
            raise WorkbookError(f"batch_size={batch_size} {problem} {self.world} processes")

    def __len__(self):
        return -(-len(self.images) // self.batch_size)

    def __iter__(self):
        n, device = len(self.images), self.images.x.device
        sides = torch.rand(n, generator=torch.Generator().manual_seed(self.seed)) < 0.5
        sides = (sides if self.epoch % 2 == 0 else ~sides).to(device)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        self.epoch += 1
        # The first batch's augmentation repeats the numbers that drew the order: another stream
        # would part every run from its record.
        generator.manual_seed(generator.initial_seed() * self.world + self.rank)
        for batch in order.split(self.batch_size):
            share = batch[self.rank :: self.world].to(device)
            x, y = take(self.images.x, share), self.images.y[share]
            for function, arguments in self.augment:
                x = function(x, generator, *arguments) if function else mirror(x, sides[share])
            yield normalise(x, self.spec), y
