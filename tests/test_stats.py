"""The statistics that come with the loss on request: values, shapes, ties, ignored rows; they change nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, PAIR_IDS, PAIRS, assert_error, random_labels, random_logits, run
from torch import Tensor
from truth import DISTANCES, row_losses

from drsl_kernels import LossStats, fused_drsl_loss, softmax_loss

SIZES = pytest.mark.parametrize("classes", [2, 10, 128, 350])


def margins(z: Tensor, y: Tensor) -> Tensor:
    others = z.scatter(1, y.unsqueeze(1), -torch.inf)
    return z.gather(1, y.unsqueeze(1)).squeeze(1) - others.amax(1)


@pytest.mark.every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", [None, *DISTANCES])
@SIZES
def test_values(classes: int, distance: str | None, dtype: str, backend: str) -> None:
    z, y = random_logits(19, classes, dtype=DTYPES[dtype]), random_labels(19, classes=classes)
    _, stats = softmax_loss(z, y, tau=0.5, distance=distance, return_stats=True, backend=backend)
    assert isinstance(stats, LossStats)
    wide = z.double()
    accumulator = torch.float64 if dtype == "float64" else torch.float32
    cross_entropy = row_losses(wide, y)
    measured = row_losses(wide, y, 1.0, distance=distance or "uniform") - cross_entropy
    for name, got, want in (
        ("cross_entropy", stats.cross_entropy, cross_entropy),
        ("distance", stats.distance, measured),
        ("margin", stats.margin, margins(wide, y)),
    ):
        assert got.dtype == accumulator
        assert_error(name, got, want, want, 32 * torch.finfo(accumulator).eps, scale=1.0)
    assert stats.correct.dtype == torch.bool
    assert torch.equal(stats.correct, wide.argmax(1) == y)


@pytest.mark.parametrize(("truth", "distance"), PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("tau", [0.3, torch.tensor(0.3), torch.full((9,), 0.3)], ids=["float", "scalar", "rows"])
def test_asking_for_them_changes_nothing(truth: str, distance: str | None, tau: Tensor | float, backend: str) -> None:
    z, y = random_logits(9, 5), random_labels(9, classes=5)
    arguments: dict[str, Any] = {"truth": truth, "distance": distance, "reduction": "none", "backend": backend}
    want = run(z, y, tau, **arguments)
    leaf = z.clone().requires_grad_()
    tau_leaf = tau.clone().requires_grad_() if isinstance(tau, Tensor) else tau
    loss, _ = softmax_loss(leaf, y, tau=tau_leaf, return_stats=True, **arguments)
    inputs = [leaf, tau_leaf] if isinstance(tau_leaf, Tensor) else [leaf]
    grads = torch.autograd.grad(loss.sum(), inputs, materialize_grads=True)
    for got, wanted in zip((loss, *grads), want, strict=False):
        torch.testing.assert_close(got, wanted)


def test_they_are_of_the_logits_not_of_the_loss(backend: str) -> None:
    """Class weights, smoothing, scale and margin shape the loss; cross-entropy and margin stay those of the logits."""
    z, y = random_logits(9, 5), random_labels(9, classes=5)
    weight = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0])
    _, plain = fused_drsl_loss(z, y, 0.5, return_stats=True, backend=backend)
    _, stats = fused_drsl_loss(
        z, y, 0.5, weight=weight, label_smoothing=0.2, reduction="sum", return_stats=True, backend=backend
    )
    torch.testing.assert_close(tuple(stats), tuple(plain))


def test_they_are_detached(backend: str) -> None:
    z, y = random_logits(4, 5).requires_grad_(), random_labels(4, classes=5)
    tau = torch.tensor(0.5, requires_grad=True)
    loss, stats = fused_drsl_loss(z, y, tau, return_stats=True, backend=backend)
    assert loss.requires_grad
    assert not any(t.requires_grad for t in stats)
    loss.backward()
    assert z.grad is not None


@pytest.mark.parametrize("content", [0.0, float("nan"), float("inf")], ids=["plain", "nan", "inf"])
def test_ignored_rows_hold_zeros_and_false(content: float, backend: str) -> None:
    z, y = random_logits(4, 5), torch.tensor([1, -100, 2, -100])
    z[1], z[3, 0] = content, content
    _, stats = fused_drsl_loss(z, y, 0.5, return_stats=True, backend=backend)
    ignored = [1, 3]
    for values in stats:
        assert not values[ignored].any()
    assert stats.cross_entropy[[0, 2]].all()


def test_ties_are_not_correct(backend: str) -> None:
    z = torch.tensor([[2.0, 2.0, 1.0], [2.0, 1.0, 2.0], [2.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    _, stats = fused_drsl_loss(z, torch.tensor([0, 0, 0, 2]), 0.5, return_stats=True, backend=backend)
    assert stats.margin.tolist() == [0.0, 0.0, 1.0, 0.0]
    assert stats.correct.tolist() == [False, False, True, False]


def test_a_row_with_nan_is_not_correct(backend: str) -> None:
    z = random_logits(3, 5)
    z[1, 2] = torch.nan
    for label in (0, 2):
        y = torch.full((3,), label)
        _, stats = fused_drsl_loss(z, y, 0.5, return_stats=True, backend=backend)
        assert not stats.correct[1]
        assert stats.cross_entropy[1].isnan()


@SIZES
def test_accuracy_is_that_of_argmax(classes: int, backend: str) -> None:
    z, y = random_logits(500, classes), random_labels(500, classes=classes)
    z[torch.arange(500), y] += 2.0
    _, stats = fused_drsl_loss(z, y, 0.5, return_stats=True, backend=backend)
    accuracy = stats.correct.double().mean()
    assert accuracy == (z.argmax(1) == y).double().mean()
    assert 0 < accuracy < 1


@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 5, 2, 3), (0, 5)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_shapes(shape: tuple[int, ...], reduction: str, backend: str) -> None:
    z = random_logits(*shape)
    rows = () if len(shape) == 1 else (shape[0], *shape[2:])
    y = random_labels(*rows, classes=5)
    loss, stats = fused_drsl_loss(z, y, 0.5, reduction=reduction, return_stats=True, backend=backend)
    assert loss.shape == (rows if reduction == "none" else ())
    assert all(values.shape == rows for values in stats)


def test_masked_classes_and_labels(backend: str) -> None:
    z = torch.tensor([[1.0, -torch.inf, 3.0], [-torch.inf, 1.0, 2.0], [1.0, -torch.inf, -torch.inf]])
    _, stats = fused_drsl_loss(z, torch.tensor([0, 0, 0]), 0.5, return_stats=True, backend=backend)
    assert stats.margin.tolist() == [-2.0, -torch.inf, torch.inf]
    assert stats.correct.tolist() == [False, False, True]
    assert stats.cross_entropy[1] == torch.inf
    assert stats.cross_entropy[2] == 0
