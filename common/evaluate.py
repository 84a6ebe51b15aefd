"""What does a network score? Logits, accuracy and loss, of single images or averaged over views."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import Images, Loader
from common.sources import Spec


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
        hits = logits.topk(5).indices == y[:, None]
        loss = F.cross_entropy(logits, y, reduction="sum")
        count = torch.tensor(len(y), device=y.device)
        sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), count]).to(device)
    loss, correct, among5, n = (accelerator.reduce(sums) if accelerator else sums).tolist()
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
