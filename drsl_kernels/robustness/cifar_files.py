"""CIFAR-10 and CIFAR-100 in their "python version": pickles in a folder, or in the archive as it is published.

The layout is described at https://www.cs.toronto.edu/~kriz/cifar.html: each file holds a dictionary with `data`, uint8
(N, 3072), the 1024 red values of an image first, then green and blue, row by row, and the classes as a list. Archives
are read in memory and never unpacked. Relies on `plain_pickle` and `dataset_files`; `data` relies on it.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from .dataset_files import LabelledImages, checked, find_files, missing_files, read_bytes
from .plain_pickle import read_dictionary

__all__ = ["read_cifar"]


@dataclass(frozen=True)
class _Layout:
    """How a data set is published: its folder, also within the archive, the files of each part, the key of classes."""

    folder: str
    archive: str
    parts: dict[str, tuple[str, ...]]
    labels: str


_LAYOUTS: Final = {
    "cifar10": _Layout(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        parts={"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
        labels="labels",
    ),
    "cifar100": _Layout(
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        parts={"train": ("train",), "test": ("test",)},
        labels="fine_labels",
    ),
}


def read_cifar(
    name: str, data_dir: Path | None, parts: Sequence[str], *, shape: tuple[int, int, int], classes: int
) -> list[LabelledImages]:
    """The parts, "train" or "test", of "cifar10" or "cifar100" (its 100 fine classes).

    Raises:
        FileNotFoundError: neither a folder with all their files nor the archive is there.
        ValueError: a file is damaged, holds anything but plain values, or does not fit the data set; the message
            names it. Nothing that a file asks for is run.
    """
    layout = _LAYOUTS[name]
    names = [file for part in parts for file in layout.parts[part]]
    contents = _contents(name, layout, names, data_dir)

    def read_part(part: str) -> LabelledImages:
        pieces = [_read_pickle(*contents[file], layout.labels, shape, classes) for file in layout.parts[part]]
        images, labels = zip(*pieces, strict=True)
        return LabelledImages(np.concatenate(images), np.concatenate(labels))

    return [read_part(part) for part in parts]


def _contents(name: str, layout: _Layout, names: Sequence[str], data_dir: Path | None) -> dict[str, tuple[str, bytes]]:
    """Where each file was found, and what is in it."""
    roots = [] if data_dir is None else [data_dir, data_dir / name]
    folders = [root / layout.folder for root in roots] + roots
    for folder in folders:
        paths = find_files(folder, names)
        if paths is not None:
            return {file: (str(path), read_bytes(path)) for file, path in paths.items()}
    archives = [root / layout.archive for root in roots]
    for archive in archives:
        if archive.is_file():
            return _unpack(archive, layout.folder, names)
    advice = (
        f"It is the python version, {layout.archive}, unpacked or not, of https://www.cs.toronto.edu/~kriz/cifar.html."
    )
    raise missing_files(name, names, folders, advice, archives=archives)


def _unpack(archive: Path, folder: str, names: Sequence[str]) -> dict[str, tuple[str, bytes]]:
    wanted = {f"{folder}/{file}": file for file in names}
    found: dict[str, tuple[str, bytes]] = {}
    unzipped = read_bytes(archive)
    try:
        with tarfile.open(fileobj=io.BytesIO(unzipped), mode="r:") as members:
            for member in members:
                file = wanted.get(member.name.removeprefix("./"))
                # A sparse one could be of any size.
                content = members.extractfile(member) if file and member.isreg() and not member.issparse() else None
                if file and content:
                    found[file] = (f"{archive}:{member.name}", content.read())
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{archive}: the archive is truncated or damaged: {error}") from error
    missing = [file for file in names if file not in found]
    if missing:
        raise ValueError(f"{archive}: has no {', '.join(f'{folder}/{file}' for file in missing)}")
    return found


def _read_pickle(
    source: str, content: bytes, labels_key: str, shape: tuple[int, int, int], classes: int
) -> LabelledImages:
    try:
        dictionary = read_dictionary(content)
    except ValueError as error:
        raise ValueError(f"{source}: cannot be read as a pickle of plain values: {error}") from error
    images, labels = dictionary.get("data"), dictionary.get(labels_key)
    if not isinstance(images, np.ndarray):
        raise ValueError(f"{source}: must hold an array 'data'; its keys are {sorted(dictionary)[:10]}")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(
            f"{source}: must hold a list of classes {labels_key!r}; its keys are {sorted(dictionary)[:10]}"
        )
    # As objects first: an integer of any size is then compared, not cut.
    return checked(images, np.array(labels, dtype=object), shape, classes, source)
