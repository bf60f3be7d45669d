"""Data sets from IDX files, their parts, what is said of missing and damaged files, and label noise."""

from __future__ import annotations

import gzip
import math
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from drsl_kernels.robustness import data, dataset_files, idx_files
from drsl_kernels.robustness.data import DATASETS, dataset_info, digits, load, noisy_labels

IDX_NAMES = ("fashion_mnist", "mnist")
FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
TRAIN, TEST = 120, 7  # images

Bytes = NDArray[np.uint8]


def idx(array: Bytes) -> bytes:
    """The IDX file of an array, put together from the description of the format."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def images(count: int, seed: int = 0) -> Bytes:
    return np.random.RandomState(seed).randint(0, 256, (count, 28, 28)).astype(np.uint8)


def labels(count: int) -> Bytes:
    return (np.arange(count) * 7 % 10).astype(np.uint8)


ZIPPED = gzip.compress(idx(labels(9)), mtime=0)


def write(folder: Path, *, zipped: bool = False, seed: int = 0, train: int = TRAIN) -> Path:
    """The four files of a small data set with 28x28 images."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = (images(train, seed), labels(train), images(TEST, seed + 1), labels(TEST))
    for name, array in zip(FILES, arrays, strict=True):
        content = idx(array)
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    return folder


class TestIdx:
    @pytest.mark.parametrize("zipped", [False, True], ids=["raw", "gzipped"])
    @pytest.mark.parametrize("name", IDX_NAMES)
    def test_read_back_bit_for_bit(self, tmp_path: Path, name: str, zipped: bool) -> None:
        split = load(name, data_dir=write(tmp_path, zipped=zipped))
        for x, y, expected in (
            (split.train_x, split.train_y, images(TRAIN)),
            (split.held_out_x, split.held_out_y, images(TEST, 1)),
        ):
            assert x.shape == (len(expected), 1, 28, 28)
            assert x.dtype == torch.float32
            assert y.dtype == torch.int64
            assert np.array_equal(x.numpy()[:, 0], expected / np.float32(255))
            assert np.array_equal(y.numpy(), labels(len(expected)))
        assert split.train_x.max() == 1
        assert split.train_x.min() == 0

    @pytest.mark.parametrize(
        ("name", "folder"),
        [
            ("mnist", "mnist"),
            ("mnist", "MNIST/raw"),
            ("fashion_mnist", "fashion_mnist"),
            ("fashion_mnist", "fashion-mnist"),
            ("fashion_mnist", "FashionMNIST/raw"),
        ],
    )
    def test_a_folder_of_its_own_comes_first(self, tmp_path: Path, name: str, folder: str) -> None:
        write(tmp_path, seed=5)
        write(tmp_path / folder)
        assert np.array_equal(load(name, data_dir=tmp_path).train_x[0, 0].numpy(), images(1)[0] / np.float32(255))

    def test_debian_s_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(idx_files, "DEBIAN_FASHION_MNIST", write(tmp_path / "debian", zipped=True))
        first = load("fashion_mnist").train_x[0]
        with pytest.raises(FileNotFoundError, match="elsewhere: no such folder"):
            load("fashion_mnist", data_dir=tmp_path / "elsewhere")
        write(tmp_path, seed=5)
        assert not torch.equal(load("fashion_mnist", data_dir=tmp_path).train_x[0], first)
        with pytest.raises(FileNotFoundError, match="no folder, for data_dir is None"):
            load("mnist")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "not an IDX file, which begins with 00 00; this one with ''"),
            (b"<html>", "not an IDX file, which begins with 00 00; this one with '3c 68 74 6d'"),
            (b"\0\0\x0d\x01" + idx(labels(9))[4:], "must be unsigned bytes, type 0x08, got type 0x0d"),
            (idx(images(1)), "must have 1 dimensions, got 3"),
            (idx(labels(9))[:7], "truncated within its header, after 7 of 8 bytes"),
            (idx(labels(9))[:-1], "truncated: its sizes are 9, 9 bytes, but 8 follow"),
            (idx(labels(9)) + b"\0", "too long: its sizes are 9, 9 bytes, but 10 follow"),
            (b"\0\0\x08\x01" + b"\xff" * 4, "truncated: its sizes are 4294967295, 4294967295 bytes, but 0 follow"),
            (b"\0\0\x08\x01" + b"\0" * 4, "holds no values, its sizes being 0"),
            (ZIPPED[:-9], "the gzip data are truncated or damaged: Compressed file ended"),
            (ZIPPED[:-8] + bytes(8), "the gzip data are truncated or damaged: CRC check failed"),
            (b"\x1f\x8b\x08" + b"\xff" * 40, "the gzip data are truncated or damaged"),
            (idx(labels(1001)), "holds more than 1,000 bytes"),
            (gzip.compress(bytes(100_000)), "holds more than 1,000 bytes"),
        ],
    )
    def test_damaged(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str) -> None:
        monkeypatch.setattr(dataset_files, "LARGEST", 1000)
        path = tmp_path / "labels"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            idx_files.read_idx(path, 1)
        assert str(caught.value).startswith(f"{path}: ")

    def test_no_more_is_decompressed_than_may_be(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dataset_files, "LARGEST", 1000)
        path = tmp_path / "labels"
        path.write_bytes(gzip.compress(bytes(2**25)))
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="holds more than 1,000 bytes"):
                idx_files.read_idx(path, 1)
            assert tracemalloc.get_traced_memory()[1] < 2**22
        finally:
            tracemalloc.stop()

    def test_absurd_sizes_whose_product_wraps(self, tmp_path: Path) -> None:
        """2^32 times 2^32 is 0 in 64 bits; so is 2^16 * 2^16 in 32."""
        path = tmp_path / "images"
        path.write_bytes(b"\0\0\x08\x03" + struct.pack(">3I", 2**31, 2**31, 4))
        with pytest.raises(
            ValueError, match="truncated: its sizes are 2147483648 x 2147483648 x 4, 18446744073709551616"
        ):
            idx_files.read_idx(path, 3)

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            (FILES[1], idx(labels(TRAIN - 1)), f"{FILES[0]} and {FILES[1]}: {TRAIN} images and {TRAIN - 1} labels"),
            (FILES[3], idx(np.full(TEST, 10, np.uint8)), r"labels must lie in \[0, 10\), got labels from 10 to 10"),
            (
                FILES[0],
                idx(images(TRAIN)[:, :27]),
                r"must have 1 x 28 x 28 values of one byte, got an array \(120, 27, 28\)",
            ),
        ],
    )
    def test_files_that_do_not_fit(self, tmp_path: Path, file: str, content: bytes, message: str) -> None:
        (write(tmp_path) / file).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load("mnist", data_dir=tmp_path)

    @pytest.mark.parametrize(("name", "other"), [IDX_NAMES, IDX_NAMES[::-1]])
    def test_the_other_data_set_under_the_same_names(self, tmp_path: Path, name: str, other: str) -> None:
        first = {"mnist": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], "fashion_mnist": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]}
        changed = labels(TRAIN)
        changed[:10] = first[other]
        (write(tmp_path) / FILES[1]).write_bytes(idx(changed))
        assert len(load(other, data_dir=tmp_path).train_y) == TRAIN
        with pytest.raises(ValueError, match=f"{FILES[1]}: these are the labels of {other}, not of {name}"):
            load(name, data_dir=tmp_path)


