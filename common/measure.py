"""What does a network cost, and where did it run? Parameters, MACs, milliseconds, bytes."""

import collections
import contextlib
import copy
import ctypes
import functools
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import thop
import torch
import torchsummary
from accelerate import PartialState
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import ROOT, WorkbookError, runs, write_file
from common.models.files import deployable, torch_bytes
from common.models.groups import Whiten
from common.optim import image_sizes

IMAGE = (3, 32, 32)
CORES = torch.get_num_threads()  # what torch takes where nothing is set


def params(model: nn.Module) -> int:
    """Number of parameters, trained or fixed; buffers such as running statistics do not count."""
    return sum(p.numel() for p in model.parameters())


def _copy(model):
    """An eval-mode copy on the CPU: thop leaves buffers, torchsummary runs hooks on the CPU."""
    return copy.deepcopy(model).cpu().eval()


@torch.no_grad()
def macs(model: nn.Module, size: int = 32) -> int:
    """Multiply-accumulates for one image of size×size: torch's FLOP count divided by 2."""
    with FlopCounterMode(display=False) as counter:
        _copy(model)(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


def pflops(model, images: int, epochs: int, low_res=0.0, low_sizes=(24,), done=None) -> float:
    """10^15 floating-point operations of a training: 6 × MACs an image (forward 2, backward 4).

    `done`: epochs that were trained, if fewer than planned. The optimizer's own do not count: for
    Muon about 0.5 % more in batches of 2,000, 2 % in batches of 500.
    """
    sizes = collections.Counter(image_sizes(epochs, low_res, low_sizes)[:done])
    return 6e-15 * images * sum(n * macs(model, size) for size, n in sizes.items())


def thop_macs(model: nn.Module) -> int:
    """thop's count, which adds BatchNorm and pooling and misses functional convolutions."""
    rules = {Whiten: thop.vision.basic_hooks.count_convNd}  # it knows layers by exact type
    x = torch.zeros(1, *IMAGE)
    return int(thop.profile(_copy(model), (x,), custom_ops=rules, verbose=False)[0])


def summary(model: nn.Module) -> str:
    """torchsummary's table of layers, shapes and parameters; modules used twice count twice."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        torchsummary.summary(_copy(model), IMAGE, device="cpu")
    return text.getvalue()


@torch.no_grad()
def latency(model: nn.Module, batch_size: int = 1, repeats: int = 50, warmup: int = 5) -> dict:
    """Milliseconds of a forward pass of a batch: `median`, `p10`, `p90` over `repeats`.

    In eval mode, on the model's device, channels last; GPU work is waited for.
    """
    device = next(model.parameters()).device
    model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    x = torch.randn(batch_size, *IMAGE, device=device).to(memory_format=torch.channels_last)
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        model(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) * 1000)
    p10, median, p90 = torch.tensor(times[warmup:]).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return dict(median=median, p10=p10, p90=p90)


def peak_memory() -> float:
    """Largest memory taken so far, in GB: by tensors of the GPU, or by the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return float("nan")
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def file_bytes(model: nn.Module) -> int:
    """Size of the model's deployable weights file (float32, no optimizer state)."""
    return len(torch_bytes(deployable(model)))


def profile(model: nn.Module, repeats: int = 50) -> dict:
    """A table row: params, macs, latency at batch 1 and 64 (ms), its range, bytes."""
    row = dict(params=params(model), macs=macs(model))
    for n in (1, 64):
        ms = latency(model, n, repeats)
        row[f"latency_{n}"] = ms["median"]
        row[f"range_{n}"] = f"{ms['p10']:.3g} to {ms['p90']:.3g}"
    return row | dict(bytes=file_bytes(model))


def once(run: str, key: str, find, *arguments, again=False, keep=False):
    """What `find(*arguments)` measures of a run, a JSON value: from its manifest, or now.

    `key` names all that the value depends on. `again`: measure it all the same, but where a run
    was recorded without weights; `keep`: in the manifest, with the machine.
    """
    manifest = runs.load_manifest(run)
    kept, here = manifest.get("measured", {}).get(key), runs.file_of(run, "best.pt").is_file()
    if kept and not (again and here):
        print(f"{key} of {run}: recorded, on {kept['machine']['cpu']}")
        return kept["found"]
    found, path = find(*arguments), runs.file_of(run, "run.json")
    if keep and path.is_file():
        manifest = runs.read_manifest(path)  # anew: it may have got others meanwhile
        manifest.setdefault("measured", {})[key] = dict(found=found, machine=machine())
        write_file(path, json.dumps(manifest, indent=1) + "\n")
    return found


def machine(device="cpu") -> dict:
    """Names of processor and GPU, vector instructions, cores, processes, threads, torch version."""
    info, kind = Path("/proc/cpuinfo"), torch.device(device).type
    named = (
        re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8"))
        if info.exists()
        else None
    )
    return dict(
        cpu=named[1] if named else platform.processor() or platform.machine(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        gpu=torch.cuda.get_device_name(device) if kind == "cuda" else {"cpu": None}.get(kind, kind),
        torch=str(torch.__version__),
        cores=os.cpu_count(),
        processes=PartialState().num_processes,
        threads=torch.get_num_threads(),
    )


def distinct(machines: list) -> list:
    """Each machine once, in order."""
    return [m for i, m in enumerate(machines) if m not in machines[:i]]


def idle_cores(seconds: float = 0.5) -> float:
    """Cores that no other process uses, as a mean over some time."""
    own = psutil.Process()
    own.cpu_percent()
    idle = psutil.cpu_count() * (1 - psutil.cpu_percent(interval=seconds) / 100)
    return idle + own.cpu_percent() / 100


@contextlib.contextmanager
def threads(number: int):
    """Compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def idle_threads(folder: Path):
    """As many threads as the run had, or as cores are idle; another number that was set wins."""
    # With one for every core, each step waits for the thread that stands beside a busy process.
    if "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() != CORES:
        yield
        return
    idle = idle_cores()
    number, why = min(CORES, max(1, round(idle))), f"{idle:.1f} cores are idle"
    if (folder / "checkpoint.pt").exists():
        with contextlib.suppress(WorkbookError):  # a damaged manifest is written anew
            began = runs.read_manifest(folder / "run.json")["machine"]["threads"]
            number, why = min(CORES, began), "as this run began"
    print(f"threads: {number}, {why} (OMP_NUM_THREADS sets another number)")
    with threads(number):
        yield


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory: handing it back and faulting it in costs 10-20 % on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD, which some versions allow up to 32 MB; M_TRIM_THRESHOLD
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):
            libc.mallopt(-1, 2**31 - 1)


def commit() -> str:
    """The commit of the checkout, "+" where tracked files but reports differ; or "unknown"."""
    git = ["git", "-C", str(ROOT), "--no-optional-locks"]
    changes = ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/reports"]
    # GIT_DIR and the like would name another repository.
    own = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    how = dict(text=True, stderr=subprocess.DEVNULL, env=own)
    ask = functools.partial(subprocess.check_output, **how)
    try:
        if Path(ask([*git, "rev-parse", "--show-toplevel"]).strip()).resolve() != ROOT:
            return "unknown"  # unpacked inside another repository
        head = ask([*git, "rev-parse", "--short=12", "HEAD"]).strip()
        return head + "+" * bool(ask([*git, *changes]))
    except (OSError, subprocess.SubprocessError):
        return "unknown"


COMMIT = commit()  # of the code as it was imported
