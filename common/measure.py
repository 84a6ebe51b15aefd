"""What does a network cost? Parameters, MACs, milliseconds, bytes; the model is left alone."""

import collections
import contextlib
import copy
import io
import sys
import time

import thop
import torch
import torchsummary
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.models.groups import Whiten
from common.optim import image_sizes
from common.runs import deployable, torch_bytes

IMAGE = (3, 32, 32)


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
