"""CIFAR from its pickles, in folders and archives: read back bit for bit, and what is said of damaged ones."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_lab_plain_pickle import WRITERS, by_python_2

from drsl_kernels.robustness import dataset_files
from drsl_kernels.robustness.data import load

CIFARS = ("cifar10", "cifar100")
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
FILES = {"cifar10": [f"data_batch_{n}" for n in (1, 2, 3, 4, 5)] + ["test_batch"], "cifar100": ["train", "test"]}
COUNT = 20  # images in a file


def content(name: str, number: int) -> dict[bytes, Any]:
    """What the file of that number holds, with the published keys."""
    generator = np.random.RandomState(number)
    images = generator.randint(0, 256, (COUNT, 3072)).astype(np.uint8)
    names = [b"image_s_%06d.png" % generator.randint(10**6) for _ in range(COUNT)]
    rest = {b"batch_label": b"training batch 1 of 5", b"data": images, b"filenames": names}
    if name == "cifar10":
        return rest | {b"labels": [(7 * k + number) % 10 for k in range(COUNT)]}
    fine = [(7 * k + number) % 100 for k in range(COUNT)]
    return rest | {b"fine_labels": fine, b"coarse_labels": [k // 5 for k in fine]}


def write(folder: Path, name: str, writer: Callable[[object], bytes] = by_python_2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(FILES[name]):
        (folder / file).write_bytes(writer(content(name, number)))
    return folder


def expected(name: str, numbers: list[int]) -> tuple[NDArray[np.float32], list[int]]:
    contents = [content(name, number) for number in numbers]
    images = np.concatenate([each[b"data"].reshape(-1, 3, 32, 32) for each in contents]) / np.float32(255)
    key = b"labels" if name == "cifar10" else b"fine_labels"
    return images, list(itertools.chain(*(each[key] for each in contents)))


def assert_read(name: str, data_dir: Path) -> None:
    split = load(name, data_dir=data_dir)
    *train, test = range(len(FILES[name]))
    for x, y, numbers in ((split.train_x, split.train_y, train), (split.held_out_x, split.held_out_y, [test])):
        images, labels = expected(name, numbers)
        assert x.dtype == torch.float32
        assert np.array_equal(x.numpy(), images)
        assert y.dtype == torch.int64
        assert y.tolist() == labels


@pytest.mark.parametrize("name", CIFARS)
class TestReading:
    @pytest.mark.parametrize("writer", WRITERS.values(), ids=list(WRITERS))
    def test_bit_for_bit_whoever_wrote_it(self, tmp_path: Path, name: str, writer: Callable[[object], bytes]) -> None:
        write(tmp_path / FOLDERS[name], name, writer)
        assert_read(name, tmp_path)

    @pytest.mark.parametrize("place", ["{name}/{folder}", ".", "{name}"])
    def test_folders(self, tmp_path: Path, name: str, place: str) -> None:
        write(tmp_path / place.format(name=name, folder=FOLDERS[name]), name)
        assert_read(name, tmp_path)

    @pytest.mark.parametrize("below", [False, True])
    @pytest.mark.parametrize("prefix", ["", "./"])
    def test_archive(self, tmp_path: Path, name: str, below: bool, prefix: str) -> None:
        folder = tmp_path / name if below else tmp_path
        folder.mkdir(exist_ok=True)
        unpacked = write(tmp_path / "elsewhere", name)
        with tarfile.open(folder / ARCHIVES[name], "w:gz") as archive:
            archive.add(unpacked, prefix + FOLDERS[name])
        assert_read(name, tmp_path)
        assert not (tmp_path / FOLDERS[name]).exists(), "read in memory"

    def test_an_unpacked_folder_comes_before_the_archive(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / FOLDERS[name], name)
        (tmp_path / ARCHIVES[name]).write_bytes(b"not an archive")
        assert_read(name, tmp_path)

    def test_missing(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / FOLDERS[name], name)
        (tmp_path / FOLDERS[name] / FILES[name][0]).unlink()
        with pytest.raises(FileNotFoundError) as caught:
            load(name, data_dir=tmp_path)
        message = str(caught.value)
        assert all(f"  {file}\n" in message for file in FILES[name])
        assert f"  {tmp_path / FOLDERS[name]}: all but {FILES[name][0]}\n" in message
        assert f"  {tmp_path / name / FOLDERS[name]}: no such folder\n" in message
        assert f"  {tmp_path / name / ARCHIVES[name]}: no such file\n" in message
        assert "https://www.cs.toronto.edu/~kriz/cifar.html" in message

    def test_without_a_folder(self, name: str) -> None:
        with pytest.raises(FileNotFoundError, match="no folder, for data_dir is None"):
            load(name)

    def test_validation(self, tmp_path: Path, name: str) -> None:
        """Without the file of the test images. CIFAR-100 needs ten images a class for it, which makes a larger file."""
        if name == "cifar100":
            labels = [k % 100 for k in range(1000)]
            images = np.zeros((1000, 3072), np.uint8)
            write(tmp_path, name)
            (tmp_path / "train").write_bytes(by_python_2({b"data": images, b"fine_labels": labels}))
        else:
            write(tmp_path, name)
        (tmp_path / FILES[name][-1]).unlink()
        split = load(name, data_dir=tmp_path, held_out="validation")
        classes = 100 if name == "cifar100" else 10
        assert torch.bincount(split.held_out_y).tolist() == [1] * classes
        assert torch.bincount(split.train_y).tolist() == [9] * classes


class TestDamaged:
    @staticmethod
    def load(tmp_path: Path, change: dict[bytes, Any] | None = None, *, raw: bytes | None = None) -> None:
        folder = write(tmp_path / FOLDERS["cifar10"], "cifar10")
        changed = content("cifar10", 2) | (change or {})
        (folder / "data_batch_3").write_bytes(by_python_2(changed) if raw is None else raw)
        load("cifar10", data_dir=tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {b"data": None},
                r"must hold an array 'data'; its keys are \['batch_label', 'data', 'filenames', 'labels'\]",
            ),
            (
                {b"data": np.zeros((COUNT, 3071), np.uint8)},
                r"must have 3 x 32 x 32 values .* got an array \(20, 3071\)",
            ),
            ({b"data": np.zeros((COUNT - 1, 3072), np.uint8)}, "19 images and 20 labels, must be equally many"),
            ({b"data": np.zeros((COUNT, 3072), np.float32)}, "an array of anything but unsigned bytes"),
            ({b"data": np.zeros((COUNT, 3072), np.int8)}, "an array of anything but unsigned bytes"),
            ({b"data": np.zeros((2, 2), object)}, "an array of anything but unsigned bytes"),
            ({b"labels": None}, "must hold a list of classes 'labels'"),
            ({b"labels": [b"cat"] * COUNT}, "must hold a list of classes 'labels'"),
            ({b"labels": [True] * COUNT}, "must hold a list of classes 'labels'"),
            ({b"labels": [3] * (COUNT - 1)}, "20 images and 19 labels, must be equally many"),
            ({b"labels": [3] * (COUNT - 1) + [10]}, r"labels must lie in \[0, 10\), got labels from 3 to 10"),
            ({b"labels": [3] * (COUNT - 1) + [-1]}, r"labels must lie in \[0, 10\), got labels from -1 to 3"),
            ({b"labels": [3] * (COUNT - 1) + [2**64]}, "got labels from 3 to 18446744073709551616"),
        ],
        ids=lambda value: None if isinstance(value, str) else next(iter(value)).decode(),
    )
    def test_the_file_and_what_was_wrong(self, tmp_path: Path, change: dict[bytes, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            self.load(tmp_path, change)
        assert str(caught.value).startswith(f"{tmp_path / FOLDERS['cifar10'] / 'data_batch_3'}: ")

    def test_the_other_data_set(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"must hold a list of classes 'labels'; its keys are .*'fine_labels'"):
            self.load(tmp_path, raw=by_python_2(content("cifar100", 0)))

    @pytest.mark.parametrize("raw", [b"", b"<html>", b"\0" * 100, b"\x80\x02.", b"\x80\x02N.", b"\x80\x02]."])
    def test_no_pickle_of_a_dictionary(self, tmp_path: Path, raw: bytes) -> None:
        with pytest.raises(ValueError, match="data_batch_3: cannot be read as a pickle of plain values"):
            self.load(tmp_path, raw=raw)

    def test_larger_than_any(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dataset_files, "LARGEST", 70_000)
        with pytest.raises(ValueError, match="data_batch_3: holds more than 70,000 bytes"):
            self.load(tmp_path, raw=gzip.compress(bytes(100_000)))


class TestArchive:
    @staticmethod
    def archive(tmp_path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
        path = tmp_path / ARCHIVES["cifar100"]
        with tarfile.open(path, "w:gz") as archive:
            for info, file_content in members:
                info.size = len(file_content)
                archive.addfile(info, io.BytesIO(file_content))
        return path

    @staticmethod
    def good() -> list[tuple[tarfile.TarInfo, bytes]]:
        files = [(f"cifar-100-python/{file}", content("cifar100", n)) for n, file in enumerate(FILES["cifar100"])]
        return [(tarfile.TarInfo(file), by_python_2(value)) for file, value in files]

    def test_a_file_is_missing(self, tmp_path: Path) -> None:
        path = self.archive(tmp_path, self.good()[0])
        with pytest.raises(ValueError, match="has no cifar-100-python/test") as caught:
            load("cifar100", data_dir=tmp_path)
        assert str(caught.value).startswith(f"{path}: ")

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
    def test_something_other_than_a_file(self, tmp_path: Path, kind: bytes) -> None:
        odd = tarfile.TarInfo("cifar-100-python/test")
        odd.type, odd.linkname = kind, "/etc/passwd"
        self.archive(tmp_path, self.good()[0], (odd, b""))
        with pytest.raises(ValueError, match="has no cifar-100-python/test"):
            load("cifar100", data_dir=tmp_path)

    def test_a_sparse_file(self, tmp_path: Path) -> None:
        """Its size is what its header says: a few bytes could fill the memory."""
        sparse = tarfile.TarInfo("cifar-100-python/test")
        sparse.pax_headers = {"GNU.sparse.size": str(2**20), "GNU.sparse.map": "0,0"}
        path = self.archive(tmp_path, self.good()[0], (sparse, b""))
        with tarfile.open(path) as archive:
            assert archive.getmember("cifar-100-python/test").size == 2**20
        with pytest.raises(ValueError, match="has no cifar-100-python/test"):
            load("cifar100", data_dir=tmp_path)

    def test_nothing_is_written(self, tmp_path: Path) -> None:
        outside = tarfile.TarInfo("../outside")
        absolute = tarfile.TarInfo(str(tmp_path / "absolute"))
        self.archive(tmp_path, (outside, b"x"), (absolute, b"x"), *self.good())
        assert_read("cifar100", tmp_path)
        assert os.listdir(tmp_path) == [ARCHIVES["cifar100"]]
        assert not (tmp_path.parent / "outside").exists()

    def test_damage_within(self, tmp_path: Path) -> None:
        (train, whole), test = self.good()
        path = self.archive(tmp_path, (train, whole[:1000]), test)
        with pytest.raises(ValueError, match=f"{path}:cifar-100-python/train: cannot be read"):
            load("cifar100", data_dir=tmp_path)

    def test_truncated(self, tmp_path: Path) -> None:
        path = self.archive(tmp_path, *self.good())
        compressed = path.read_bytes()
        path.write_bytes(compressed[: len(compressed) // 2])
        with pytest.raises(ValueError, match=f"{path}: the gzip data are truncated or damaged"):
            load("cifar100", data_dir=tmp_path)
        path.write_bytes(gzip.compress(gzip.decompress(compressed)[:60_000]))
        with pytest.raises(ValueError, match=f"{path}: the archive is truncated or damaged"):
            load("cifar100", data_dir=tmp_path)

    def test_a_header_that_is_no_number(self, tmp_path: Path) -> None:
        odd = tarfile.TarInfo("cifar-100-python/test")
        odd.pax_headers = {"GNU.sparse.size": "many", "GNU.sparse.map": "0,0"}
        path = self.archive(tmp_path, self.good()[0], (odd, b""))
        with pytest.raises(ValueError, match=f"{path}: the archive is truncated or damaged"):
            load("cifar100", data_dir=tmp_path)

    @pytest.mark.parametrize("raw", [b"", b"not an archive" * 100])
    def test_no_archive(self, tmp_path: Path, raw: bytes) -> None:
        (tmp_path / ARCHIVES["cifar100"]).write_bytes(raw)
        with pytest.raises(ValueError, match="the archive is truncated or damaged"):
            load("cifar100", data_dir=tmp_path)

    def test_larger_than_any(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dataset_files, "LARGEST", 70_000)
        self.archive(tmp_path, *self.good())
        with pytest.raises(ValueError, match="holds more than 70,000 bytes"):
            load("cifar100", data_dir=tmp_path)