class TestMissing:
    @pytest.mark.parametrize("name", IDX_NAMES)
    def test_every_file_and_every_folder_is_named(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).mkdir()
        with pytest.raises(FileNotFoundError) as caught:
            load(name, data_dir=tmp_path)
        message = str(caught.value)
        assert all(f"  {file} (or .gz)\n" in message for file in FILES)
        assert f"  {tmp_path / name}: none of them\n" in message
        assert f"  {tmp_path}: none of them\n" in message
        assert "/raw: no such folder\n" in message
        assert "/usr/share/datasets" not in message
        assert ("apt install dataset-fashion-mnist" in message) == (name == "fashion_mnist")

    def test_files_of_two_folders_are_not_mixed(self, tmp_path: Path) -> None:
        write(tmp_path)
        write(tmp_path / "mnist")
        (tmp_path / FILES[1]).unlink()
        (tmp_path / "mnist" / FILES[2]).unlink()
        with pytest.raises(FileNotFoundError) as caught:
            load("mnist", data_dir=tmp_path)
        assert f"  {tmp_path}: all but {FILES[1]}\n" in str(caught.value)
        assert f"  {tmp_path / 'mnist'}: all but {FILES[2]}\n" in str(caught.value)

    def test_a_folder_in_the_place_of_a_file(self, tmp_path: Path) -> None:
        (write(tmp_path) / FILES[0]).unlink()
        (tmp_path / FILES[0]).mkdir()
        with pytest.raises(FileNotFoundError, match=f"all but {FILES[0]}"):
            load("mnist", data_dir=tmp_path)


