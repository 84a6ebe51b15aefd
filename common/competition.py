"""A competition's files: read a pickled set of unlabelled images without running its code, write a submission."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import WorkbookError, write_file

# What numpy's arrays are pickled as, by numpy 1 and 2, and harmless builtin types; everything else is refused.
SAFE = {
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    ("_codecs", "encode"),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray", "complex", "set", "slice")),
}


class ArraysOnly(pickle.Unpickler):
    """An unpickler that knows numpy arrays and plain builtin types, and refuses every other name."""

    def find_class(self, module, name):
        if (module, name) not in SAFE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_images(path) -> Tensor:
    """uint8 images (N, 3, 32, 32) from a pickle of {b"data": array (N, 32, 32, 3) uint8}, N ≥ 1.

    Never runs code from the file. Raises WorkbookError for a missing, damaged or hostile file, or another content.
    """
    path, wanted = Path(path), 'give a pickled {b"data": uint8 array of shape (N, 32, 32, 3)}'
    if not path.is_file():
        raise WorkbookError(f"test set {path} does not exist; {wanted}")
    try:
        content = ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()  # bytes: keys written by Python 2
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise WorkbookError(f"{path} is not admitted ({error or type(error).__name__}); {wanted}") from None
    found = content.get(b"data", content.get("data")) if isinstance(content, dict) else None
    if not isinstance(found, np.ndarray) or found.dtype != np.uint8 or found.shape[1:] != (32, 32, 3) or not len(found):
        what = f"{found.dtype} of shape {found.shape}" if isinstance(found, np.ndarray) else "no array"
        raise WorkbookError(f'{path} holds {what} under b"data"; {wanted}')
    return torch.from_numpy(np.ascontiguousarray(found)).permute(0, 3, 1, 2)


def check_writable(path) -> None:
    """Raise WorkbookError now, before a long training, if `write_submission` could not write `path`."""
    path, text = Path(path), str(path)
    if path.is_dir() or text.endswith(("/", "\\")):
        raise WorkbookError(f"submission {path} is a folder; give the name of a file, such as submission.csv")
    write_file(path.with_name(f"{path.name}.{os.getpid()}.probe"), "").unlink()


def write_submission(path, labels) -> Path:
    """Write `ID,Labels` lines, IDs counted from 0 in the order of the images; returns the path."""
    lines = ["ID,Labels", *(f"{number},{int(label)}" for number, label in enumerate(labels))]
    return write_file(path, "\n".join(lines) + "\n")
