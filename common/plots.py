"""Plots: each takes data and an optional `ax`, and returns the `ax` it drew on."""

import math

import matplotlib.pyplot as plt
import torch
from IPython.display import display
from matplotlib.ticker import MaxNLocator


def _axes(ax, width=6.0, height=3.6):
    return ax or plt.subplots(figsize=(width, height), layout="constrained")[1]


def _finish(ax, xlabel, ylabel, epochs=False):
    """What most plots end with: labels, a pale grid, a small legend; whole numbers on an axis of epochs."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if epochs:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return ax


def images(x, titles=None, columns: int = 10, ax=None):
    """A grid of uint8 images x (N, 3, H, W), with an optional title for each."""
    rows = -(-len(x) // columns)
    _, axes = plt.subplots(
        rows, columns, figsize=(columns, rows * (1.25 if titles else 1.0)), squeeze=False, layout="constrained"
    )
    for i, ax in enumerate(axes.flat):
        ax.axis("off")
        if i < len(x):
            ax.imshow(x[i].permute(1, 2, 0).cpu().numpy())
            ax.set_title(titles[i] if titles else "", fontsize=8)
    return axes[0, 0]


def curves(histories: dict, key: str = "val_accuracy", ylabel: str | None = None, ax=None):
    """One line a run over the epochs; `histories` maps a label to a list of rows."""
    ax = _axes(ax)
    for label, history in histories.items():
        ax.plot([row["epoch"] for row in history], [row[key] for row in history], marker="o", markersize=3, label=label)
    return _finish(ax, "epoch", ylabel or key.replace("_", " "), epochs=True)


def bands(groups: dict, key: str = "val_accuracy", ylabel: str | None = None, ax=None):
    """Mean over seeds as a line, lowest to highest as a band; `groups` maps a label to the histories of its seeds."""
    ax = _axes(ax)
    for label, histories in groups.items():
        length = min(len(history) for history in histories)
        values = torch.tensor([[row[key] for row in history[:length]] for history in histories])
        epochs = [row["epoch"] for row in histories[0][:length]]
        line = ax.plot(epochs, values.mean(0), marker="o", markersize=3, label=f"{label} (n = {len(histories)})")[0]
        ax.fill_between(epochs, values.amin(0), values.amax(0), color=line.get_color(), alpha=0.2)
    return _finish(ax, "epoch", ylabel or key.replace("_", " "), epochs=True)


class Live:
    """An `on_epoch` hook that redraws training and validation accuracy under the cell; keeps the last `figure`."""

    def __init__(self):
        self.handle, self.figure = None, None

    def __call__(self, row: dict) -> None:
        if row["epoch"] == 1:  # a training that began again
            self.parts = {"training": [], "validation": []}
        for part, key in (("training", "train_accuracy"), ("validation", "val_accuracy")):
            self.parts[part].append(dict(epoch=row["epoch"], accuracy=row[key]))
        self.figure = curves(self.parts, "accuracy").figure
        if self.handle:
            self.handle.update(self.figure)
        else:
            self.handle = display(self.figure, display_id=True)
        plt.close(self.figure)


def gamma_histogram(values: dict, threshold: float | None = None, low: float = 1e-6, ax=None):
    """Distribution of |gamma| on a log axis, one outline per label; values below `low` count into the first bin."""
    ax = _axes(ax)
    bins = torch.logspace(math.log10(low), math.log10(max(2 * float(v.abs().max()) for v in values.values())), 60)
    for label, v in values.items():
        counts = torch.histogram(v.detach().abs().float().cpu().clamp(min=low * 1.001), bins).hist
        ax.stairs(counts / counts.sum(), bins, label=label, fill=len(values) == 1)
    if threshold is not None:
        ax.axvline(max(threshold, low), color="black", linestyle="--", label=f"threshold {threshold:.2g}")
    ax.set(xlabel="|gamma|", ylabel="share of channels", xscale="log")
    ax.legend(fontsize=8)
    return ax


def gamma_layers(values: dict, low: float = 1e-6, ax=None):
    """|gamma| of every layer: a dot a channel, on a log axis, raised to `low`; `values` maps layer to gammas."""
    ax = _axes(ax, max(4.0, 1.0 + 0.42 * len(values)))
    for i, v in enumerate(values.values()):
        x = torch.linspace(i - 0.35, i + 0.35, len(v))  # spread out, so that dots of equal height stay visible
        ax.plot(x, v.detach().abs().float().cpu().clamp(min=low), ".", color="tab:blue", alpha=0.4, markersize=4)
    labels = [f"{name} ({float((v.abs() < 1e-2).float().mean()):.0%} < 0.01)" for name, v in values.items()]
    ax.set_xticks(range(len(values)), labels, rotation=60, ha="right", fontsize=7)
    ax.set(xlabel="layer (share of its gammas below 0.01)", ylabel="|gamma|", yscale="log")
    ax.grid(alpha=0.3)
    return ax


def channels(before: dict, after: dict, ax=None):
    """Bars of the channels of each group before (pale) and after pruning."""
    ax = _axes(ax, max(4.0, 1.0 + 0.42 * len(before)))
    ax.bar(range(len(before)), list(before.values()), color="tab:blue", alpha=0.25, label="before")
    bars = ax.bar(range(len(after)), list(after.values()), color="tab:blue", label="after")
    ax.bar_label(bars, fontsize=6)
    ax.set_xticks(range(len(before)), list(before), rotation=60, ha="right", fontsize=7)
    ax.set(xlabel="prune group", ylabel="channels")
    ax.legend(fontsize=8)
    return ax


def matrix(values, labels=None, xlabel="predicted", ylabel="true", ax=None):
    """A square tensor as colours (rows `ylabel`), with its numbers where there are at most 20 rows."""
    n = len(values)
    ax = _axes(ax, 5.5, 5)
    picture = ax.imshow(values, cmap="Blues")
    if n <= 20:
        form = ".2f" if values.dtype.is_floating_point else "d"
        for i in range(n):
            for j in range(n):
                dark = values[i][j] > values.max() / 2
                ax.text(j, i, f"{values[i][j]:{form}}", ha="center", va="center", fontsize=6, color="white" if dark else "black")
        ax.set_xticks(range(n), labels or range(n), rotation=60, ha="right", fontsize=7)
        ax.set_yticks(range(n), labels or range(n), fontsize=7)
    else:
        ax.figure.colorbar(picture, ax=ax, shrink=0.8)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def ladder(values: dict, gains: bool = True, xlabel: str = "validation accuracy (%)", ax=None):
    """Horizontal bars, one a rung from top to bottom, each with its value and its gain over the rung before."""
    ax = _axes(ax, 6.5, 0.8 + 0.3 * len(values))
    names, numbers = list(values), list(values.values())
    gains = [""] + [f" ({b - a:+.2f})" if gains else "" for a, b in zip(numbers, numbers[1:])]
    bars = ax.barh(range(len(names)), numbers, color="tab:blue", alpha=0.7)
    ax.bar_label(bars, [f"{value:.2f}{gain}" for value, gain in zip(numbers, gains)], fontsize=8, padding=3)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    low, high = min(numbers), max(numbers)
    ax.set(xlabel=xlabel, xlim=(max(0, low - 0.5 * (high - low) - 1), high + 0.35 * (high - low) + 1))
    return ax


def sweep(x: list, lines: dict, xlabel: str, ylabel: str = "accuracy", chance: float | None = None, ax=None):
    """Several quantities over one swept parameter, with chance level as a dotted line."""
    ax = _axes(ax)
    for label, y in lines.items():
        ax.plot(x, y, marker="o", markersize=3, label=label)
    if chance is not None:
        ax.axhline(chance, color="gray", linestyle=":", label=f"chance ({chance:.0%})")
    return _finish(ax, xlabel, ylabel)


def tradeoff(series: dict, xlabel: str = "MACs (millions)", ylabel: str = "test accuracy (%)", ax=None):
    """Accuracy against cost; `series` maps a label to points (x, y, text), where an empty text is not written."""
    ax = _axes(ax)
    for label, points in series.items():
        ax.scatter(*zip(*((x, y) for x, y, _ in points)), label=label, zorder=3)
        for x, y, text in points:
            ax.annotate(text, (x, y), textcoords="offset points", xytext=(6, -3), fontsize=7)
    ax.margins(x=0.15, y=0.1)
    return _finish(ax, xlabel, ylabel)
