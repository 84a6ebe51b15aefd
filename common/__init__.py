"""The workbench behind the notebooks: errors, atomic writing, paths from outside."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    found = "%d.%d" % sys.version_info[:2]  # noqa: UP031
    raise ImportError(f"the workbook needs Python 3.10 or newer; this is {found}")

import contextlib
import difflib
import os
import time
import uuid
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
ROOT = HOME if (HOME / "pyproject.toml").exists() else Path.cwd()  # or it was installed
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch is imported; on a Mac


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


@contextlib.contextmanager
def writing(path):
    """What goes wrong while a file is written becomes one line: a WorkbookError."""
    try:
        yield
    except OSError as error:
        advice = "free some space or make the folder writable"
        raise WorkbookError(f"cannot write {path} ({error.strerror}); {advice}") from None


def write_file(path, data: bytes | str) -> Path:
    """Write a file whole or not at all; raises WorkbookError where that fails.

    What a process that was killed left half-written is swept up a day later.
    """
    path = Path(path).expanduser()
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    with contextlib.suppress(OSError):  # another process may be as quick
        for left in path.parent.glob("*.partial"):
            if left.name.startswith(path.name) and time.time() - left.stat().st_mtime > 86_400:
                left.unlink()
    return path


@contextlib.contextmanager
def locked(folder: Path):
    """One process at a time; the system lets go of it when that process dies."""
    import filelock  # whoever only asks for a folder needs none

    lock = filelock.FileLock(folder / "lock", timeout=120, mode=0o666)
    try:
        lock.acquire()
    except filelock.Timeout:
        problem = "is held by a process that has stopped while it was saving"
        raise WorkbookError(f"{folder} {problem}; end that process") from None
    except (OSError, NotImplementedError) as error:
        advice = "make the folder writable, or choose another RUNS_DIR"
        raise WorkbookError(f"{folder} cannot be locked ({error}); {advice}") from None
    try:
        yield
    finally:
        lock.release()


def claim(folder: Path) -> str:
    """Become the one process that may write a run; an earlier one stops when it saves next."""
    owner = uuid.uuid4().hex
    write_file(folder / "owner", owner)
    with locked(folder):  # a save that has begun ends first
        return owner


def owner_of(folder: Path) -> str | None:
    mark = folder / "owner"
    return mark.read_text() if mark.exists() else None
