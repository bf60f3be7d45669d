"""Losses, gradients and statistics of both GPU backends against the float64 truth."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import DTYPES, PAIR_IDS, PAIRS, random_labels, random_logits
from on_device import assert_true_on, pick
from truth import DISTANCES

from drsl_kernels import fused_drsl_loss, softmax_loss

pytestmark = pytest.mark.gpu

# (rows, classes): several rows per program, and rows that are too long for one
FEW, MANY = (33, 10), (3, 9001)
SHAPES = pytest.mark.parametrize("shape", [FEW, MANY], ids=["few", "many"])


@SHAPES
@pytest.mark.parametrize(("truth", "distance"), PAIRS, ids=PAIR_IDS)
def test_every_loss(
    truth: str, distance: str | None, shape: tuple[int, int], device: torch.device, gpu_backend: str
) -> None:
    z, y = random_logits(*shape), random_labels(shape[0], classes=shape[1])
    assert_true_on(device, z, y, 0.5, truth=truth, distance=distance, backend=gpu_backend)


@SHAPES
@pytest.mark.parametrize("distance", [None, *DISTANCES])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_every_dtype(
    dtype: str, distance: str | None, shape: tuple[int, int], device: torch.device, gpu_backend: str
) -> None:
    z, y = random_logits(*shape, dtype=DTYPES[dtype]), random_labels(shape[0], classes=shape[1])
    assert_true_on(device, z, y, 0.5, distance=distance, backend=gpu_backend)


# Around vectors, warps, tiles and slices
@pytest.mark.parametrize(
    "classes", [1, 2, 3, 31, 32, 33, 100, 127, 129, 1000, 1023, 1025, 2049, 4096, 4099, 8191, 8193, 12288, 16385, 50257]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes(dtype: str, classes: int, device: torch.device, gpu_backend: str) -> None:
    rows = pick(device, 7, 2)
    z, y = random_logits(rows, classes, dtype=DTYPES[dtype]), random_labels(rows, classes=classes)
    assert_true_on(device, z, y, 0.5, distance="uniform", backend=gpu_backend)


@pytest.mark.parametrize("distance", [None, "uniform", "kl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_huge_number_of_classes(dtype: str, distance: str | None, device: torch.device, gpu_backend: str) -> None:
    classes = pick(device, 262147, 20001)
    z, y = random_logits(2, classes, dtype=DTYPES[dtype]), random_labels(2, classes=classes)
    assert_true_on(device, z, y, 0.5, distance=distance, backend=gpu_backend)


@pytest.mark.parametrize("rows", [1, 1000, 70001])
def test_numbers_of_rows(rows: int, device: torch.device, gpu_backend: str) -> None:
    rows = pick(device, rows, min(rows, 100))
    assert_true_on(
        device, random_logits(rows, 10), random_labels(rows, classes=10), 0.5, distance="uniform", backend=gpu_backend
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "smoothing": {"label_smoothing": 0.1, "distance": "uniform"},
    "margin_scale": {"margin": 0.35, "scale": 2.0, "distance": "kl"},
    "gce": {"truth": "gce", "q": 0.3, "distance": "non_target"},
    "truncated_gce": {"truth": "gce", "threshold": 0.2, "distance": "uniform"},
    "sigsoftmax": {"activation": "sigsoftmax", "distance": "uniform"},
    "sigsoftmax_smoothing": {"activation": "sigsoftmax", "label_smoothing": 0.1, "distance": "kl"},
}


@SHAPES
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, reduction: str, shape: tuple[int, int], device: torch.device, gpu_backend: str) -> None:
    """Together with class weights, one tau per row, ignored rows and an upstream gradient other than 1."""
    rows, classes = shape
    y = random_labels(rows, classes=classes)
    y[1] = -100
    upstream = random_logits(rows, seed=7) if reduction == "none" else torch.tensor(3.0)
    assert_true_on(
        device,
        random_logits(rows, classes),
        y,
        random_logits(rows, seed=3),
        weight=random_logits(classes, seed=4).abs(),
        upstream=upstream,
        reduction=reduction,
        backend=gpu_backend,
        **OPTIONS[options],
    )


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["softmax", "sigsoftmax"])
def test_margins_of_classes(
    activation: str, dtype: str, shape: tuple[int, int], device: torch.device, gpu_backend: str
) -> None:
    rows, classes = shape
    z, y = random_logits(rows, classes, dtype=DTYPES[dtype]), random_labels(rows, classes=classes)
    margin = random_logits(classes, seed=5)
    assert_true_on(device, z, y, 0.5, distance="conditional", margin=margin, activation=activation, backend=gpu_backend)


@SHAPES
def test_masked_classes(shape: tuple[int, int], device: torch.device, gpu_backend: str) -> None:
    """Whole stretches of -inf, which fill tiles and warps."""
    rows, classes = shape
    z = random_logits(rows, classes)
    z[:, : classes // 2] = -torch.inf
    z[0, -3:] = -torch.inf
    y = torch.full((rows,), classes // 2)
    assert_true_on(device, z, y, 0.5, distance="uniform", backend=gpu_backend)
    assert_true_on(device, z, y, 0.5, distance="kl", backend=gpu_backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(dtype: str, device: torch.device, gpu_backend: str) -> None:
    for rows, classes in (FEW, MANY):
        z, y = random_logits(rows, classes, dtype=DTYPES[dtype]), random_labels(rows, classes=classes)
        _, got = softmax_loss(z.to(device), y.to(device), return_stats=True, backend=gpu_backend)
        _, want = softmax_loss(z.double(), y, return_stats=True, backend="reference")
        assert torch.equal(got.correct.cpu(), want.correct)
        for name in ("cross_entropy", "distance", "margin"):
            torch.testing.assert_close(getattr(got, name).cpu(), getattr(want, name), check_dtype=False)


def test_saturated_rows_keep_their_digits(device: torch.device, gpu_backend: str) -> None:
    """Where the loss is 2.8e-13 and F.cross_entropy returns 0."""
    z = torch.tensor([[30.0, 0.0, 0.0, 0.0], [60.0, 0.0, 1.0, -1.0]])
    y = torch.zeros(2, dtype=torch.int64)
    assert_true_on(device, z, y, reduction="none", backend=gpu_backend, tolerance=8.0)
    loss = softmax_loss(z.to(device), y.to(device), reduction="none", backend=gpu_backend)
    want = softmax_loss(z.double(), y, reduction="none", backend="reference")
    torch.testing.assert_close(loss.cpu().double(), want, rtol=1e-5, atol=0)


def test_the_default_is_no_fallback(device: torch.device) -> None:
    z, y = random_logits(5, 7).to(device), random_labels(5, classes=7).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_drsl_loss(z, y, 0.5)
