"""The classifiers that are trained and attacked. `experiment` relies on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "SmallCNN", "make_model", "small_cnn"]

MODELS: tuple[str, ...] = ("small_cnn",)


class SmallCNN(nn.Module):
    """Two convolutions and two linear layers for 8x8 images of one channel; about 53 thousand parameters.

    `features` maps (N, 1, 8, 8) to (N, 128), `head` maps that to the logits (N, classes); `forward` is both.
    No batch normalisation and no dropout: training and evaluation mode are the same function.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 2 * 2, 128),
            nn.ReLU(),
        )
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


def small_cnn(seed: int, classes: int = 10) -> SmallCNN:
    """A `SmallCNN` whose first weights depend on `seed` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallCNN(classes)
    # Channels last: max pooling on the CPU is several times as fast.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def make_model(
    name: str,
    *,
    shape: tuple[int, int, int],
    classes: int,
    seed: int,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> nn.Module:
    return small_cnn(seed, classes)
