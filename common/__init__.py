"""The workbench behind the notebooks: errors, atomic writing, paths from outside.

Of the standard library only: a notebook's first cell calls `enter` before anything is installed.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    found = "%d.%d" % sys.version_info[:2]  # noqa: UP031
    raise ImportError(f"the workbook needs Python 3.10 or newer; this is {found}")

import contextlib
import difflib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
ROOT = HOME if (HOME / "pyproject.toml").exists() else Path.cwd()  # or it was installed
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch is imported; on a Mac
MODULES = {"pillow": "PIL", "pyyaml": "yaml"}  # where a package's name is not its module's
TOOLS = {"jupyterlab", "nbval", "papermill"}  # what no lesson imports


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
        raise WorkbookError(f"cannot write {path} ({error.strerror or error}); {advice}") from None


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


def enter(homes: list, source: str = "") -> None:
    """What a notebook does first: say which workbook it uses; see that what it needs is here.

    `source`: where the notebook would have cloned it, as in "--branch v1.0 https://…".

    On Colab, what is missing is installed, and nothing that is there is changed. Elsewhere a
    WorkbookError says how to install it.
    """
    if not homes:
        print(f"The workbook was cloned to {HOME}.")
    others = {os.path.realpath(home) for home in homes} - {str(HOME)}
    if others:
        print(f"This is the workbook in {HOME}; not used: {', '.join(sorted(others))}.")
    release = re.match(r"--branch (\S+)", source)
    project = HOME / "pyproject.toml"
    told = project.read_text(encoding="utf-8") if project.exists() else ""
    if release and told and f'/tree/{release[1]}"' not in told:
        print(f"This lesson is of release {release[1]}, the workbook in {HOME} of another one.")
    colab = importlib.util.find_spec("google") and importlib.util.find_spec("google.colab")
    if lacking := missing():
        if not colab:
            names = ", ".join(lacking)
            raise WorkbookError(f"not installed: {names}; in a terminal: {install_command()}")
        install(lacking)
    if colab:
        print(colab_advice())


def requirements() -> dict:
    """Name → line of requirements.txt, such as "torch>=2.9"; empty where common was installed."""
    file = HOME / "requirements.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {re.split("[>=]", line)[0]: line for line in lines if line[:1].isalpha()}


def missing() -> dict:
    """Name → line of what a lesson needs and would not find."""
    needed = {name: line for name, line in requirements().items() if name not in TOOLS}
    found = {name: importlib.util.find_spec(MODULES.get(name, name)) for name in needed}
    # What has no loader is but a folder of that name.
    return {name: needed[name] for name, spec in found.items() if not (spec and spec.loader)}


def install_command() -> str:
    """For a terminal; from the workbook's own folder, which requirements.txt names as "."."""
    return f'cd "{HOME}" && "{sys.executable}" -m pip install -r requirements.txt'


def install(lacking: dict) -> None:
    """pip-install what is missing; of what is there, nothing the workbook uses is replaced."""
    print(f"installing {', '.join(lacking)}")
    kept = {each.name.lower(): each.version for each in importlib.metadata.distributions()}
    pinned = [f"{name}=={kept[name]}" for name in requirements() if name in kept]
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "constraints.txt")
        pins.write_text("\n".join(pinned))
        command = [sys.executable, "-m", "pip", "install", "-q", "-c", str(pins)]
        done = subprocess.run([*command, *lacking.values()], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        advice = "check the connection, and run this cell again"
        raise WorkbookError(f"cannot install {', '.join(lacking)} ({last}); {advice}")
    importlib.invalidate_caches()


def colab_advice() -> str:
    """For Colab: what suits its machine, and how runs and notebook survive a disconnect."""
    import torch

    suits = "No GPU: scale 'quick' suits (for more: Runtime, Change runtime type)."
    if torch.cuda.is_available():
        suits = f"{torch.cuda.get_device_name()}: scale 'laptop' suits."
    drive = "mount Drive and set os.environ['RUNS_DIR'] = '/content/drive/MyDrive/runs' above"
    kept = f"To keep runs after a disconnect, {drive}; to keep this notebook, File, Save a copy"
    return f"{suits} {kept} in Drive."
