"""Plots: each takes data and an optional `ax`, and returns the `ax` it drew on."""

import matplotlib.pyplot as plt
import torch
from IPython.display import display


def _axes(ax, width=6.0, height=3.6):
    return ax or plt.subplots(figsize=(width, height), layout="constrained")[1]


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
    ax.set(xlabel="epoch", ylabel=ylabel or key.replace("_", " "))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return ax


class Live:
    """An `on_epoch` hook that redraws training and validation accuracy under the cell."""

    def __init__(self):
        self.history, self.handle = [], None

    def __call__(self, row: dict) -> None:
        self.history.append(row)
        ax = curves({"training": [dict(r, accuracy=r["train_accuracy"]) for r in self.history],
                     "validation": [dict(r, accuracy=r["val_accuracy"]) for r in self.history]}, "accuracy")  # fmt: skip
        if self.handle is None:
            self.handle = display(ax.figure, display_id=True)
        elif self.handle:
            self.handle.update(ax.figure)
        plt.close(ax.figure)


def gamma_histogram(values: dict, threshold: float | None = None, bins: int = 60, ax=None):
    """Distribution of |gamma|, one outline per label, with the pruning threshold as a dashed line."""
    ax = _axes(ax)
    top = max(float(v.abs().max()) for v in values.values())
    for label, v in values.items():
        counts = torch.histc(v.detach().abs().float(), bins, 0, top)
        ax.stairs(counts / counts.sum(), torch.linspace(0, top, bins + 1), label=label, fill=len(values) == 1)
    if threshold is not None:
        ax.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3g}")
    ax.set(xlabel="|gamma|", ylabel="share of channels", yscale="log" if len(values) > 1 else "linear")
    ax.legend(fontsize=8)
    return ax


def gamma_layers(values: dict, ax=None):
    """|gamma| of every layer: median as a dot, 10th to 90th percentile as a bar; `values` maps layer to gammas."""
    ax = _axes(ax, 1.0 + 0.42 * len(values))
    quantiles = [torch.quantile(v.detach().abs(), torch.tensor([0.1, 0.5, 0.9])).tolist() for v in values.values()]
    for i, (low, middle, high) in enumerate(quantiles):
        ax.plot([i, i], [low, high], color="tab:blue", linewidth=5, alpha=0.4)
        ax.plot(i, middle, "o", color="tab:blue")
    ax.set_xticks(range(len(values)), list(values), rotation=60, ha="right", fontsize=7)
    ax.set(xlabel="layer", ylabel="|gamma|", ylim=(0, None))
    return ax


def channels(before: dict, after: dict, ax=None):
    """Bars of the channels of each group before (pale) and after pruning."""
    ax = _axes(ax, 1.0 + 0.42 * len(before))
    ax.bar(range(len(before)), list(before.values()), color="tab:blue", alpha=0.25, label="before")
    bars = ax.bar(range(len(after)), list(after.values()), color="tab:blue", label="after")
    ax.bar_label(bars, fontsize=6)
    ax.set_xticks(range(len(before)), list(before), rotation=60, ha="right", fontsize=7)
    ax.set(xlabel="prune group", ylabel="channels", yscale="log")
    ax.legend(fontsize=8)
    return ax


def sweep(x: list, lines: dict, xlabel: str, ylabel: str = "accuracy", chance: float | None = None, ax=None):
    """Several quantities over one swept parameter, with chance level as a dotted line."""
    ax = _axes(ax)
    for label, y in lines.items():
        ax.plot(x, y, marker="o", markersize=3, label=label)
    if chance is not None:
        ax.axhline(chance, color="gray", linestyle=":", label=f"chance ({chance:.0%})")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return ax


def tradeoff(points: dict, xlabel: str = "MACs (millions)", ylabel: str = "test accuracy (%)", ax=None):
    """Labelled points of accuracy against cost; `points` maps a label to (x, y) or (x, y, colour)."""
    ax = _axes(ax)
    for label, (x, y, *colour) in points.items():
        ax.scatter(x, y, color=colour[0] if colour else "tab:blue", zorder=3)
        ax.annotate(label, (x, y), textcoords="offset points", xytext=(5, -9), fontsize=7)
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log")
    ax.grid(alpha=0.3, which="both")
    return ax
