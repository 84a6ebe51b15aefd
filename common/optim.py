"""How do weights move? Optimizers, the schedule, sizes of the images, precision."""

import copy
import math

import torch
from accelerate import PartialState
from torch import Tensor, nn

from common import WorkbookError
from common.config import TrainConfig
from common.models.groups import Whiten

GROUPS = ("convolutions", "other weights", "gammas", "biases and betas")


class Muon(torch.optim.Optimizer):
    """Muon for convolutions, SGD with Nesterov momentum for the rest.

    Groups with `orthogonal`: a convolution's momentum is orthogonalised by Newton-Schulz
    iterations, and its weight kept at norm sqrt(outputs), which assumes that a BatchNorm follows
    (Jordan et al., "Muon", 2024; airbench94_muon). torch.optim.Muon takes 2-D parameters alone and
    does not renormalise weights.
    """

    def __init__(self, groups, lr, momentum=0.6, weight_decay=0.0):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group)

    def _move(self, p, group):
        grad = p.grad
        if not group["orthogonal"]:
            grad = grad.add(p, alpha=group["weight_decay"])
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.mul_(group["momentum"]).add_(grad)
        update = grad.add(buffer, alpha=group["momentum"])
        if group["orthogonal"]:
            update = orthogonalise(update.flatten(1)).view_as(p)
            p.mul_(len(p) ** 0.5 / p.norm().clamp(min=1e-7))  # all zeros stay zeros
        p.add_(update, alpha=-group["lr"])


def orthogonalise(matrix: Tensor, steps: int = 3) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: an iteration drives singular values to 1."""
    a, b, c = 3.4445, -4.7750, 2.0315  # coefficients of Jordan et al. 2024
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def kind_of(module: nn.Module, name: str) -> int:
    """The place in `GROUPS` of a module's own parameter.

    A convolution with a bias of its own (in squeeze-and-excitation, say) has no BatchNorm after it:
    all of it counts among the other weights, except for the bias of the whitening layer.
    """
    if isinstance(module, nn.BatchNorm2d):
        return 2 if name == "weight" else 3
    if isinstance(module, nn.Conv2d) and (module.bias is None or isinstance(module, Whiten)):
        return 0 if name == "weight" else 3
    return 3 if name == "bias" and not isinstance(module, nn.Conv2d) else 1


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """An optimizer with a parameter group for each of `GROUPS`, its peak rate in `peak`."""
    muon, decay = config.optimizer == "muon", config.weight_decay
    rest = config.lr_other if muon else config.lr
    # A step takes lr × decay off a weight: dividing by lr_bias keeps that product.
    decay_bias = decay / config.lr_bias if config.decay_bias and config.lr_bias else 0
    rates = (config.lr, rest, rest * config.lr_gamma, rest * config.lr_bias)
    groups = []
    for rate, weight_decay in zip(rates, (decay, decay, 0, decay_bias)):
        groups.append(dict(params=[], lr=rate, peak=rate, weight_decay=weight_decay))
        groups[-1]["orthogonal"] = len(groups) == 1
    if muon and config.momentum_other is not None:
        for group in groups[1:]:
            group["momentum"] = config.momentum_other
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                groups[kind_of(module, name)]["params"].append(p)
    if config.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=config.lr)
    if muon:
        return Muon(groups, lr=config.lr, momentum=config.momentum)
    nesterov = config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)


def gamma_rates(config, images: int) -> list:
    """The learning rate of the gammas in each step of a training on so many images."""
    batches = -(-images // config.batch_size)
    peak = config.lr_other if config.optimizer == "muon" else config.lr
    plan = round(config.warmup * batches), config.schedule, config.milestones
    steps = batches * config.epochs
    factors = (lr_factor(step, steps, *plan) for step in range(steps))
    return [peak * config.lr_gamma * factor for factor in factors]


def reach(lam: float, rates: list, momentum: float) -> float:
    """How far SGD with momentum and an L1 penalty can move a gamma that the loss does not defend.

    rates: the gammas' learning rate in each step.
    """
    return lam / (1 - momentum) * sum(rates)


def lr_factor(step, total, warmup=0, schedule="cosine", milestones=(0.5, 0.75)) -> float:
    """Share of the peak learning rate at `step` of `total`: linear warm-up, then the schedule."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "steps":
        return 0.1 ** sum(step >= m * total for m in milestones)
    done = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return {"cosine": cosine, "linear": 1 - done, "constant": 1.0}[schedule]


def image_sizes(epochs: int, low_res: float = 0.0, low_sizes=(24,)) -> list[int]:
    """Side length, in pixels, of the training images in each epoch: `low_sizes`, then 32.

    Large structures are learnt first, and small images cost less (progressive resizing, Howard
    2018).
    """
    low = low_res * epochs
    small = [low_sizes[int(e / low * len(low_sizes))] for e in range(epochs) if e < low]
    return small + [32] * (epochs - len(small))


def native_precision(precision: str, model: nn.Module) -> str:
    """Resolve "auto": bf16 where the device computes it, fp16 on older GPUs, else "no".

    Raises WorkbookError if fp16 is asked for without a GPU.
    """
    gpu = PartialState().device.type == "cuda"  # not if ACCELERATE_USE_CPU=1
    if precision == "fp16" and not gpu:
        raise WorkbookError("precision='fp16' needs a GPU; choose 'auto', 'no' or 'bf16'")
    if precision != "auto":
        return precision
    if gpu:
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    # On a CPU, bf16 takes 0.6 × the time of dense convolutions, but 1.7 × that of depthwise ones.
    if any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in model.modules()):
        return "no"
    # Before torch 2.11 nothing tells.
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "no"


def refuse_lonely_images(model, images: int, config: TrainConfig) -> None:
    """Raise WorkbookError if a piece of a batch has one image, and BatchNorm cannot do with it."""
    world = PartialState().num_processes
    sizes = {size // world for size in (config.batch_size, images % config.batch_size) if size}
    pieces = [len(piece) for size in sizes for piece in torch.zeros(size).chunk(config.accumulate)]
    small = min(image_sizes(config.epochs, config.low_res, config.low_sizes))
    try:
        if min(pieces) == 1:
            copy.deepcopy(model).train()(next(model.parameters()).new_zeros(1, 3, small, small))
    except ValueError:
        problem = f"leave a piece of one image of {images}, too few for this network"
        advice = "choose another batch_size, accumulate or low_sizes"
        settings = f"batch_size={config.batch_size}, accumulate={config.accumulate}"
        raise WorkbookError(f"{settings} {problem}; {advice}") from None
