"""Loss and gradients of every member of the family against the float64 truth: all truths, distances, options,
reductions, dtypes and backends; then all sizes around the edges of vectors, tiles and blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import DTYPES, PAIR_IDS, PAIRS, assert_true, random_labels, random_logits

ROWS, CLASSES = 17, 11
TAU = 0.7

# Class 3 weighs nothing: its rows drop out of the loss and of the mean.
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0, 0.25, 1.5, 1.0, 0.75, 1.25, 4.0])


def tau_rows() -> torch.Tensor:
    return torch.linspace(-0.5, 1.5, ROWS)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"weight": CLASS_WEIGHTS},
    "smoothing": {"label_smoothing": 0.15},
    "full_smoothing": {"label_smoothing": 1.0},
    "weight_smoothing": {"weight": CLASS_WEIGHTS, "label_smoothing": 0.15},
    "ignore": {"ignore_index": 4},
    "ignore_weight_smoothing": {"ignore_index": 4, "weight": CLASS_WEIGHTS, "label_smoothing": 0.3},
    "scale_margin": {"scale": 1.7, "margin": 0.35},
    "scale_margin_weight": {"scale": 0.6, "margin": -0.5, "weight": CLASS_WEIGHTS},
    "tau_scalar": {"tau": torch.tensor(TAU)},
    "tau_rows": {"tau": tau_rows()},
    "tau_rows_everything": {
        "tau": tau_rows(),
        "ignore_index": 4,
        "weight": CLASS_WEIGHTS,
        "scale": 1.3,
        "margin": 0.2,
    },
    "smoothing_everything": {
        "tau": tau_rows(),
        "ignore_index": 4,
        "weight": CLASS_WEIGHTS,
        "scale": 1.3,
        "margin": 0.2,
        "label_smoothing": 0.2,
    },
}


def members() -> Iterator[Any]:
    """(truth, distance, option, dtype): half precision adds loads and stores only, so it runs fewer options."""
    for (truth, distance), pair in zip(PAIRS, PAIR_IDS, strict=True):
        for option, arguments in OPTIONS.items():
            if "label_smoothing" in arguments and truth != "ce":  # defined for ce alone
                continue
            for dtype in DTYPES:
                if dtype in ("float64", "float32") or option in ("plain", "scale_margin_weight", "tau_rows_everything"):
                    yield pytest.param(truth, distance, option, dtype, id=f"{pair}-{option}-{dtype}")


@pytest.mark.parametrize(("truth", "distance", "option", "dtype"), list(members()))
def test_every_member_and_option(truth: str, distance: str | None, option: str, dtype: str, backend: str) -> None:
    options = dict(OPTIONS[option])
    tau = options.pop("tau", TAU)
    z = random_logits(ROWS, CLASSES, dtype=DTYPES[dtype])
    y = random_labels(ROWS, classes=CLASSES)
    arguments = {"truth": truth, "distance": distance, "backend": backend, **options}
    assert 4 in y
    assert_true(z, y, tau, reduction="mean", **arguments)
    assert_true(z, y, tau, reduction="sum", upstream=torch.tensor(-2.5), **arguments)
    assert_true(z, y, tau, reduction="none", upstream=torch.linspace(-1, 2, ROWS), **arguments)


@pytest.mark.every_capability
@pytest.mark.parametrize("q", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gce_exponent(q: float, dtype: str, backend: str) -> None:
    z, y = random_logits(ROWS, CLASSES, dtype=DTYPES[dtype]), random_labels(ROWS, classes=CLASSES)
    assert_true(z, y, TAU, truth="gce", q=q, distance="uniform", backend=backend)


# One member for each set of terms that the kernels are compiled for: exponentials alone, squares, moments, and
# the weighted mean of smoothing with class weights.
TERM_SETS: dict[str, dict[str, Any]] = {
    "exponentials": {"distance": None},
    "squares": {"distance": "uniform"},
    "moments": {"distance": "non_target_logits"},
    "moments_kl": {"distance": "kl", "label_smoothing": 0.1},
    "weighted_mean": {"distance": "conditional", "label_smoothing": 0.1, "weight": True},
}


def check_size(rows: int, classes: int, dtype: str, terms: str, backend: str) -> None:
    arguments = dict(TERM_SETS[terms])
    if "weight" in arguments:
        arguments["weight"] = random_logits(classes, seed=5).abs() + 0.1
    z = random_logits(rows, classes, dtype=DTYPES[dtype], seed=rows)
    y = random_labels(rows, classes=classes, seed=classes)
    y[0], y[-1] = 0, classes - 1
    # Sums of n values of varying sign may round like sqrt(n).
    assert_true(z, y, TAU, backend=backend, tolerance=32 + classes**0.5, **arguments)


@pytest.mark.every_capability
@pytest.mark.parametrize("terms", TERM_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 100])
def test_few_classes(classes: int, dtype: str, terms: str, backend: str) -> None:
    check_size(33, classes, dtype, terms, backend)


@pytest.mark.every_capability
@pytest.mark.parametrize("terms", TERM_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "classes", [127, 144, 256, 319, 320, 321, 335, 336, 337, 1000, 1003, 4095, 4096, 4097, 8192, 8193]
)
def test_many_classes(classes: int, dtype: str, terms: str, backend: str) -> None:
    check_size(17, classes, dtype, terms, backend)


@pytest.mark.every_capability
@pytest.mark.parametrize("terms", TERM_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vocabulary(dtype: str, terms: str, backend: str) -> None:
    check_size(3, 32771, dtype, terms, backend)


def test_more_classes_than_any_vocabulary(backend: str) -> None:
    check_size(2, 140000, "float32", "squares", backend)


@pytest.mark.parametrize("terms", TERM_SETS)
@pytest.mark.parametrize("classes", [10, 130, 1000])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33])
def test_rows_around_a_vector(rows: int, classes: int, terms: str, backend: str) -> None:
    check_size(rows, classes, "float32", terms, backend)


@pytest.mark.backends("cpp", "reference")
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "classes"), [(5000, 10), (700, 100), (300, 1000)])
def test_enough_rows_for_two_threads(rows: int, classes: int, dtype: str, backend: str, two_threads: None) -> None:
    check_size(rows, classes, dtype, "squares", backend)


@pytest.mark.every_capability
@pytest.mark.parametrize("position", range(20))
def test_every_position_of_the_label(position: int, backend: str) -> None:
    """The label is left out of the rest wherever it stands in a vector, at C = 20 (tiles) and 340 (row sweep)."""
    for classes, label in ((20, position), (340, position), (340, 320 + position)):
        z = random_logits(5, classes, seed=position)
        y = torch.full((5,), label)
        z[torch.arange(5), y] += 3.0
        assert_true(z, y, TAU, distance="kl", label_smoothing=0.1, backend=backend)
        assert_true(z, y, TAU, distance="uniform", backend=backend)
