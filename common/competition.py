"""Somebody else's files: a pickled test set, whose code is not run; a picture; a submission."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common import WorkbookError, write_file

WANTED = 'give a pickled {b"data": uint8 array of shape (N, 32, 32, 3) or (N, 3072)}'


class Kind:
    """Stands in for numpy.dtype: plain numbers in this machine's byte order, nothing else."""

    def __init__(self, name, *_):
        self.dtype = np.dtype(name if isinstance(name, str) else name.decode())
        if self.dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"it asks for an array of {self.dtype}")

    def __setstate__(self, state):  # version, byte order, parts and fields, sizes, flags
        if state[1] not in ("<", "|", b"<", b"|") or state[2:5] != (None, None, None):
            raise pickle.UnpicklingError("it asks for numbers in another byte order, or with parts")


class Numbers:
    """Stands in for numpy.ndarray: `values` are copied from the file's bytes, by their length."""

    values = None

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        _, shape, kind, by_column, raw = state
        self.fill(raw, kind, shape, "F" if by_column else "C")

    def fill(self, raw, kind, shape, order):
        self.values = np.array(np.frombuffer(raw, kind.dtype).reshape(shape, order=order))
        return self


# What numpy 1 and 2 pickle arrays as, and what Python pickles bytes as.
STAND_INS = {("numpy", "ndarray"): Numbers, ("numpy", "dtype"): Kind}
STAND_INS["_codecs", "encode"] = lambda text, _: text.encode("latin1")
for core in ("numpy.core", "numpy._core"):
    STAND_INS[f"{core}.multiarray", "_reconstruct"] = Numbers
    STAND_INS[f"{core}.numeric", "_frombuffer"] = lambda *state: Numbers().fill(*state)
for module in ("builtins", "__builtin__"):
    STAND_INS[module, "bytes"] = STAND_INS[module, "bytearray"] = lambda value=b"": b"".join(
        [value]
    )


class ArraysOnly(pickle.Unpickler):
    """An unpickler that knows arrays of numbers and bytes by its own stand-ins, nothing else."""

    def find_class(self, module, name):
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return STAND_INS[module, name]


def read_images(path) -> tuple:
    """uint8 images (N, 3, 32, 32) and IDs of a pickle {b"data": uint8 array, b"ids": N numbers}.

    An image is 32×32×3 or a row of 3,072 values, channels first, as in CIFAR's own files. Without
    ids they are 0 to N − 1. Raises WorkbookError for a missing, damaged or hostile file, or another
    content.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise WorkbookError(f"test set {path} does not exist; {WANTED}")
    try:  # "bytes": keys as Python 2 wrote them
        content = ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise nearly anything
        reason = str(error) or type(error).__name__
        raise WorkbookError(f"{path} is not admitted ({reason}); {WANTED}") from None
    content = content if isinstance(content, dict) else {}
    found, ids = (content.get(key.encode(), content.get(key)) for key in ("data", "ids"))
    found, ids = (part.values if isinstance(part, Numbers) else part for part in (found, ids))
    shape, kind = getattr(found, "shape", ()), getattr(found, "dtype", type(found).__name__)
    if kind != np.uint8 or shape[1:] not in ((32, 32, 3), (3072,)) or not len(found):
        raise WorkbookError(f'{path} holds {kind} of shape {shape} under b"data"; {WANTED}')
    ids = range(len(found)) if ids is None else ids
    ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
    whole = isinstance(ids, (list, tuple, range)) and all(type(number) is int for number in ids)
    if not whole or len(ids) != len(found) or len(set(ids)) < len(ids):
        raise WorkbookError(f'{path} holds b"ids" that are not {len(found)} different numbers')
    if len(shape) == 2:
        found = found.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return torch.from_numpy(np.ascontiguousarray(found)).permute(0, 3, 1, 2), list(ids)


def read_picture(path) -> Tensor:
    """Any picture file as one uint8 image (1, 3, 32, 32): upright, on white, its middle square."""
    try:
        picture = ImageOps.exif_transpose(Image.open(Path(path).expanduser()))
        if picture.mode.startswith(("I", "F")):  # pillow would clip them at 255
            raise ValueError("more than 8 bits")
        picture = picture.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # a damaged PNG is a SyntaxError to pillow
        missing = isinstance(error, FileNotFoundError)
        advice = "give another path" if missing else "give a PNG, JPEG or WebP file of 8 bits"
        raise WorkbookError(f"{path} cannot be read as a picture ({error}); {advice}") from None
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    pixels = np.array(ImageOps.fit(picture, (32, 32), Image.Resampling.BOX))
    return torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)


def check_writable(path) -> None:
    """Raise WorkbookError now, before a long training, if `path` could not be written."""
    path, text = Path(path).expanduser(), str(path)
    if path.is_dir() or text.endswith(("/", "\\")):
        raise WorkbookError(f"{path} is a folder; give the name of a file, such as submission.csv")
    write_file(path.with_name(f"{path.name}.{os.getpid()}.probe"), "").unlink()


def write_submission(path, ids, labels) -> Path:
    """Write `ID,Labels` lines in the order of the images; returns the path."""
    lines = ["ID,Labels", *(f"{i},{int(label)}" for i, label in zip(ids, labels, strict=True))]
    return write_file(path, "\n".join(lines) + "\n")
