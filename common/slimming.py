"""Which channels go, and how? Network slimming (Liu et al., ICCV 2017): scores, masks, surgery."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import WorkbookError, choose, params
from common.models import build

PENALTIES = ("subgradient", "proximal")
CRITERIA = ("gamma", "taylor", "random")
SCOPES = ("global", "layer")


def gammas(model: nn.Module, kind: str = "inner") -> list:
    """The BatchNorm weights of all prune groups of a kind."""
    norms = (model.get_submodule(name) for group in model.groups(kind) for name in group.norm)
    return [norm.weight for norm in norms if norm.affine]


def trained_gammas(model: nn.Module) -> list:
    """The gammas that an L1 penalty acts on; WorkbookError where the network keeps them fixed."""
    found = gammas(model)
    if not all(gamma.requires_grad for gamma in found):
        raise WorkbookError("its gammas are fixed; build the network with gammas=True, or lam=0")
    return found


@torch.no_grad()
def add_subgradient(gammas: list, lam: float) -> None:
    """Add the subgradient of lam·|gamma| to each gradient: once a step, on unscaled gradients."""
    for gamma in gammas:
        gamma.grad.add_(gamma.sign(), alpha=lam)


@torch.no_grad()
def shrink(gammas: list, amount: float) -> None:
    """Soft-threshold each gamma by `amount` (step size × lam) after a step: the proximal form."""
    for gamma in gammas:
        gamma.copy_(F.softshrink(gamma, amount))


def scores(model: nn.Module, criterion="gamma", kind="inner", batches=(), seed: int = 0) -> dict:
    """One score (C,) per prune group of a kind, by name; low means unimportant.

    "gamma": |gamma| (Liu et al. 2017); "taylor": (gamma·dL/dgamma + beta·dL/dbeta)² for the mean
    loss L over all images of `batches` of (x, y) (Molchanov et al. 2019); "random". Of BatchNorms
    in a chain the lowest counts, as one dead is enough; of those that add up to a residual stream,
    the mean, where one without gamma counts as 1. Kinds are ranked apart: L1 acts on `inner` alone.
    Raises WorkbookError where there is no such group, for fixed gammas, and missing images.
    """
    choose("criterion", criterion, CRITERIA)
    groups = model.groups(kind)
    if not groups:
        raise WorkbookError(f"{model.spec['name']!r} has no {kind!r} groups; choose the other kind")
    if criterion == "gamma":
        trained_gammas(model)
    importance = _taylor(model, batches) if criterion == "taylor" else {}
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for group in groups:
        norms = {name: model.get_submodule(name) for name in group.norm}
        if criterion == "random":
            channels = model.get_submodule(group.norm[0]).num_features
            rows = [torch.rand(channels, generator=generator)]
        elif criterion == "taylor":
            rows = [importance[name] for name, norm in norms.items() if norm.affine]
        else:
            rows = [gamma_of(norm) for norm in norms.values()]
        rows = torch.stack(rows).cpu()
        result[group.name] = rows.amin(0) if group.inner else rows.mean(0)
    return result


def gamma_of(norm: nn.BatchNorm2d) -> Tensor:
    """|gamma| (C,), or ones where the BatchNorm has none."""
    return norm.weight.detach().abs() if norm.affine else torch.ones_like(norm.running_mean)


def _taylor(model, batches) -> dict:
    """Squared first-order change of the mean loss when gamma and beta become 0, by BatchNorm."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    images = 0
    for x, y in batches:
        F.cross_entropy(model(x), y, reduction="sum").backward()  # gradients add up
        images += len(x)
    if not images:
        raise WorkbookError("criterion 'taylor' needs images; give batches=[(x, y), …]")

    def change(norm):
        total = norm.weight * norm.weight.grad + norm.bias * norm.bias.grad
        return (total / images).detach().square()

    return {name: change(norm) for name, norm in norms.items() if norm.affine}


