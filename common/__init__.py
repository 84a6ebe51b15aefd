"""The workbench behind the CIFAR Workbook's notebooks."""

import contextlib
import difflib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class WorkbookError(Exception):
    """A mistake a student can correct: one line saying what was wrong, what is legal, what to do."""


def choose(kind: str, value, legal):
    """Return `value` if it is in `legal`; otherwise raise WorkbookError naming the nearest and all legal values."""
    if not isinstance(value, str) or value not in legal:
        near = difflib.get_close_matches(str(value), legal, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise WorkbookError(f"unknown {kind} {value!r}{hint}; choose one of: {', '.join(map(str, legal))}")
    return value


def write_file(path, data: bytes | str) -> Path:
    """Write a file so that it is either whole or as it was before; raises WorkbookError where that fails."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise WorkbookError(f"cannot write {path} ({error.strerror}); free some space or make the folder writable") from None
    return path