class TestValidation:
    def test_a_tenth_of_the_training_images_by_class(self, tmp_path: Path) -> None:
        write(tmp_path, train=600)
        whole, part = load("mnist", data_dir=tmp_path), load("mnist", data_dir=tmp_path, held_out="validation")
        assert torch.bincount(part.held_out_y).tolist() == [6] * 10
        assert torch.bincount(part.train_y).tolist() == [54] * 10

        def keys(x: torch.Tensor) -> list[bytes]:
            return [image.numpy().tobytes() for image in x]

        everything, kept, set_aside = keys(whole.train_x), keys(part.train_x), keys(part.held_out_x)
        assert not set(kept) & set(set_aside)
        assert set(kept) | set(set_aside) == set(everything)
        label_of = dict(zip(everything, whole.train_y.tolist(), strict=True))
        assert [label_of[key] for key in kept + set_aside] == part.train_y.tolist() + part.held_out_y.tolist()
        assert kept == [key for key in everything if key in set(kept)], "the order of the files"

    def test_always_the_same(self, tmp_path: Path) -> None:
        write(tmp_path)
        held_out = [load("mnist", data_dir=tmp_path, held_out="validation").held_out_y for _ in range(2)]
        torch.manual_seed(1)
        np.random.seed(1)
        held_out.append(load("mnist", data_dir=tmp_path, held_out="validation").held_out_y)
        assert all(torch.equal(y, held_out[0]) for y in held_out)

    def test_which_images_those_are(self, tmp_path: Path) -> None:
        """Written down, for results on them must not change with a version of anything."""
        write(tmp_path)
        whole, part = load("mnist", data_dir=tmp_path), load("mnist", data_dir=tmp_path, held_out="validation")
        rows = [int((whole.train_x == image).flatten(1).all(1).nonzero()) for image in part.held_out_x]
        assert rows == [6, 9, 13, 22, 27, 40, 41, 54, 70, 105, 115, 118]

    def test_the_test_images_are_not_opened(self, tmp_path: Path) -> None:
        write(tmp_path)
        for file in FILES[2:]:
            (tmp_path / file).unlink()
        assert len(load("mnist", data_dir=tmp_path, held_out="validation").train_y) == TRAIN - TRAIN // 10
        with pytest.raises(FileNotFoundError):
            load("mnist", data_dir=tmp_path)

    def test_too_few_images(self, tmp_path: Path) -> None:
        write(tmp_path, train=99)
        with pytest.raises(
            ValueError, match=r"mnist: held_out='validation' sets one .* each of the 10 .* there are 99"
        ):
            load("mnist", data_dir=tmp_path, held_out="validation")


class TestDatasets:
    def test_names(self) -> None:
        assert DATASETS == ("digits", "fashion_mnist", "mnist", "cifar10", "cifar100")

    @pytest.mark.parametrize("name", DATASETS)
    def test_info(self, name: str) -> None:
        info = dataset_info(name)
        assert info.name == name
        assert len(info.mean) == len(info.std) == info.shape[0] == (3 if "cifar" in name else 1)
        assert info.shape[1:] == {"digits": (8, 8), "cifar10": (32, 32), "cifar100": (32, 32)}.get(name, (28, 28))
        assert info.classes == (100 if name == "cifar100" else 10)

    @pytest.mark.parametrize("held_out", data.PARTS)
    def test_digits(self, held_out: data.Part) -> None:
        loaded, expected = load("digits", held_out=held_out, data_dir=Path("/nowhere")), digits(held_out)
        assert torch.equal(loaded.train_x, expected.train_x)
        assert torch.equal(loaded.held_out_y, expected.held_out_y)
        assert loaded.train_x.shape[1:] == dataset_info("digits").shape

    def test_unknown(self) -> None:
        message = "name must be one of digits, fashion_mnist, mnist, cifar10, cifar100, got 'svhn'"
        with pytest.raises(ValueError, match=message):
            load("svhn")
        with pytest.raises(ValueError, match=message):
            dataset_info("svhn")

    @pytest.mark.parametrize("name", DATASETS)
    def test_unknown_part(self, name: str) -> None:
        with pytest.raises(ValueError, match="held_out must be 'test' or 'validation', got 'train'"):
            load(name, held_out="train")  # type: ignore[arg-type]


