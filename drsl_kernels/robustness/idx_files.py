"""MNIST and Fashion-MNIST from their IDX files.

The format, from the page of MNIST (http://yann.lecun.com/exdb/mnist/): two zero bytes, a byte for the type of the
values (8: unsigned bytes), a byte for the number of dimensions, the size of each as a big-endian 32-bit integer,
then the values, the last dimension running fastest. Relies on `dataset_files`; `data` relies on it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .dataset_files import LabelledImages, checked, find_files, missing_files, read_bytes

__all__ = ["DEBIAN_FASHION_MNIST", "read_idx", "read_idx_dataset"]

DEBIAN_FASHION_MNIST: Final = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist

_UNSIGNED_BYTE: Final = 0x08
_SUFFIXES: Final = ("", ".gz")
_PREFIXES: Final = {"train": "train", "test": "t10k"}

# Below data_dir, the most specific first, for names of files are the same in both data sets; .../raw is torchvision's.
_FOLDERS: Final = {
    "fashion_mnist": ("fashion_mnist", "fashion-mnist", "FashionMNIST/raw", ""),
    "mnist": ("mnist", "MNIST/raw", ""),
}
_ADVICE: Final = {
    "fashion_mnist": "Debian and Ubuntu: apt install dataset-fashion-mnist, and name no folder. "
    "Elsewhere: https://github.com/zalandoresearch/fashion-mnist",
    "mnist": "They are at https://ossci-datasets.s3.amazonaws.com/mnist/, from where torchvision has them.",
}
# Of the training labels, by which a folder with the files of the other one is recognised.
_FIRST_LABELS: Final = {
    "fashion_mnist": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5],
    "mnist": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4],
}


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of unsigned bytes in an IDX file, gzipped or not, that must have so many dimensions.

    Raises:
        ValueError: the file is of another kind, truncated, longer than its header says, empty, or larger than any
            file of these data sets; the message names the file and what it holds.
    """
    content = read_bytes(path)
    header = 4 + 4 * dimensions
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"{path}: not an IDX file, which begins with 00 00; this one with {content[:4].hex(' ')!r}")
    if content[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path}: the values must be unsigned bytes, type 0x08, got type 0x{content[2]:02x}")
    if content[3] != dimensions:
        raise ValueError(f"{path}: must have {dimensions} dimensions, got {content[3]}")
    if len(content) < header:
        raise ValueError(f"{path}: truncated within its header, after {len(content)} of {header} bytes")
    sizes = struct.unpack(f">{dimensions}I", content[4:header])
    expected, got = math.prod(sizes), len(content) - header
    shape = " x ".join(map(str, sizes))
    if expected == 0:
        raise ValueError(f"{path}: holds no values, its sizes being {shape}")
    if got != expected:
        what = "truncated" if got < expected else "too long"
        raise ValueError(f"{path}: {what}: its sizes are {shape}, {expected} bytes, but {got} follow")
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes)


def read_idx_dataset(
    name: str, data_dir: Path | None, parts: Sequence[str], *, shape: tuple[int, int, int], classes: int
) -> list[LabelledImages]:
    """The parts, "train" or "test", of "mnist" or "fashion_mnist", from the first folder that holds all their files: in
    `data_dir` where it is given, else where Debian has them.

    Raises:
        FileNotFoundError: no folder does.
        ValueError: what `read_idx` raises; images, labels and data set do not fit one another.
    """
    names = [file for part in parts for file in _file_names(part)]
    folders = [] if data_dir is None else [data_dir / folder for folder in _FOLDERS[name]]
    if name == "fashion_mnist" and data_dir is None:
        folders.append(DEBIAN_FASHION_MNIST)
    found = (find_files(folder, names, _SUFFIXES) for folder in folders)
    paths = next((paths for paths in found if paths is not None), None)
    if paths is None:
        raise missing_files(name, names, folders, _ADVICE[name], suffixes=_SUFFIXES)
    return [_read_part(name, part, paths, shape, classes) for part in parts]


def _file_names(part: str) -> tuple[str, str]:
    return f"{_PREFIXES[part]}-images-idx3-ubyte", f"{_PREFIXES[part]}-labels-idx1-ubyte"


def _read_part(
    name: str, part: str, paths: dict[str, Path], shape: tuple[int, int, int], classes: int
) -> LabelledImages:
    images_path, labels_path = (paths[file] for file in _file_names(part))
    labels = read_idx(labels_path, 1)
    first = labels[:10].tolist()
    others = [other for other in _FIRST_LABELS if other != name and first == _FIRST_LABELS[other]]
    if part == "train" and others:
        raise ValueError(f"{labels_path}: these are the labels of {others[0]}, not of {name}")
    return checked(read_idx(images_path, 3), labels, shape, classes, f"{images_path} and {labels_path.name}")
