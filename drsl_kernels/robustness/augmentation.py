"""Random crops and mirror images of a whole batch at once. `train` relies on it."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PADDING", "crop_and_flip", "draw_crops"]

PADDING: Final = 4


def draw_crops(images: int, generator: torch.Generator) -> Tensor:
    """What `crop_and_flip` does with each image: int64 (N, 3), rows down, columns right, mirrored or not."""
    offsets = torch.randint(2 * PADDING + 1, (images, 2), generator=generator)
    return torch.cat([offsets, torch.randint(2, (images, 1), generator=generator)], dim=1)


def crop_and_flip(x: Tensor, crops: Tensor) -> Tensor:
    """Pad every image by 4 pixels of value 0, cut out one of its size, and mirror it left to right or not.

    Args:
        x: images (N, C, H, W). Never written.
        crops: int64 (N, 3), on the device of x, from `draw_crops`. (4, 4, 0) leaves an image as it is.
    """
    images, channels, height, width = x.shape
    down, right, mirrored = crops.unbind(1)
    rows = down[:, None] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(images, width)
    columns = right[:, None] + torch.where(mirrored[:, None] == 1, columns.flip(1), columns)
    padded = F.pad(x, (PADDING,) * 4)
    image = torch.arange(images, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
