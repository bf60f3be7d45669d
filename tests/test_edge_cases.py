"""The edge cases that have a defined answer, one test each: too few classes, masked classes, infinities, NaN,
ignored rows, empty batches, labels out of range. `F.cross_entropy` is the measure wherever it has an answer.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, PAIR_IDS, PAIRS, assert_true, random_labels, random_logits, run
from torch import Tensor
from truth import DISTANCES

from drsl_kernels import fused_drsl_loss, softmax_loss

INF, NAN = math.inf, math.nan

# The kernels differ below and above 320 classes (tiles, row sweep).
SIZES = pytest.mark.parametrize("classes", [5, 40, 350], ids=["C=5", "C=40", "C=350"])
MEMBERS = pytest.mark.parametrize(("truth", "distance"), PAIRS, ids=PAIR_IDS)
FLOATS = pytest.mark.parametrize("dtype", DTYPES)


def assert_like_torch(z: Tensor, y: Tensor, backend: str, distance: str | None = None, **arguments: Any) -> None:
    """Loss and gradient at tau = 0 equal those of F.cross_entropy, NaN and infinities included."""
    for reduction in ("none", "mean", "sum"):
        reference = z.detach().requires_grad_()
        want = F.cross_entropy(reference, y, reduction=reduction, **arguments)
        want_grad = torch.autograd.grad(want, reference, torch.ones_like(want))[0]
        loss, grad, _ = run(z, y, distance=distance, reduction=reduction, backend=backend, **arguments)
        torch.testing.assert_close(loss, want.detach(), equal_nan=True, check_dtype=False)
        torch.testing.assert_close(grad, want_grad, equal_nan=True)


@FLOATS
@MEMBERS
def test_one_class(truth: str, distance: str | None, dtype: str, backend: str) -> None:
    z = random_logits(3, 1, dtype=DTYPES[dtype])
    tau = torch.tensor([0.5, 1.0, 2.0])
    loss, grad, tau_grad = run(
        z, torch.zeros(3, dtype=torch.long), tau, truth=truth, distance=distance, reduction="none", backend=backend
    )
    assert torch.equal(loss, torch.zeros(3, dtype=loss.dtype))
    assert torch.equal(grad, torch.zeros_like(z))
    assert tau_grad is not None
    assert torch.equal(tau_grad, torch.zeros(3))


def test_one_class_with_weights_and_smoothing(backend: str) -> None:
    z, y = random_logits(3, 1), torch.zeros(3, dtype=torch.long)
    assert_like_torch(z, y, backend, label_smoothing=0.2, weight=torch.tensor([2.0]))


@FLOATS
@MEMBERS
def test_two_classes(truth: str, distance: str | None, dtype: str, backend: str) -> None:
    """The only wrong class has all of the wrong probability: rho = 1, so the even-spread distances are exactly 0."""
    z, y = random_logits(9, 2, dtype=DTYPES[dtype]), random_labels(9, classes=2)
    assert_true(z, y, 0.5, truth=truth, distance=distance, backend=backend)
    if distance not in (None, "uniform"):
        with_it = run(z, y, 0.5, truth=truth, distance=distance, reduction="none", backend=backend)[:2]
        without = run(z, y, 0.0, truth=truth, distance=None, reduction="none", backend=backend)[:2]
        torch.testing.assert_close(with_it, without, rtol=1e-6, atol=1e-7)


def masked(rows: int, classes: int, columns: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    z = random_logits(rows, classes, dtype=dtype)
    z[:, columns] = -INF
    return z


# Where the masked classes stand: in the first vector, in the ragged end, beside and around the label 2.
MASKS = {"first": [0], "end": [-1], "beside_label": [1, 3], "first_and_end": [0, -1]}


@pytest.mark.parametrize("mask", MASKS)
@SIZES
@MEMBERS
def test_masked_classes_do_not_exist(truth: str, distance: str | None, classes: int, mask: str, backend: str) -> None:
    check_masked(truth, distance, "float32", classes, mask, backend)


@pytest.mark.every_capability
@FLOATS
@SIZES
@pytest.mark.parametrize("distance", [None, *DISTANCES])
def test_masked_classes_in_every_dtype(distance: str | None, classes: int, dtype: str, backend: str) -> None:
    check_masked("ce", distance, dtype, classes, "first_and_end", backend)


def check_masked(truth: str, distance: str | None, dtype: str, classes: int, mask: str, backend: str) -> None:
    z = masked(5, classes, MASKS[mask], DTYPES[dtype])
    z[4] = random_logits(classes, dtype=DTYPES[dtype], seed=3)  # one row without a mask
    y = torch.full((5,), 2)
    assert_true(z, y, 0.5, truth=truth, distance=distance, backend=backend)
    grad = run(z, y, 0.5, truth=truth, distance=distance, backend=backend)[1]
    assert torch.equal(grad[:4, MASKS[mask]], torch.zeros_like(grad[:4, MASKS[mask]]))


@pytest.mark.parametrize("mask", MASKS)
@SIZES
def test_masked_classes_with_smoothing_and_weights(classes: int, mask: str, backend: str) -> None:
    z, y = masked(5, classes, MASKS[mask]), torch.full((5,), 2)
    weight = random_logits(classes, seed=4).abs()
    assert_true(z, y, 0.5, distance="kl", label_smoothing=0.2, backend=backend)
    assert_true(z, y, 0.5, distance="uniform", label_smoothing=0.2, weight=weight, backend=backend)


@pytest.mark.parametrize("weight_there", [math.inf, math.nan])
@pytest.mark.parametrize("classes", [3, 10, 100, 400, 3000])
def test_weight_of_a_masked_class(classes: int, weight_there: float, backend: str) -> None:
    z, y, weight = masked(5, classes, [1]).requires_grad_(), torch.tensor([0, 2, 0, 2, 2]), torch.ones(classes)
    weight[1] = weight_there
    loss = fused_drsl_loss(z, y, 0.5, weight=weight, label_smoothing=0.1, reduction="sum", backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert z.grad is not None
    assert (z.grad[:, 1] == 0).all()
    assert z.grad.isfinite().all()


@SIZES
@FLOATS
def test_masked_classes_as_cross_entropy(classes: int, dtype: str, backend: str) -> None:
    z = masked(5, classes, [0, -1], DTYPES[dtype])
    if dtype in ("float32", "float64"):  # F.cross_entropy rounds more often in half precision
        assert_like_torch(z, torch.full((5,), 2), backend)
    assert not run(z, torch.full((5,), 2), backend=backend)[1].isnan().any()


@SIZES
@MEMBERS
def test_whole_rest_masked(truth: str, distance: str | None, classes: int, backend: str) -> None:
    """Nothing is left to confuse the label with: loss 0, gradient 0."""
    z, y = torch.full((3, classes), -INF), torch.tensor([0, 2, classes - 1])
    z[torch.arange(3), y] = torch.tensor([0.5, -3.0, 100.0])
    tau = torch.tensor([0.5, 1.0, 2.0])
    loss, grad, tau_grad = run(z, y, tau, truth=truth, distance=distance, reduction="none", backend=backend)
    assert torch.equal(loss, torch.zeros(3))
    assert torch.equal(grad, torch.zeros_like(z))
    assert tau_grad is not None
    assert torch.equal(tau_grad, torch.zeros(3))


@pytest.mark.every_capability
@SIZES
def test_whole_rest_masked_as_cross_entropy(classes: int, backend: str) -> None:
    z = torch.full((3, classes), -INF)
    z[:, 1] = 4.0
    assert_like_torch(z, torch.tensor([1, 1, 1]), backend)


@pytest.mark.every_capability
@SIZES
def test_masked_label(classes: int, backend: str) -> None:
    """Loss inf, and the gradient that still pulls the label up, as F.cross_entropy has it."""
    z, y = random_logits(3, classes), torch.tensor([0, 2, classes - 1])
    z[torch.arange(3), y] = -INF
    assert_like_torch(z, y, backend)
    loss, grad, _ = run(z, y, 0.5, distance="uniform", reduction="sum", backend=backend)
    assert loss == INF
    assert not grad.isnan().any()


@pytest.mark.parametrize(("truth", "limit"), [("ce", INF), ("gce", 1 / 0.7), ("mae", 2.0), ("log_odds", INF)])
@SIZES
def test_masked_label_of_other_truths(truth: str, limit: float, classes: int, backend: str) -> None:
    z, y = random_logits(3, classes), torch.tensor([0, 2, classes - 1])
    z[torch.arange(3), y] = -INF
    loss, grad, _ = run(z, y, truth=truth, reduction="none", backend=backend)
    torch.testing.assert_close(loss, torch.full((3,), limit))
    assert not grad.isnan().any()


def test_masked_label_with_smoothing(backend: str) -> None:
    z = torch.tensor([[-INF, 1.0, 2.0]])
    loss, _, _ = run(z, torch.tensor([0]), label_smoothing=0.1, backend=backend)
    assert loss == INF == F.cross_entropy(z, torch.tensor([0]), label_smoothing=0.1)


@SIZES
def test_all_classes_masked(classes: int, backend: str) -> None:
    """NaN in that row, as in F.cross_entropy."""
    z, y = random_logits(3, classes), torch.tensor([0, 1, 2])
    z[1] = -INF
    loss, grad, _ = run(z, y, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False]
    assert torch.equal(loss.isnan(), F.cross_entropy(z, y, reduction="none").isnan())
    assert not grad[[0, 2]].isnan().any()


@pytest.mark.parametrize("classes", [5, 350, 9001, 20001])
def test_masked_by_the_least_number(classes: int, backend: str) -> None:
    """finfo.min in place of -inf: huge or, where a sum overflows, infinite, in whatever parts a row is summed."""
    z, y = random_logits(3, classes), torch.tensor([0, classes - 1, 1])
    z[:, classes // 4 : classes // 2 + 1] = torch.finfo(torch.float32).min
    for arguments in ({"label_smoothing": 0.1}, {"distance": "kl"}):
        losses, grad, _ = run(z, y, 0.1, reduction="none", backend=backend, **arguments)
        assert (losses > 1e35).all()
        assert not grad.isnan().any()
    losses = softmax_loss(z, y, distance="non_target_logits", tau=0.1, reduction="none", backend=backend)
    assert (losses > 1e35).all()


def test_infinite_weight_without_a_penalty(backend: str) -> None:
    z, y = random_logits(2, 3), torch.tensor([0, 1])
    weight = torch.tensor([INF, 1.0, 1.0])
    losses, _, _ = run(z, y, 0.0, distance="uniform", weight=weight, reduction="none", backend=backend)
    torch.testing.assert_close(losses, F.cross_entropy(z, y, weight, reduction="none"))


@SIZES
def test_nothing_but_smoothing(classes: int, backend: str) -> None:
    """With label_smoothing = 1 the label counts as any class: 0 * inf of what is not left of it would be NaN."""
    z, y = random_logits(3, classes), torch.ones(3, dtype=torch.long)
    z[1, 1] = -INF
    losses, _, _ = run(z, y, label_smoothing=1.0, reduction="none", backend=backend)
    assert losses.isinf().tolist() == [False, True, False]
    torch.testing.assert_close(losses[[0, 2]], F.cross_entropy(z, y, label_smoothing=1.0, reduction="none")[[0, 2]])


@SIZES
def test_no_finite_logit(classes: int, backend: str) -> None:
    """NaN, for labels and for probabilities, in the statistics too."""
    z = random_logits(3, classes)
    z[0], z[1, 0] = -INF, INF
    for y in (torch.ones(3, dtype=torch.long), torch.full(z.shape, 1 / classes)):
        losses, stats = softmax_loss(z, y, distance="uniform", reduction="none", return_stats=True, backend=backend)
        for values in (losses, stats.cross_entropy, stats.distance, stats.margin):
            assert values.isnan().tolist() == [True, True, False]


@pytest.mark.every_capability
@pytest.mark.parametrize("column", [0, 2, -1], ids=["wrong_class", "label", "end"])
@SIZES
def test_infinite_logit(column: int, classes: int, backend: str) -> None:
    """+inf is NaN in F.cross_entropy, at the label too; other rows are not touched by it."""
    z, y = random_logits(4, classes), torch.full((4,), 2)
    z[1, column] = INF
    loss, grad, _ = run(z, y, 0.5, distance="uniform", reduction="none", backend=backend)
    assert (
        F.cross_entropy(z, y, reduction="none").isnan().tolist() == loss.isnan().tolist() == [False, True, False, False]
    )
    assert grad[1].isnan().any()
    assert not grad[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("column", [0, 2, -1], ids=["wrong_class", "label", "end"])
@SIZES
@MEMBERS
def test_nan_stays_in_its_row(truth: str, distance: str | None, classes: int, column: int, backend: str) -> None:
    check_nan(truth, distance, "float32", classes, column, backend)


@pytest.mark.every_capability
@FLOATS
@SIZES
@pytest.mark.parametrize("distance", [None, *DISTANCES])
def test_nan_in_every_dtype(distance: str | None, classes: int, dtype: str, backend: str) -> None:
    check_nan("ce", distance, dtype, classes, 0, backend)


def check_nan(truth: str, distance: str | None, dtype: str, classes: int, column: int, backend: str) -> None:
    clean, y = random_logits(4, classes, dtype=DTYPES[dtype]), torch.full((4,), 2)
    z = clean.clone()
    z[1, column] = NAN
    arguments = {"truth": truth, "distance": distance, "reduction": "none", "backend": backend}
    loss, grad, _ = run(z, y, 0.5, **arguments)
    clean_loss, clean_grad, _ = run(clean, y, 0.5, **arguments)
    others = [0, 2, 3]
    assert loss[1].isnan()
    assert grad[1].isnan().any()
    assert torch.equal(loss[others], clean_loss[others])
    assert torch.equal(grad[others], clean_grad[others])


@SIZES
def test_nan_as_cross_entropy(classes: int, backend: str) -> None:
    z = random_logits(4, classes)
    z[1, 0] = NAN
    assert_like_torch(z, torch.full((4,), 2), backend)


@pytest.mark.parametrize("ignore_index", [-100, -1, 1, 1000])
@SIZES
def test_ignored_rows(ignore_index: int, classes: int, backend: str) -> None:
    z = random_logits(6, classes)
    y = torch.tensor([0, ignore_index, 2, ignore_index, 3, ignore_index])
    assert_like_torch(z, y, backend, ignore_index=ignore_index)
    arguments = {"distance": "uniform", "ignore_index": ignore_index, "backend": backend}
    loss, grad, _ = run(z, y, 0.5, reduction="none", **arguments)
    assert loss[[1, 3, 5]].tolist() == [0, 0, 0]
    assert not grad[[1, 3, 5]].any()
    kept = [0, 2, 4]
    mean, mean_grad, _ = run(z, y, 0.5, **arguments)
    alone, alone_grad, _ = run(z[kept], y[kept], 0.5, **arguments)
    torch.testing.assert_close(mean, alone)
    torch.testing.assert_close(mean_grad[kept], alone_grad)


def test_ignored_rows_with_uint8_labels(backend: str) -> None:
    z, y = random_logits(3, 5), torch.tensor([1, 255, 4], dtype=torch.uint8)
    assert_like_torch(z, y, backend, ignore_index=255)


@pytest.mark.parametrize("content", [NAN, INF, -INF], ids=["nan", "inf", "minus_inf"])
@SIZES
@MEMBERS
def test_ignored_rows_may_hold_anything(
    truth: str, distance: str | None, classes: int, content: float, backend: str
) -> None:
    check_ignored_content(truth, distance, "float32", classes, content, backend)


@pytest.mark.every_capability
@FLOATS
@SIZES
@pytest.mark.parametrize("distance", [None, *DISTANCES])
def test_ignored_nan_in_every_dtype(distance: str | None, classes: int, dtype: str, backend: str) -> None:
    check_ignored_content("ce", distance, dtype, classes, NAN, backend)


def check_ignored_content(
    truth: str, distance: str | None, dtype: str, classes: int, content: float, backend: str
) -> None:
    z, y = random_logits(4, classes, dtype=DTYPES[dtype]), torch.tensor([0, -100, 2, -100])
    clean = z.clone()
    z[1], z[3, 1] = content, content
    arguments = {"truth": truth, "distance": distance, "backend": backend}
    got = run(z, y, torch.tensor(0.5), **arguments)
    want = run(clean, y, torch.tensor(0.5), **arguments)
    for ours, clean_one in zip(got, want, strict=True):
        assert ours is not None
        assert torch.equal(ours, clean_one)


@SIZES
def test_all_rows_ignored(classes: int, backend: str) -> None:
    """The mean of nothing is NaN, as in F.cross_entropy; no gradient comes from it, to tau neither."""
    for ignored in (-100, 1):
        z, y = random_logits(3, classes), torch.full((3,), ignored)
        assert_like_torch(z, y, backend, ignore_index=ignored)
        assert_like_torch(z, y, backend, ignore_index=ignored, weight=torch.ones(classes))
        loss, grad, tau_grad = run(z, y, torch.tensor(0.5), distance="uniform", ignore_index=ignored, backend=backend)
        assert loss.isnan()
        assert not grad.any()
        assert tau_grad == 0


def test_all_class_weights_zero(backend: str) -> None:
    z, y = random_logits(3, 4), torch.tensor([0, 1, 1])
    weight = torch.tensor([0.0, 0.0, 1.0, 1.0])
    loss = softmax_loss(z, y, weight=weight, backend=backend)
    assert loss.isnan()
    assert F.cross_entropy(z, y, weight=weight).isnan()


@pytest.mark.parametrize("shape", [(0, 5), (0, 200), (0, 5, 2), (2, 5, 0), (0, 1)])
def test_empty_batch(shape: tuple[int, ...], backend: str) -> None:
    z, y = torch.empty(shape), torch.empty((shape[0], *shape[2:]), dtype=torch.long)
    assert_like_torch(z, y, backend)
    assert_like_torch(z, y, backend, weight=torch.ones(shape[1]), label_smoothing=0.1)
    loss, _, tau_grad = run(z, y, torch.tensor(0.5), distance="uniform", reduction="sum", backend=backend)
    assert loss == 0
    assert tau_grad == 0


def test_no_classes(backend: str) -> None:
    """Only ignored rows can have no class to choose."""
    z, y = torch.empty(2, 0), torch.tensor([-100, -100])
    assert_like_torch(z, y, backend)


# On a device nobody can raise an error: test_triton.py and test_cuda.py say what happens there.
@pytest.mark.backends("cpp", "reference", "triton")
@pytest.mark.parametrize("label", [-1, -99, 5, 6, 2**31, 2**40, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("tau", [0.0, torch.tensor(0.5)], ids=["float", "tensor"])
def test_label_out_of_range(label: int, tau: Tensor | float, backend: str) -> None:
    z = random_logits(4, 5)
    y = torch.tensor([0, 4, label, 1])
    with pytest.raises(IndexError, match=rf"y holds label {label} at row 2, outside \[0, C\) = \[0, 5\)"):
        fused_drsl_loss(z, y, tau, backend=backend)
