"""Data sets, split once and for all, and label noise.

Relies on scikit-learn, which ships the digits, and on `idx_files` and `cifar_files` for the others; `experiment`
relies on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from .cifar_files import read_cifar
from .dataset_files import LabelledImages
from .idx_files import read_idx_dataset

__all__ = [
    "DATASETS",
    "PARTS",
    "DatasetInfo",
    "Part",
    "Split",
    "dataset_info",
    "digits",
    "load",
    "noisy_labels",
]

Part: TypeAlias = Literal["test", "validation"]
PARTS: tuple[str, ...] = get_args(Part)

Array: TypeAlias = NDArray[Any]

_TEST_SIZE = 500
_VALIDATION_SIZE = 297
_VALIDATION_SHARE = 10  # one training image in so many, where a data set has its own test images
_SPLIT_SEED = 0


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before it is loaded.

    Attributes:
        name: as in `DATASETS`.
        shape: of an image, (channels, height, width).
        classes: how many.
        mean, std: of the pixels of all training images, one value per channel, pixels being in [0, 1]; what a model
            normalises with. For the digits 0 and 1: they are used as they are.
    """

    name: str
    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


# Mean and standard deviation over all training pixels, to the four digits that the field uses. Those of Fashion-MNIST
# were computed from its files; MNIST has those of pytorch/examples, CIFAR-10 those of KellerJordan/cifar10-airbench,
# CIFAR-100 those of weiaicunzai/pytorch-cifar100. (0.2023, 0.1994, 0.2010), often seen as the std of CIFAR-10, is
# something else: the mean over images of the deviation within each.
_INFOS: Final = (
    DatasetInfo("digits", (1, 8, 8), 10, (0.0,), (1.0,)),
    DatasetInfo("fashion_mnist", (1, 28, 28), 10, (0.2860,), (0.3530,)),
    DatasetInfo("mnist", (1, 28, 28), 10, (0.1307,), (0.3081,)),
    DatasetInfo("cifar10", (3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    DatasetInfo("cifar100", (3, 32, 32), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
)
DATASETS: tuple[str, ...] = tuple(info.name for info in _INFOS)

_READERS: Final[dict[str, Callable[..., list[LabelledImages]]]] = {
    "fashion_mnist": read_idx_dataset,
    "mnist": read_idx_dataset,
    "cifar10": read_cifar,
    "cifar100": read_cifar,
}


@dataclass(frozen=True)
class Split:
    """Images to train on and to judge with: x float32 (N, C, height, width) in [0, 1], y int64 (N,)."""

    train_x: Tensor
    train_y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.train_x, self.train_y, self.held_out_x, self.held_out_y

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


def dataset_info(name: str) -> DatasetInfo:
    """Shape, classes, mean and standard deviation of a data set.

    Raises:
        ValueError: `name` is not one of `DATASETS`.
    """
    for info in _INFOS:
        if info.name == name:
            return info
    raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")


def load(name: str, *, data_dir: Path | None = None, held_out: Part = "test") -> Split:
    """A data set: its training images, and those to judge with.

    | name | training, test | read from |
    |---|---|---|
    | `digits` | 1297, 500 | scikit-learn, which ships them; see `digits` |
    | `fashion_mnist` | 60000, 10000 | IDX files in `data_dir` or in a folder `fashion_mnist` or `FashionMNIST/raw` \
below it; without `data_dir`, where Debian's package dataset-fashion-mnist puts them |
    | `mnist` | 60000, 10000 | IDX files in `data_dir` or in a folder `mnist` or `MNIST/raw` below it |
    | `cifar10` | 50000, 10000 | the pickles of the python version in `cifar-10-batches-py`, or cifar-10-python.tar.gz |
    | `cifar100` | 50000, 10000 | the same in `cifar-100-python`, or cifar-100-python.tar.gz; the fine labels |

    IDX files may be gzipped. The folder or the archive of CIFAR lies in `data_dir` or in `data_dir`/`name`; `data_dir`
    may also be that folder. Nothing is downloaded. Images keep the order of the files.

    Args:
        data_dir: the folder to look in, and nowhere else.
        held_out: "test" for all training images and the test images. With "validation" one tenth of the training
            images, stratified by class and always the same, is set aside to judge with, and the files of the test
            images are not opened. That is the one to choose settings by.

    Returns:
        images float32 (N, C, height, width), each byte divided by 255, and classes int64 (N,). All of it is in memory:
        0.22 GB of Fashion-MNIST or MNIST, 0.74 GB of CIFAR.

    Raises:
        ValueError: an unknown name or part; a file that is damaged or does not hold what it should; too few training
            images to set some aside.
        FileNotFoundError: the files are not there; the message names them and every folder looked in.
    """
    info = dataset_info(name)
    _check_part(held_out)
    if name == "digits":
        return digits(held_out)
    parts = ("train",) if held_out == "validation" else ("train", "test")
    folder = None if data_dir is None else Path(data_dir)
    (images, labels), *test = _READERS[name](name, folder, parts, shape=info.shape, classes=info.classes)
    if test:
        return Split(*_tensors(images, labels), *_tensors(*test[0]))
    kept, set_aside = _validation_rows(info, labels)
    return Split(*_tensors(images[kept], labels[kept]), *_tensors(images[set_aside], labels[set_aside]))


def digits(held_out: Part = "test") -> Split:
    """The 1797 handwritten digits of scikit-learn: 8x8 pixels, ten classes, pixel values divided by 16.

    The split is stratified by class and always the same: 1297 images to train on and 500 for the test. With
    held_out="validation" the test images are left out altogether, and the 1297 are split into 1000 to train
    on and 297 to judge with. That is the one to choose settings by.

    Raises:
        ValueError: `held_out` is neither "test" nor "validation".
    """
    _check_part(held_out)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    train_x, held_out_x, train_y, held_out_y = _split(images, labels, _TEST_SIZE)
    if held_out == "validation":
        train_x, held_out_x, train_y, held_out_y = _split(train_x, train_y, _VALIDATION_SIZE)
    return Split(*map(torch.from_numpy, (train_x, train_y, held_out_x, held_out_y)))


def noisy_labels(y: Tensor, rate: float, *, classes: int, seed: int) -> Tensor:
    """Symmetric label noise: each label, with probability `rate`, becomes one of the other classes, all equally likely.

    So a share `rate` of the labels is wrong, on average. (Where a changed label may be the old one again, as in some
    papers, a share rate * (classes - 1) / classes is.) The labels that change depend on `seed`, and those that
    change at a lower rate change to the same class at a higher one. For training labels only.

    Args:
        y: classes in [0, classes), int64, any shape.
        rate: from 0 (an equal copy) to 1 (every label is wrong).
        classes: how many there are; 2 or more.
        seed: of a generator of its own; the global random state is neither used nor changed.

    Returns:
        A new tensor of the shape and on the device of y.

    Raises:
        TypeError: y is not of dtype int64.
        ValueError: rate, classes or a label out of range.
    """
    if y.dtype != torch.int64:
        raise TypeError(f"y must hold class indices of dtype int64, got {y.dtype}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be from 0 to 1, got {rate!r}")
    if classes < 2:
        raise ValueError(f"classes must be 2 or more, got {classes!r}")
    if y.numel() and (int(y.min()) < 0 or int(y.max()) >= classes):
        raise ValueError(f"y must lie in [0, {classes}), got labels from {int(y.min())} to {int(y.max())}")
    generator = torch.Generator().manual_seed(seed)
    # Both are drawn for every label, so that neither depends on the rate.
    changed = torch.rand(y.shape, generator=generator, dtype=torch.float64) < rate
    step = torch.randint(1, classes, y.shape, generator=generator)
    return (y + (changed * step).to(y.device)) % classes


def _check_part(held_out: str) -> None:
    if held_out not in PARTS:
        raise ValueError(f"held_out must be 'test' or 'validation', got {held_out!r}")


def _split(images: Array, labels: Array, size: int) -> list[Array]:
    parts: list[Array] = train_test_split(images, labels, test_size=size, stratify=labels, random_state=_SPLIT_SEED)
    return parts


def _validation_rows(info: DatasetInfo, labels: Array) -> tuple[Array, Array]:
    """Which training images to keep and which to set aside, both ascending."""
    size = len(labels) // _VALIDATION_SHARE
    if size < info.classes:
        raise ValueError(
            f"{info.name}: held_out='validation' sets one training image in {_VALIDATION_SHARE} aside, "
            f"which must be at least one of each of the {info.classes} classes; there are {len(labels)}"
        )
    rows = np.arange(len(labels))
    kept, set_aside, _, _ = _split(rows, labels, size)
    return np.sort(kept), np.sort(set_aside)


def _tensors(images: Array, labels: Array) -> tuple[Tensor, Tensor]:
    pixels = images.astype(np.float32)
    pixels /= 255
    return torch.from_numpy(pixels), torch.from_numpy(labels)