def test_fashion_mnist_where_it_is_installed() -> None:
    """Facts of the published files, for which nothing else is needed than the package of Debian."""
    try:
        split = load("fashion_mnist")
    except FileNotFoundError:
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    assert split.train_x.shape == (60_000, 1, 28, 28)
    assert split.held_out_x.shape == (10_000, 1, 28, 28)
    assert torch.bincount(split.train_y).tolist() == [6000] * 10
    assert torch.bincount(split.held_out_y).tolist() == [1000] * 10
    info = dataset_info("fashion_mnist")
    assert split.train_x.double().mean().item() == pytest.approx(info.mean[0], abs=5e-5)
    assert split.train_x.double().std().item() == pytest.approx(info.std[0], abs=5e-5)


class TestLabelNoise:
    Y = torch.randint(10, (100_000,), generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("rate", [0.1, 0.4, 0.9])
    def test_share_of_changed_labels(self, rate: float) -> None:
        changed = noisy_labels(self.Y, rate, classes=10, seed=3) != self.Y
        deviation = math.sqrt(rate * (1 - rate) / len(self.Y))
        assert changed.double().mean().item() == pytest.approx(rate, abs=4 * deviation)
        for label in range(10):
            of_this = changed[label == self.Y].double()
            assert of_this.mean().item() == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / len(of_this)))

    def test_the_other_classes_are_equally_likely(self) -> None:
        noisy = noisy_labels(self.Y, 1.0, classes=10, seed=3)
        pairs = torch.bincount(self.Y * 10 + noisy, minlength=100).view(10, 10)
        assert pairs.diagonal().sum() == 0
        expected = pairs.sum(1, keepdim=True) / 9 * (1 - torch.eye(10))
        assert (pairs - expected).abs().max() < 4.5 * expected.max().sqrt()

    def test_depends_on_the_seed_alone(self) -> None:
        noisy = noisy_labels(self.Y, 0.4, classes=10, seed=3)
        torch.manual_seed(9)
        before = torch.get_rng_state()
        assert torch.equal(noisy_labels(self.Y, 0.4, classes=10, seed=3), noisy)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(noisy_labels(self.Y, 0.4, classes=10, seed=4), noisy)

    def test_less_noise_is_part_of_more(self) -> None:
        less, more = (noisy_labels(self.Y, rate, classes=10, seed=3) for rate in (0.2, 0.6))
        changed = less != self.Y
        assert torch.equal(less[changed], more[changed])

    def test_which_labels_those_are(self) -> None:
        """Written down, for results under noise must not change with a version of anything."""
        assert noisy_labels(torch.arange(10), 0.4, classes=10, seed=0).tolist() == [0, 1, 2, 3, 4, 5, 4, 6, 8, 0]

    @pytest.mark.parametrize(("rate", "expected"), [(0, [0, 1, 1, 0]), (1, [1, 0, 0, 1])])
    def test_none_and_all(self, rate: float, expected: list[int]) -> None:
        y = torch.tensor([0, 1, 1, 0])
        noisy = noisy_labels(y, rate, classes=2, seed=0)
        assert noisy.tolist() == expected
        assert noisy.data_ptr() != y.data_ptr()
        assert y.tolist() == [0, 1, 1, 0]

    def test_no_labels(self) -> None:
        assert noisy_labels(torch.empty(0, dtype=torch.int64), 0.4, classes=10, seed=0).shape == (0,)

    @pytest.mark.parametrize(
        ("rate", "classes", "y", "message"),
        [
            (-0.1, 10, [0], "rate must be from 0 to 1, got -0.1"),
            (1.1, 10, [0], "rate must be from 0 to 1, got 1.1"),
            (math.nan, 10, [0], "rate must be from 0 to 1, got nan"),
            (0.4, 1, [0], "classes must be 2 or more, got 1"),
            (0.4, 10, [3, 10], r"y must lie in \[0, 10\), got labels from 3 to 10"),
            (0.4, 10, [-1, 3], r"y must lie in \[0, 10\), got labels from -1 to 3"),
        ],
    )
    def test_bad_input(self, rate: float, classes: int, y: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            noisy_labels(torch.tensor(y), rate, classes=classes, seed=0)

    def test_wrong_dtype(self) -> None:
        with pytest.raises(TypeError, match=r"y must hold class indices of dtype int64, got torch.float32"):
            noisy_labels(torch.zeros(3), 0.4, classes=10, seed=0)
