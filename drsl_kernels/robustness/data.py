"""Data sets, split once and for all.

Relies on scikit-learn, which ships the images; `experiment` relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

__all__ = ["DATASETS", "PARTS", "DatasetInfo", "Part", "Split", "dataset_info", "digits", "load", "noisy_labels"]

DATASETS: tuple[str, ...] = ("digits",)

Part: TypeAlias = Literal["test", "validation"]
PARTS: tuple[str, ...] = get_args(Part)

Array: TypeAlias = NDArray[Any]

_TEST_SIZE = 500
_VALIDATION_SIZE = 297
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """Images to train on and to judge with: x float32 (N, 1, height, width) in [0, 1], y int64 (N,)."""

    train_x: Tensor
    train_y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor

    def first(self, samples: int) -> Split:
        """At most the first `samples` images of both parts."""
        return Split(
            self.train_x[:samples],
            self.train_y[:samples],
            self.held_out_x[:samples],
            self.held_out_y[:samples],
        )

    def to(self, device: torch.device | str) -> Split:
        return Split(
            self.train_x.to(device),
            self.train_y.to(device),
            self.held_out_x.to(device),
            self.held_out_y.to(device),
        )


def digits(held_out: Part = "test") -> Split:
    """The 1797 handwritten digits of scikit-learn: 8x8 pixels, ten classes, pixel values divided by 16.

    The split is stratified by class and always the same: 1297 images to train on and 500 for the test. With
    held_out="validation" the test images are left out altogether, and the 1297 are split into 1000 to train
    on and 297 to judge with. That is the one to choose settings by.

    Raises:
        ValueError: `held_out` is neither "test" nor "validation".
    """
    if held_out not in PARTS:
        raise ValueError(f"held_out must be 'test' or 'validation', got {held_out!r}")
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    train_x, held_out_x, train_y, held_out_y = _split(images, labels, _TEST_SIZE)
    if held_out == "validation":
        train_x, held_out_x, train_y, held_out_y = _split(train_x, train_y, _VALIDATION_SIZE)
    return Split(*map(torch.from_numpy, (train_x, train_y, held_out_x, held_out_y)))


def _split(images: Array, labels: Array, size: int) -> list[Array]:
    parts: list[Array] = train_test_split(images, labels, test_size=size, stratify=labels, random_state=_SPLIT_SEED)
    return parts


@dataclass(frozen=True)
class DatasetInfo:
    """What a model must know of a data set."""

    name: str
    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def dataset_info(name: str) -> DatasetInfo:
    return DatasetInfo(name, (1, 8, 8), 10, (0.0,), (1.0,))


def load(name: str, *, data_dir: Path | None = None, held_out: Part = "test") -> Split:
    return digits(held_out)


def noisy_labels(y: Tensor, rate: float, *, classes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    change = torch.rand(len(y), generator=generator) < rate
    return torch.where(change, (y + torch.randint(1, classes, y.shape, generator=generator)) % classes, y)
