"""Size and speed of a network. Nothing here changes the model it is given."""

import collections
import contextlib
import copy
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

import thop
import torch
import torchsummary
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.models.groups import Whiten
from common.train import image_sizes, save_model

IMAGE = (3, 32, 32)


def params(model: nn.Module) -> int:
    """Number of parameters, trained or fixed (buffers such as running statistics are not parameters)."""
    return sum(p.numel() for p in model.parameters())


def _copy(model):
    """An eval-mode copy on the CPU: thop leaves buffers behind, torchsummary runs hooks and needs the CPU."""
    return copy.deepcopy(model).cpu().eval()


@torch.no_grad()
def macs(model: nn.Module, size: int = 32) -> int:
    """Multiply-accumulates of one forward pass of one image of size×size: torch's FLOP count divided by 2."""
    with FlopCounterMode(display=False) as counter:
        _copy(model)(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


def pflops(model: nn.Module, images: int, epochs: int, low_res: float = 0.0, low_sizes=(24,), done=None) -> float:
    """10^15 floating-point operations of a training: 6 × MACs an image (forward 2, backward 4), fewer of small ones.

    `done`: epochs that were trained, if fewer than planned. The optimizer's own operations are not counted: for Muon about
    0.5 % more in batches of 2,000, 2 % in batches of 500.
    """
    sizes = collections.Counter(image_sizes(epochs, low_res, low_sizes)[:done])
    return 6e-15 * images * sum(n * macs(model, size) for size, n in sizes.items())


def thop_macs(model: nn.Module) -> int:
    """The count of the thop package, which adds BatchNorm and pooling and misses functional convolutions."""
    rules = {Whiten: thop.vision.basic_hooks.count_convNd}  # thop knows layers by their exact type
    return int(thop.profile(_copy(model), (torch.zeros(1, *IMAGE),), custom_ops=rules, verbose=False)[0])


def summary(model: nn.Module) -> str:
    """torchsummary's table of layers, output shapes and parameters (modules used twice are counted twice)."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        torchsummary.summary(_copy(model), IMAGE, device="cpu")
    return text.getvalue()


@torch.no_grad()
def latency(model: nn.Module, batch_size: int = 1, repeats: int = 50, warmup: int = 5) -> dict:
    """Milliseconds of a forward pass of a batch: `median`, `p10`, `p90` over `repeats`, in eval mode.

    Runs on the model's device, channels last, with torch's number of threads; GPU work is waited for.
    """
    device = next(model.parameters()).device
    model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    x = torch.randn(batch_size, *IMAGE, device=device).contiguous(memory_format=torch.channels_last)
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        model(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) * 1000)
    deciles = statistics.quantiles(times[warmup:], n=10)
    return dict(median=statistics.median(times[warmup:]), p10=deciles[0], p90=deciles[-1])


def peak_memory() -> float:
    """Largest memory taken so far, in GB: of the GPU by tensors, without one of the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9 if resource else float("nan")


def file_bytes(model: nn.Module) -> int:
    """Size of the model's deployable weights file (float32, no optimizer state)."""
    with tempfile.TemporaryDirectory() as folder:
        return os.path.getsize(save_model(Path(folder) / "weights.pt", model))


def profile(model: nn.Module, repeats: int = 50) -> dict:
    """One table row: params, macs, latency at batch 1 and 64 (ms: median, and 10th to 90th percentile), file size (bytes)."""
    row = dict(params=params(model), macs=macs(model))
    for n in (1, 64):
        ms = latency(model, n, repeats)
        row |= {f"latency_{n}": ms["median"], f"range_{n}": f"{ms['p10']:.3g} to {ms['p90']:.3g}"}
    return row | dict(bytes=file_bytes(model))
