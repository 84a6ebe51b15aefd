"""The workbench behind the notebooks: errors, atomic writing, paths from outside."""

import contextlib
import difflib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class WorkbookError(Exception):
    """A mistake a student can correct, in one line: what was wrong, what is legal, what to do."""


def choose(kind: str, value, legal):
    """Return `value` if it is in `legal`; else raise WorkbookError naming the nearest and all."""
    if not isinstance(value, str) or value not in legal:
        near = difflib.get_close_matches(str(value), legal, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        names = ", ".join(map(str, legal))
        raise WorkbookError(f"unknown {kind} {value!r}{hint}; choose one of: {names}")
    return value


def folder_from(variable: str, default: str) -> Path:
    """The folder that an environment variable names, or the default; relative to the repository."""
    return ROOT / Path(os.environ.get(variable) or default).expanduser()


def write_file(path, data: bytes | str) -> Path:
    """Write a file whole or not at all; raises WorkbookError where that fails."""
    path = Path(path).expanduser()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        advice = "free some space or make the folder writable"
        raise WorkbookError(f"cannot write {path} ({error.strerror}); {advice}") from None
    return path
