"""Logits of extreme size: spread over 1e4, around an offset of 1e4, at the end of the range of float32; and ties."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import PAIR_IDS, PAIRS, assert_true, random_labels, random_logits, run
from torch import Tensor
from truth import DISTANCES, TRUTHS

from drsl_kernels import fused_drsl_loss

INF = math.inf
SIZES = pytest.mark.parametrize("classes", [5, 40, 200], ids=["C=5", "C=40", "C=200"])
MEMBERS = pytest.mark.parametrize(("truth", "distance"), PAIRS, ids=PAIR_IDS)


@pytest.mark.every_capability
@pytest.mark.parametrize("distance", [None, *DISTANCES])
@pytest.mark.parametrize("truth", TRUTHS)
@SIZES
def test_large_logits(classes: int, truth: str, distance: str | None, backend: str) -> None:
    z, y = random_logits(9, classes, spread=1e4), random_labels(9, classes=classes)
    assert_true(z, y, 0.5, truth=truth, distance=distance, backend=backend)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("distance", [None, "uniform", "non_target", "conditional"])
@SIZES
def test_logits_around_a_large_offset(classes: int, distance: str | None, sign: int, backend: str) -> None:
    z, y = random_logits(9, classes) + sign * 1e4, random_labels(9, classes=classes)
    for truth in TRUTHS:
        assert_true(z, y, 0.5, truth=truth, distance=distance, backend=backend)


@pytest.mark.parametrize("distance", ["non_target_logits", "kl"])
@SIZES
def test_means_around_a_large_offset(classes: int, distance: str, backend: str) -> None:
    """The mean of the wrong logits must not be rounded at the size of the offset."""
    z, y = random_logits(9, classes) + 1e4, random_labels(9, classes=classes)
    assert_true(z, y, 0.5, distance=distance, backend=backend)


@SIZES
def test_smoothing_around_a_large_offset(classes: int, backend: str) -> None:
    z, y = random_logits(9, classes) + 1e4, random_labels(9, classes=classes)
    assert_true(z, y, label_smoothing=0.5, backend=backend)
    assert_true(z, y, label_smoothing=0.5, weight=random_logits(classes).abs(), backend=backend)


HUGE = {
    "label_top": [3e38, -3e38, -3e38, -3e38],
    "label_bottom": [-3e38, 3e38, 0.0, 1.0],
    "all_top": [3e38, 3e38, 3e38, 3e38],
    "all_bottom": [-3e38, -3e38, -3e38, -3e38],
    "mixed": [1e38, -3e38, 3e38, -INF],
}


@pytest.mark.every_capability
@pytest.mark.parametrize("tau", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("distance", [None, *DISTANCES])
@pytest.mark.parametrize("case", HUGE)
@pytest.mark.parametrize("repeat", [1, 50], ids=["C=4", "C=200"])
def test_huge_logits_as_cross_entropy(
    repeat: int, case: str, distance: str | None, tau: Tensor | float, backend: str
) -> None:
    """Never NaN where F.cross_entropy is finite: a distance that overflows counts nothing at tau = 0.

    The reference leaves the distance out for the number 0. A tensor it has to multiply, for tau's gradient is D even
    at 0, and 0 times an overflowed distance is NaN there.
    """
    if backend == "reference" and isinstance(tau, Tensor) and distance in ("non_target_logits", "kl"):
        tau = 0.0
    z, y = torch.tensor([HUGE[case]]).repeat(1, repeat), torch.tensor([0])
    reference = z.clone().requires_grad_()
    want = F.cross_entropy(reference, y)
    want_grad = torch.autograd.grad(want, reference)[0]
    loss, grad, _ = run(z, y, tau, distance=distance, backend=backend)
    torch.testing.assert_close(loss, want.detach(), equal_nan=True)
    torch.testing.assert_close(grad, want_grad, equal_nan=True)


@pytest.mark.parametrize("distance", ["uniform", "non_target", "conditional", "kl"])
@pytest.mark.parametrize("case", ["label_top", "label_bottom", "all_top", "all_bottom"])
def test_huge_logits_with_a_bounded_distance(case: str, distance: str, backend: str) -> None:
    z, y = torch.tensor([HUGE[case]]), torch.tensor([0])
    loss, grad, _ = run(z, y, 0.5, distance=distance, backend=backend)
    assert not loss.isnan()
    if distance != "kl":  # its value overflows with the spread of the wrong logits
        assert not grad.isnan().any()


@SIZES
@MEMBERS
def test_all_logits_equal(truth: str, distance: str | None, classes: int, backend: str) -> None:
    z, y = torch.full((3, classes), 2.5), torch.tensor([0, 2, classes - 1])
    assert_true(z, y, 0.5, truth=truth, distance=distance, backend=backend)
    if distance is not None:
        with_it = run(z, y, 1.0, truth=truth, distance=distance, reduction="none", backend=backend)[0]
        without = run(z, y, 0.0, truth=truth, distance=None, reduction="none", backend=backend)[0]
        torch.testing.assert_close(with_it, without, rtol=1e-6, atol=0)


@SIZES
@MEMBERS
def test_label_ties_with_the_top_wrong_class(truth: str, distance: str | None, classes: int, backend: str) -> None:
    z, y = random_logits(3, classes), torch.tensor([0, 2, classes - 1])
    z[torch.arange(3), y] = 9.0
    z[torch.arange(3), (y + 1) % classes] = 9.0
    z[torch.arange(3), (y + 3) % classes] = 9.0
    assert_true(z, y, 0.5, truth=truth, distance=distance, backend=backend)


@pytest.mark.parametrize("classes", [4, 200, 2000, 9000])
def test_a_variance_that_overflows_is_infinite(classes: int, backend: str) -> None:
    z = 1e30 * random_logits(2, classes)
    losses = fused_drsl_loss(
        z, random_labels(2, classes=classes), 0.5, distance="non_target_logits", reduction="none", backend=backend
    )
    assert losses.isinf().all()


def test_a_tau_of_0_as_a_tensor_is_no_penalty(backend: str) -> None:
    """Where the distance is infinite."""
    z = torch.tensor([[3e25, -3e25, 1.0]])
    y = torch.tensor([0])
    got = fused_drsl_loss(z, y, torch.tensor(0.0), distance="non_target_logits", backend=backend)
    torch.testing.assert_close(got, F.cross_entropy(z, y))
