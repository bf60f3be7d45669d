"""What all classifiers have in common: normalised input, features, and a head.

Relies on `drsl_kernels.heads`; `models` and `residual_networks` rely on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from drsl_kernels import GaussianMixtureHead

__all__ = ["Classifier", "Normalize", "Shape"]

Shape: TypeAlias = tuple[int, int, int]


class Classifier(nn.Module):
    """`features` maps images (N, channels, height, width) in [0, 1] to (N, d), `head` that to logits (N, classes)."""

    head: nn.Linear | GaussianMixtureHead

    def __init__(self, features: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.features = features
        self.head = head

    def make_gaussian(self) -> None:
        """Put a new `GaussianMixtureHead` in the place of the linear one, for the same features and classes."""
        linear = self.head
        assert isinstance(linear, nn.Linear)
        self.head = GaussianMixtureHead(linear.in_features, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


class Normalize(nn.Module):
    """(x - mean) / std for each channel of x (N, channels, height, width).

    `mean` and `std`, buffers of shape (channels, 1, 1), are saved with the weights. They are given as one value for
    each channel or as one for all.

    Raises:
        ValueError: another number of values, one that is not finite, or std not above 0; in `forward`, x with
            another number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise ValueError(f"{name} must have one value for each of {channels} channels or one, got {values!r}")
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} must be finite, got {values!r}")
            self.register_buffer(
                name, torch.tensor(values, dtype=torch.float32).expand(channels).clone().view(-1, 1, 1)
            )
        if not all(value > 0 for value in std):
            raise ValueError(f"std must be above 0, got {std!r}")

    def forward(self, x: Tensor) -> Tensor:
        channels = self.mean.shape[0]
        # One channel would be broadcast to three without a word.
        if x.dim() < 3 or x.shape[-3] != channels:
            raise ValueError(f"x must have shape (N, {channels}, height, width), got {tuple(x.shape)}")
        return (x - self.mean) / self.std
