"""What is done to the images of a batch? uint8 batch → uint8 batch; at the end `normalise`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common import WorkbookError, choose
from common.sources import Spec


def normalise(x: Tensor, spec: Spec) -> Tensor:
    """uint8 images to float32, mean 0 and variance 1 in each colour channel, channels last."""
    # One row of pixels is handled as a vector: three channels alone would be too short for one.
    rows, width = x.permute(0, 2, 3, 1).flatten(2).float(), x.shape[3]
    both = torch.tensor([spec.mean, spec.std], device=x.device)
    mean, std = both.repeat(1, width) * 255
    return torch.addcmul(-mean / std, rows, 1 / std).unflatten(2, (width, 3)).permute(0, 3, 1, 2)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for images: as rows of bytes, which index_select copies 20 times faster."""
    n, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).flatten(1).index_select(0, index)
    return rows.view(len(index), height, width, channels).permute(0, 3, 1, 2)


def flip(x: Tensor, generator: torch.Generator, p: int = 50) -> Tensor:
    """Mirror each image left-right with a chance of `p` percent."""
    chance = torch.rand(len(x), generator=generator).mul(100)
    return mirror(x, chance.lt(p).to(x.device))


def mirror(x: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror left-right the images for which `mirrored` (N,) is True."""
    index = torch.arange(len(x), device=x.device) + len(x) * mirrored
    return take(torch.cat([x, x.flip(3)]), index)


def crop(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Shift each image by up to `pad` pixels both ways; the border is filled by reflection."""
    n, channels, height, width = x.shape
    shift = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator).to(x.device)
    x = x.permute(0, 2, 3, 1)
    back = x.flip(2)
    padded = torch.cat([back[:, :, width - pad - 1 : -1], x, back[:, :, 1 : pad + 1]], 2)
    above, below = padded[:, 1 : pad + 1].flip(1), padded[:, height - pad - 1 : -1].flip(1)
    padded = torch.cat([above, padded, below], 1)
    # Every run of `width` pixels is a row of this view, so that a window is `height` rows to copy.
    tall, wide = padded.shape[1:3]
    shape = n * tall * wide - width + 1, width * channels
    runs = padded.as_strided(shape, (channels, 1))
    image = torch.arange(n, device=x.device)[:, None]
    row = torch.arange(height, device=x.device)
    start = (image * tall + shift[0] + row) * wide + shift[1]
    windows = runs.index_select(0, start.flatten())
    return windows.view(n, height, width, channels).permute(0, 3, 1, 2)


def cutout(x: Tensor, generator: torch.Generator, size: int = 8) -> Tensor:
    """Blank one `size`×`size` square an image, clipped at the border (DeVries & Taylor 2017)."""
    centre = torch.randint(0, x.shape[-1], (2, len(x), 1), generator=generator).to(x.device)
    offset = torch.arange(x.shape[-1], device=x.device) - centre
    rows, columns = (offset >= -(size // 2)) & (offset < size - size // 2)
    # 127, 123, 113 is within two grey levels of the mean colour of either data set.
    grey = torch.tensor([127, 123, 113], dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], grey, x)


def affine(x: Tensor, generator: torch.Generator, degrees: int = 15) -> Tensor:
    """Turn each image by up to `degrees` either way, scale it by 0.9 to 1.1; reflected border."""
    angle, scale = torch.rand(2, len(x), generator=generator).to(x.device)
    angle, scale = (2 * angle - 1) * math.radians(degrees), 0.9 + 0.2 * scale
    cos, sin, zero = scale * angle.cos(), scale * angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, x.shape, align_corners=False)
    moved = F.grid_sample(x.float(), grid, padding_mode="reflection", align_corners=False)
    return moved.round().byte()


def colour(x: Tensor, generator: torch.Generator, percent: int = 20) -> Tensor:
    """Change brightness, contrast and saturation of each image by up to 1 ± `percent` / 100."""
    drawn = 2 * torch.rand(3, len(x), 1, 1, 1, generator=generator) - 1
    brightness, contrast, saturation = 1 + drawn.to(x.device) * percent / 100
    x = x.float() * brightness
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast)
    x = torch.lerp(x.mean(1, keepdim=True), x, saturation)
    return x.clamp(0, 255).round().byte()


# "altflip": half of the images, drawn by the seed, are mirrored in even epochs, the others in odd
# ones: two epochs show both sides of every image (airbench, Jordan 2024). The Loader does it.
AUGMENT = dict(flip=flip, altflip=None, crop=crop, cutout=cutout, affine=affine, colour=colour)
LARGEST = dict(flip=100, crop=31, cutout=32, affine=180, colour=100)


def parse_augment(names) -> list:
    """`("flip", "crop:2")` → [(flip, (50,)), (crop, (2,))]; WorkbookError for what is not known."""
    steps = []
    for item in names:
        name, _, number = str(item).partition(":")
        choose("augmentation", name, AUGMENT)
        if number and name not in LARGEST:
            raise WorkbookError(f"augmentation {item!r} takes no number; write {name!r}")
        if number and not (number.isdigit() and int(number) <= LARGEST[name]):
            legal = f"a whole number from 0 to {LARGEST[name]}, as in 'crop:4'"
            raise WorkbookError(f"augmentation {item!r}: after ':' comes {legal}")
        default = getattr(AUGMENT[name], "__defaults__", ())
        steps.append((AUGMENT[name], (int(number),) if number else default))
    return steps