def make_masks(scores: dict, ratio: float, scope="global", min_channels=1, round_to=1) -> dict:
    """Which channels to keep: one bool mask (C,) per group, True = kept.

    Exactly round(ratio·total) channels of lowest score are removed (over all groups, or in each
    with scope "layer"); then the best of each group are put back until it has `min_channels` and a
    multiple of `round_to`.
    """
    choose("scope", scope, SCOPES)
    params.number(0, below=1)("ratio", ratio)
    masks = {}
    for names in [list(scores)] if scope == "global" else [[name] for name in scores]:
        flat = torch.cat([scores[name] for name in names])
        keep = torch.ones(len(flat), dtype=torch.bool)
        keep[flat.argsort(stable=True)[: round(ratio * len(flat))]] = False
        masks |= zip(names, keep.split([len(scores[name]) for name in names]))
    for name, score in scores.items():
        least = max(int(masks[name].sum()), min_channels)
        least = min(len(score), -(-least // round_to) * round_to)
        best = score.argsort(stable=True)[len(score) - least :]
        masks[name] = torch.zeros_like(masks[name]).index_fill(0, best, True)
    return masks


def gap(scores: dict) -> float:
    """The ratio at which sorted scores fall into two heaps, those that L1 drove to 0 and the rest.

    It is the largest step within that tenfold range of scores that holds the fewest channels (of
    several empty ones, that with the longest step).
    Raises WorkbookError where even that holds over 5 % of them, or half as many as one beside it.
    """
    logs = torch.cat(list(scores.values())).clamp(min=1e-12).log10().sort().values
    n, least = len(logs), max(1, round(0.05 * len(logs)))
    starts = torch.arange(least, n - least + 1)  # so many channels lie below the range
    ends = torch.searchsorted(logs, logs[starts - 1] + 1)
    inside = torch.where(ends <= n - least, ends - starts, n)
    emptiest = (inside - logs.diff()[starts - 1] / 100).argmin()
    held, start = int(inside[emptiest]), int(starts[emptiest])
    fullest = min(_fullest(logs[:start]), _fullest(logs[start + held :])) if held < n else 0
    if held > min(least, fullest / 2):
        advice = "give a ratio, or train with a longer reach (lam)"
        raise WorkbookError(f"there is no gap in the scores of these {n} channels; {advice}")
    steps = logs[start - 1 : start + held + 1].diff()
    return (start + int(steps.argmax())) / n


def _fullest(logs: Tensor) -> int:  # most values within a range of 1
    return int((torch.searchsorted(logs, logs + 1) - torch.arange(len(logs))).max())


def achieved(masks: dict) -> float:
    """Share of the prunable channels that the masks remove."""
    every = torch.cat(list(masks.values()))
    return 1 - int(every.sum()) / len(every)


def _removed(model: nn.Module, masks: dict):
    """(group, mask) of every group that has a mask; raises WorkbookError for one that fits none."""
    groups = {group.name: (group, width) for group, width in zip(model.groups(), model.cfg)}
    for name, mask in masks.items():
        group, width = groups[choose("prune group", name, groups)]
        shape, kind = getattr(mask, "shape", None), getattr(mask, "dtype", type(mask).__name__)
        if kind != torch.bool or shape != (width,):
            advice = f"give a tensor of {width} booleans, True = kept"
            raise WorkbookError(f"mask of {name!r} is {kind} of shape {shape}; {advice}")
        yield group, mask


@torch.no_grad()
def apply_masks(model: nn.Module, masks: dict) -> nn.Module:
    """A copy of the model in which nobody reads the removed channels."""
    model = copy.deepcopy(model)
    for group, mask in _removed(model, masks):
        for layer in group.into:
            model.get_submodule(layer).weight[:, ~mask] = 0
    return model


def slim(model: nn.Module, masks: dict) -> nn.Module:
    """A new, compact model without the removed channels, weights copied by name; eval mode."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    cfg = dict(zip((group.name for group in model.groups()), model.cfg))
    for group, mask in _removed(model, masks):
        keep = mask.nonzero()[:, 0]
        cfg[group.name] = len(keep)
        for layer in group.out + group.norm + group.gates:
            for kind in ("weight", "bias", "running_mean", "running_var"):
                if (name := f"{layer}.{kind}") in state:
                    state[name] = state[name][keep]
        for layer in group.into:
            state[f"{layer}.weight"] = state[f"{layer}.weight"][:, keep]
    compact = build(**{**model.spec, "cfg": list(cfg.values())})
    compact.load_state_dict(state)
    return compact.to(next(model.parameters())).eval()


@torch.no_grad()
def fold_bias(model: nn.Module, masks: dict, x: Tensor) -> nn.Module:
    """A copy in which the next layer makes up for the constants of removed channels.

    With its gamma at 0 a channel still sends act(beta) (Ye et al., ICLR 2018). The constant is read
    off the next layer's input for images x (N, 3, H, W), which for inner groups does not depend on
    x, and moved into that layer's BatchNorm mean or bias (it is lost where there is neither); exact
    but for zero-padded borders. Apply `slim` to the result.
    """
    silenced, folded = copy.deepcopy(model).eval(), copy.deepcopy(model)
    constants = {}

    def recorder(layer, mask):
        def record(module, inputs):
            mean = inputs[0].transpose(0, 1).flatten(1).mean(1)
            constants[layer] = mean * ~mask.to(mean.device)

        return record

    norm_of = {}
    for group in model.groups():
        norm_of |= zip(group.out, group.norm)
    for group, mask in _removed(model, masks):
        for out, name in zip(group.out, group.norm):
            norm = silenced.get_submodule(name)
            if norm.affine:
                norm.weight[~mask] = 0
            else:
                silenced.get_submodule(out).weight[~mask] = 0
                norm.running_mean[~mask] = 0
        for layer in group.into:
            silenced.get_submodule(layer).register_forward_pre_hook(recorder(layer, mask))
    silenced(x)
    for layer, constant in constants.items():
        reader = folded.get_submodule(layer)
        weight = reader.weight.flatten(2).sum(2) if reader.weight.ndim == 4 else reader.weight
        if layer in norm_of:
            folded.get_submodule(norm_of[layer]).running_mean -= weight @ constant
        elif reader.bias is not None:
            reader.bias += weight @ constant
    return folded


@torch.no_grad()
def recalibrate_bn(model: nn.Module, batches) -> nn.Module:
    """A copy whose BatchNorm statistics are averages over `batches` of (x, y); weights stay.

    Each image counts the same. A channel that is constant on these images gets a variance of 1, so
    that it sends about its beta. Raises WorkbookError where there are no images.
    """
    model = copy.deepcopy(model).eval()
    norms = {m: m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    for norm in norms:
        norm.train().reset_running_stats()
    images = 0
    for x, _ in batches:
        images += len(x)
        for norm in norms:
            norm.momentum = len(x) / images
        model(x)
    if not images:
        raise WorkbookError("there are no images to recalibrate on; give batches=[(x, y), …]")
    for norm, momentum in norms.items():
        norm.momentum = momentum
        norm.running_var[norm.running_var <= 1e-12 * (1 + norm.running_mean.square())] = 1
    return model.eval()
