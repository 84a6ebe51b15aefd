"""What does a network score? Logits, accuracy, loss, views; what a difference is worth."""

import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import Images, Loader
from common.sources import Spec

# 97.5 % quantiles of Student's t, by degrees of freedom from …
T95 = ((2, 4.30), (3, 3.18), (4, 2.78), (6, 2.45), (8, 2.31), (18, 2.10), (38, 2.02))


@torch.no_grad()
def evaluate(model, images: Images, spec: Spec, batch_size=500, accelerator=None, tta=0) -> dict:
    """Mean cross-entropy `loss`, `accuracy`, `top5` (0..1) in eval mode; `tta` as in `views`."""
    device, share = "cpu", (0, 1)
    if accelerator:
        device = accelerator.device
        share = accelerator.process_index, accelerator.num_processes
    sums = torch.zeros(4, device=device)
    batches = Loader(images, spec, batch_size, shuffle=False, share=share)
    for logits, y in _logits(model, batches, tta, move=accelerator is None):
        sums += totals(logits, y).to(device)
    return means(accelerator.reduce(sums) if accelerator else sums)


def totals(logits: Tensor, y: Tensor) -> Tensor:
    """Sums over images: cross-entropy, right answers, right among the first five, images."""
    hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
    loss = F.cross_entropy(logits, y, reduction="sum")
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(y), device=y.device)])


def means(sums: Tensor) -> dict:
    """What `totals` makes an image: `loss`, `accuracy`, `top5`."""
    loss, correct, among5, n = sums.tolist()
    return dict(loss=loss / n, accuracy=correct / n, top5=among5 / n)


@torch.no_grad()
def predict(model, images: Images, spec: Spec, batch_size: int = 500, tta: int = 0) -> Tensor:
    """Logits (N, classes), on the CPU, of a model in eval mode; `tta` as in `views`."""
    batches = Loader(images, spec, batch_size, shuffle=False)
    return torch.cat([logits.cpu() for logits, _ in _logits(model, batches, tta)])


def _logits(model: nn.Module, batches: Loader, tta: int, move: bool = True):
    """Yield (logits, labels) of each batch; with `move` on a GPU if there is one, for that time."""
    home, modes = next(model.parameters()).device, {m: m.training for m in model.modules()}
    if move and torch.cuda.is_available():
        model, batches.images = model.to("cuda"), batches.images.to("cuda")
    model.eval()
    try:
        for x, y in batches:
            yield views(model, x, tta), y
    finally:
        for module, training in modes.items():
            module.training = training
        if move:
            model.to(home)


def views(model: nn.Module, x: Tensor, tta: int = 0) -> Tensor:
    """Logits averaged over views of x: 0 alone, 1 with its mirror image, 2 also shifted a pixel.

    Level 2 weighs the two diagonal shifts as much as the unshifted image (airbench, Jordan 2024):
    six views.
    """
    if tta == 0:
        return model(x).float()
    mirrored = (model(x).float() + model(x.flip(3)).float()) / 2
    if tta == 1:
        return mirrored
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1), "reflect")
    shifted = [views(model, padded[:, :, d : d + height, d : d + width], 1) for d in (0, 2)]
    return mirrored / 2 + sum(shifted) / 4


def paired(a: Tensor, b: Tensor, labels: Tensor) -> tuple:
    """Accuracy of a minus that of b on the same images, and half the width of its 95 % interval.

    a, b: answers (N,), or (seeds, N), whose mean counts; labels (N,). The interval is McNemar's,
    as if the images were drawn again: it says nothing of other seeds.
    """
    right = [(answers == labels).double().view(-1, len(labels)).mean(0) for answers in (a, b)]
    better = right[0] - right[1]
    return float(better.mean()), float(1.96 * better.std(correction=0) / len(labels) ** 0.5)


def mean_std(values: list) -> str:
    """Mean ± standard deviation (n − 1) over seeds, with n; shares are written as percentages."""
    if len(values) < 2:
        return f"{values[0]:.2%} (n = 1)" if values else "not run"
    return f"{statistics.mean(values):.2%} ± {statistics.stdev(values):.2%} (n = {len(values)})"


def verdict(a: list, b: list, others: list = ()) -> str:
    """Does the difference of two sets of seeds exceed their spread? From accuracies (0..1) of each.

    The difference of the means is held against its 95 % interval (Student's t). The deviation of
    one seed is pooled over both sets and `others`, of which it is assumed to be the same.
    """
    sets = [v for v in (a, b, *others) if len(v) > 1]
    freedom = sum(len(v) - 1 for v in sets)
    if freedom < 2 or not (a and b):
        return "unknown: at least two seeds of each are needed"
    difference = statistics.mean(a) - statistics.mean(b)
    pooled = sum((len(v) - 1) * statistics.variance(v) for v in sets) / freedom
    quantile = next(t for n, t in reversed(T95) if n <= freedom)
    interval = quantile * (pooled * (1 / len(a) + 1 / len(b))) ** 0.5
    words = "exceeds" if abs(difference) > interval else "does not exceed"
    noise = f"(± {100 * interval:.2f} points, 95 %)"
    return f"{100 * difference:+.2f} points, which {words} what seeds alone may do {noise}"
