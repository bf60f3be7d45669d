"""What all readers of data sets share: files read within bounds, labels checked, and words for what is missing.

Relies on numpy; `idx_files`, `cifar_files` and `data` rely on it.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGEST", "LabelledImages", "checked", "find_files", "missing_files", "read_bytes"]

LARGEST: Final = 2**28  # bytes of a file, decompressed; the largest that is read, an archive of CIFAR, has 0.7 * 2^28

_GZIP_MAGIC: Final = b"\x1f\x8b"


class LabelledImages(NamedTuple):
    """Images uint8 (N, C, height, width) and their classes int64 (N,), as files hold them."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def read_bytes(path: Path) -> bytes:
    """The content of a file; of one that is gzipped, whatever its name, what is compressed in it.

    Raises:
        ValueError: the gzip data are damaged, or there are more than `LARGEST` bytes.
    """
    with path.open("rb") as file:
        compressed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        file.seek(0)
        try:
            # One byte more than is allowed tells a file that is too large, and no more of it is ever held.
            content = gzip.GzipFile(fileobj=file).read(LARGEST + 1) if compressed else file.read(LARGEST + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: the gzip data are truncated or damaged: {error}") from error
    if len(content) > LARGEST:
        raise ValueError(f"{path}: holds more than {LARGEST:,} bytes, which no file of these data sets does")
    return content


def checked(
    images: NDArray[Any], labels: NDArray[Any], shape: Sequence[int], classes: int, source: str
) -> LabelledImages:
    """Images (N, C * height * width) or of any shape with as many pixels each, given the shape (C, height, width).

    Raises:
        ValueError: images of another size, none at all, another number of labels, or labels outside of
            [0, classes); the message begins with `source`.
    """
    if images.dtype != np.uint8 or math.prod(images.shape[1:]) != math.prod(shape):
        raise ValueError(
            f"{source}: each image must have {' x '.join(map(str, shape))} values of one byte, "
            f"got an array {images.shape} of {images.dtype}"
        )
    if not len(images):
        raise ValueError(f"{source}: holds no images")
    if labels.shape != (len(images),):
        raise ValueError(f"{source}: {len(images)} images and {len(labels)} labels, must be equally many")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{source}: labels must lie in [0, {classes}), got labels from {labels.min()} to {labels.max()}"
        )
    return LabelledImages(images.reshape(-1, *shape), labels.astype(np.int64))


def find_files(folder: Path, names: Iterable[str], suffixes: Sequence[str] = ("",)) -> dict[str, Path] | None:
    """The path of each of these files, or None unless all of them lie in the folder; of suffixes the first counts."""
    found = {name: _find_file(folder, name, suffixes) for name in names}
    paths = {name: path for name, path in found.items() if path is not None}
    return paths if len(paths) == len(found) else None


def missing_files(
    dataset: str,
    names: Sequence[str],
    folders: Sequence[Path],
    advice: str,
    *,
    suffixes: Sequence[str] = ("",),
    archives: Sequence[Path] = (),
) -> FileNotFoundError:
    """An error that names every file expected, every place looked in with what it lacks, and where to get them."""
    alternatives = "".join(f" (or {suffix})" for suffix in suffixes if suffix)
    places = [f"  {folder}: {_what_is_missing(folder, names, suffixes)}" for folder in folders]
    places += [f"  {archive}: no such file" for archive in archives]
    return FileNotFoundError(
        "\n".join(
            [
                f"the files of {dataset} were not found. Expected in one folder:",
                *(f"  {name}{alternatives}" for name in names),
                "Looked in:",
                *(places or ["  no folder, for data_dir is None"]),
                advice,
            ]
        )
    )


def _find_file(folder: Path, name: str, suffixes: Sequence[str]) -> Path | None:
    candidates = (folder / (name + suffix) for suffix in suffixes)
    return next((path for path in candidates if path.is_file()), None)


def _what_is_missing(folder: Path, names: Sequence[str], suffixes: Sequence[str]) -> str:
    if not folder.is_dir():
        return "no such folder"
    missing = [name for name in names if _find_file(folder, name, suffixes) is None]
    return "none of them" if len(missing) == len(names) else f"all but {', '.join(missing)}"
