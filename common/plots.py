"""Plots: each takes data and an optional `ax`, and returns the `ax` it drew on."""

import io
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image, display
from matplotlib.ticker import MaxNLocator


def _axes(ax, width=6.0, height=3.6):
    return ax or plt.subplots(figsize=(width, height), layout="constrained")[1]


def _finish(ax, xlabel, ylabel, **more):
    """What plots end with; whole numbers on an axis of epochs."""
    ax.set(xlabel=xlabel, ylabel=ylabel, **more)
    if xlabel == "epoch":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8)
    return ax


def _name(ticks, names, rotation=60):
    """Names below an axis, or at its side where they are not turned."""
    ticks(range(len(names)), names, fontsize=7, rotation=rotation, ha="right")


def images(x, titles=None, columns: int = 10):
    """A grid of uint8 images x (N, 3, H, W), with an optional title for each."""
    rows = -(-len(x) // columns)
    size = columns, rows * (1.25 if titles else 1.0)
    _, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for i, ax in zip(range(len(x)), axes.flat):
        ax.imshow(x[i].permute(1, 2, 0).cpu().numpy())
        ax.set_title(titles[i] if titles else "", fontsize=8)
    return axes[0, 0]


def curves(histories: dict, key="val_accuracy", ylabel=None, ax=None, x="epoch"):
    """One line a run over epochs, or with x="minutes" over time; label → list of rows."""
    ax = _axes(ax)
    for label, history in histories.items():
        at = [row["epoch"] for row in history]
        if x == "minutes":
            at = np.cumsum([row.get("seconds", 0) / 60 for row in history])
        ax.plot(at, [row[key] for row in history], marker="o", markersize=3, label=label)
    return _finish(ax, x, ylabel or key.replace("_", " "))


def bands(groups: dict, key: str = "val_accuracy", ylabel: str | None = None, ax=None):
    """Mean over seeds as a line, lowest to highest as a band; label → histories of its seeds."""
    ax = _axes(ax)
    for label, histories in groups.items():
        length = min(map(len, histories))
        values = torch.tensor([[row[key] for row in rows[:length]] for rows in histories])
        epochs = [row["epoch"] for row in histories[0][:length]]
        style = dict(marker="o", markersize=3, label=f"{label} (n = {len(histories)})")
        line = ax.plot(epochs, values.mean(0), **style)[0]
        ax.fill_between(epochs, values.amin(0), values.amax(0), color=line.get_color(), alpha=0.2)
    return _finish(ax, "epoch", ylabel or key.replace("_", " "))


def picture(ax, alt: str, tight: bool = True) -> Image:
    """The figure of an axes, or a figure, as a PNG; `alt` says what is to be seen in it.

    Not `tight`, its size is that of the figure, whatever is drawn.
    """
    buffer, figure = io.BytesIO(), getattr(ax, "figure", ax)
    figure.savefig(buffer, dpi=110, bbox_inches="tight" if tight else None)
    plt.close(figure)
    return Image(buffer.getvalue(), alt=alt, metadata=dict(alttext=alt))


class Live:
    """An `on_epoch` hook that redraws both accuracies under the cell; keeps the last `picture`."""

    def __init__(self):
        self.handle, self.picture, self.rows = None, None, []

    def __call__(self, row: dict) -> None:
        self.rows = [*(self.rows if row["epoch"] > 1 else []), row]  # 1: it began again
        ax = curves({"training": self.rows}, "train_accuracy")
        curves({"validation": self.rows}, ylabel="accuracy", ax=ax)
        self.picture = picture(ax, "Accuracy in training and in validation, by epoch")
        if self.handle:
            self.handle.update(self.picture)
        else:
            self.handle = display(self.picture, display_id=True)


def gamma_histogram(values: dict, low: float = 1e-6, ax=None):
    """Distribution of |gamma|, an outline a label; values below `low` count into the first bin."""
    ax = _axes(ax)
    high = max(10 * low, *(2 * float(v.abs().max()) for v in values.values()))
    bins = torch.logspace(math.log10(low), math.log10(high), 60)
    for label, v in values.items():
        counts = torch.histogram(_raised(v, low * 1.001), bins).hist
        ax.stairs(counts / counts.sum(), bins, label=label, fill=len(values) == 1)
    return _finish(ax, "|gamma|", "share of channels", xscale="log")


def _raised(v, low):
    """|v|, raised to `low` so that it can stand on a log axis."""
    return v.detach().abs().float().cpu().clamp(min=low)


def gamma_layers(values: dict, low: float = 1e-6, ax=None):
    """|gamma| of every layer: a dot a channel, raised to `low`; `values` maps layer to gammas."""
    ax = _axes(ax, max(4.0, 1.0 + 0.42 * len(values)))
    for i, v in enumerate(values.values()):
        x = torch.linspace(i - 0.35, i + 0.35, len(v))  # dots of equal height stay visible
        ax.plot(x, _raised(v, low), ".", color="tab:blue", alpha=0.4, markersize=4)
    small = {name: float((v.abs() < 1e-2).float().mean()) for name, v in values.items()}
    _name(ax.set_xticks, [f"{name} ({share:.0%} < 0.01)" for name, share in small.items()])
    return _finish(ax, "layer (share of its gammas below 0.01)", "|gamma|", yscale="log")


def cut(scores: dict, masks: dict, low: float = 1e-6, ax=None):
    """Sorted |scores| on a log axis, a dot a channel; those that the masks remove in red."""
    ax, values = _axes(ax), _raised(torch.cat(list(scores.values())), low)
    order = values.argsort()
    kept, at = torch.cat(list(masks.values())).cpu()[order], torch.arange(len(order))
    for label, chosen, color in (("removed", ~kept, "tab:red"), ("kept", kept, "tab:blue")):
        ax.plot(at[chosen], values[order][chosen], ".", color=color, markersize=3, label=label)
    return _finish(ax, "channels, sorted", "|gamma|", yscale="log")


def channels(before: dict, after: dict, ax=None):
    """Bars of the channels of each group before (pale) and after pruning."""
    ax = _axes(ax, max(4.0, 1.0 + 0.42 * len(before)))
    ax.bar(range(len(before)), before.values(), color="tab:blue", alpha=0.25, label="before")
    bars = ax.bar(range(len(after)), after.values(), color="tab:blue", label="after")
    ax.bar_label(bars, fontsize=6)
    _name(ax.set_xticks, list(before))
    return _finish(ax, "prune group", "channels")


def matrix(values, labels=None, xlabel="predicted", ylabel="true", ax=None, columns=None):
    """A tensor as colours, with its numbers where there are ≤ 20 rows; `columns`: as `labels`."""
    n = len(values)
    ax = _axes(ax, 5.5, 5)
    aspect = "auto" if columns else "equal"
    picture = ax.imshow(values, cmap="Blues", vmin=0, aspect=aspect)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if n > 20:
        ax.figure.colorbar(picture, ax=ax, shrink=0.8)
        return ax
    form = "{:.2f}" if values.dtype.is_floating_point else "{}"
    style = dict(ha="center", va="center", fontsize=6)
    for (i, j), value in np.ndenumerate(values.numpy()):
        color = "white" if value > values.max() / 2 else "black"
        ax.text(j, i, form.format(value), color=color, **style)
    _name(ax.set_xticks, columns or labels or range(n))
    _name(ax.set_yticks, labels or range(n), 0)
    return ax


def ladder(values: dict, gains=True, xlabel="validation accuracy (%)", noise=None, ax=None):
    """Dots, a rung each from top to bottom, with value and gain; `noise`: half widths of bars."""
    ax = _axes(ax, 6.5, 0.8 + 0.3 * len(values))
    numbers = list(values.values())
    ax.errorbar(numbers, range(len(numbers)), xerr=noise, fmt="o", capsize=3)
    for i, number in enumerate(numbers):
        text = f"{number:.2f}"
        if gains and i:
            text += f" ({number - numbers[i - 1]:+.2f})"
        style = dict(textcoords="offset points", xytext=(0, 5), fontsize=7, ha="center")
        ax.annotate(text, (number, i), **style)
    _name(ax.set_yticks, list(values), 0)
    ax.set_ylim(len(numbers) - 0.5, -0.7)  # from top to bottom
    ax.margins(x=0.15)
    ax.grid(alpha=0.3)
    ax.set_xlabel(xlabel)
    return ax


def sweep(x, lines: dict, xlabel: str, ylabel="accuracy", chance=None, ax=None):
    """Several quantities over one swept parameter, with chance level as a dotted line."""
    ax = _axes(ax)
    for label, y in lines.items():
        ax.plot(x, y, marker="o", markersize=3, label=label)
    if chance is not None:
        ax.axhline(chance, color="gray", linestyle=":", label=f"chance ({chance:.0%})")
    return _finish(ax, xlabel, ylabel)


def points(gamma, rise, label: str, ax=None, low: float = 1e-6):
    """Rise of the loss against |gamma|, a dot a channel."""
    ax = _axes(ax)
    ax.plot([max(value, low) for value in gamma], rise, ".", alpha=0.6, label=label)
    return _finish(ax, "|gamma|", "rise of the loss without it", xscale="log")


def tradeoff(series: dict, xlabel="MACs (millions)", ylabel="test accuracy (%)", ax=None):
    """Accuracy against cost; label → points (x, y, text), where an empty text is not written."""
    ax = _axes(ax)
    for label, points in series.items():
        x, y, texts = zip(*points)
        ax.scatter(x, y, label=label, zorder=3)
        for at, text in zip(zip(x, y), texts):
            ax.annotate(text, at, textcoords="offset points", xytext=(6, -3), fontsize=7)
    ax.margins(x=0.15, y=0.1)
    return _finish(ax, xlabel, ylabel)
