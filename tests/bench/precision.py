"""Milliseconds an image of forward and backward passes on this CPU, in 32 bits and in bf16: python -m tests.bench.precision"""

import time

import torch

from common import models, report, train

NETWORKS = (("fastnet", 64, 1000, 32), ("fastnet", 64, 1000, 24), ("resnet18", 16, 125, 32), ("mobilenet", 0.5, 128, 32))


def milliseconds(model, x, bf16, repeats=8):
    for i in range(repeats + 2):
        if i == 2:  # the first two passes allocate
            start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(x).float().logsumexp(1).mean()
        loss.backward()
    return (time.perf_counter() - start) / repeats / len(x) * 1e3


if __name__ == "__main__":
    train.keep_freed_memory()
    rows = []
    for name, width, batch, pixels in NETWORKS:
        x = torch.randn(batch, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)
        model = models.fresh(name, 0, torch.randn(100, 3, 32, 32), width=width).to(memory_format=torch.channels_last)
        full, half = (milliseconds(model, x, bf16) for bf16 in (False, True))
        row = {"network": f"{name}, width {width}", "pixels": pixels, "batch": batch, "32-bit, ms": f"{full:.2f}"}
        rows.append(row | {"bf16, ms": f"{half:.2f}", "ratio": f"{half / full:.2f}"})
    print(report.table(rows))
