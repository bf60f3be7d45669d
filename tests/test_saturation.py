"""Precision on rows that are all but decided, against arbitrary precision: the loss and the label's gradient keep a
relative error below 1e-5 in float32 while the loss falls to 1e-30, and the same where the label is hopeless.
"""

from __future__ import annotations

import mpmath
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, run
from truth import TRUTHS, exact

# Gap between the label and the others: the loss is about exp(-gap), from 0.1 down to 1e-30.
GAPS = [0.0, 3.0, 9.0, 17.0, 30.0, 50.0, 69.0]
OFFSETS = [0.0, 1e4, -1e4]
BOUND = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 1e-5, "float16": 1e-5}


def row_with_gap(gap: float, dtype: torch.dtype, offset: float = 0.0, label: int = 1) -> torch.Tensor:
    """Ten logits whose label is ahead by about `gap`, exactly representable in dtype."""
    z = torch.tensor([0.3, 0.0, -0.2, 0.7, -1.1, 0.1, -0.4, -2.0, 0.9, 0.5], dtype=torch.float64)
    z[label] = gap + 1.5
    return (z + offset).to(dtype)


def relative_error(got: float, want: mpmath.mpf) -> float:
    return float(abs(mpmath.mpf(got) - want) / abs(want))


def check(z: torch.Tensor, label: int, bound: float, backend: str, repeat: int = 1, **arguments: object) -> None:
    """Compare one row; `repeat` makes copies of the wrong classes, so that C passes the kernels' thresholds."""
    wide = torch.cat([z, z[torch.arange(len(z)) != label].repeat(repeat - 1)])
    loss, grad, _ = run(wide.unsqueeze(0), torch.tensor([label]), reduction="sum", backend=backend, **arguments)
    want, slopes = exact(wide.double().tolist(), label, digits=120, **arguments)
    assert relative_error(loss.item(), want) < bound
    # The gradient is rounded to the dtype of the logits.
    rounding = 0.5 * torch.finfo(z.dtype).eps if z.dtype in (torch.bfloat16, torch.float16) else 0.0
    if backend == "triton" and z.dtype == torch.bfloat16:
        rounding *= 2.0  # its interpreter truncates where the hardware rounds
    if abs(slopes[label]) > torch.finfo(z.dtype).smallest_normal:
        assert relative_error(grad[0, label].item(), slopes[label]) < bound + rounding
    largest = max(abs(slope) for k, slope in enumerate(slopes) if k != label)
    for k, slope in enumerate(slopes):
        if k != label and largest > torch.finfo(z.dtype).smallest_normal:
            assert abs(mpmath.mpf(grad[0, k].item()) - slope) < (bound + rounding) * largest


@pytest.mark.every_capability
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_confident_rows(dtype: str, truth: str, gap: float, offset: float, backend: str) -> None:
    z = row_with_gap(gap, DTYPES[dtype], offset)
    check(z, 1, BOUND[dtype], backend, truth=truth)


@pytest.mark.every_capability
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_confident_rows_in_half_precision(dtype: str, truth: str, gap: float, backend: str) -> None:
    check(row_with_gap(gap, DTYPES[dtype]), 1, BOUND[dtype], backend, truth=truth)


@pytest.mark.every_capability
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("gap", [17.0, 69.0])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_confident_rows_with_many_classes(dtype: str, gap: float, offset: float, backend: str) -> None:
    check(row_with_gap(gap, DTYPES[dtype], offset), 1, BOUND[dtype], backend, repeat=15)


@pytest.mark.every_capability
@pytest.mark.parametrize("gap", [100.0, 300.0, 643.0])
@pytest.mark.parametrize("truth", TRUTHS)
def test_float64_down_to_1e_280(truth: str, gap: float, backend: str) -> None:
    z = row_with_gap(gap, torch.float64)
    loss, grad, _ = run(z.unsqueeze(0), torch.tensor([1]), truth=truth, backend=backend)
    want, slopes = exact(z.tolist(), 1, truth=truth, digits=1000)
    assert relative_error(loss.item(), want) < 1e-13
    assert relative_error(grad[0, 1].item(), slopes[1]) < 1e-13


@pytest.mark.every_capability
@pytest.mark.parametrize("gap", [5.0, 17.0, 30.0, 69.0])
@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_hopeless_rows(dtype: str, truth: str, gap: float, backend: str) -> None:
    """Where the label is far behind, gce and mae saturate at their maximum: the gradient left is p_y^q, not 0."""
    check(row_with_gap(-gap, DTYPES[dtype]), 1, BOUND[dtype], backend, truth=truth)


@pytest.mark.parametrize("gap", [9.0, 30.0, 60.0])
@pytest.mark.parametrize("distance", ["uniform", "non_target", "non_target_logits", "conditional", "kl"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_distances_of_confident_rows(dtype: str, distance: str, gap: float, backend: str) -> None:
    # Not tau = 0.5: there the gradients of ce and uniform cancel to first order.
    check(row_with_gap(gap, DTYPES[dtype]), 1, BOUND[dtype], backend, distance=distance, tau=0.3)


def test_the_vanishing_distance_keeps_its_precision(backend: str) -> None:
    """non_target falls with the square of 1 - p_y: 1e-24 here."""
    z = row_with_gap(27.0, torch.float32)
    with_it, grad, _ = run(z.unsqueeze(0), torch.tensor([1]), 1e12, distance="non_target", backend=backend)
    want, slopes = exact(z.double().tolist(), 1, distance="non_target", tau=1e12, digits=120)
    assert relative_error(with_it.item(), want) < 1e-5
    assert relative_error(grad[0, 1].item(), slopes[1]) < 1e-5


def test_cross_entropy_of_torch_saturates_where_this_does_not(backend: str) -> None:
    z = torch.tensor([[30.0, 0.0, 0.0, 0.0]], requires_grad=True)
    y = torch.tensor([0])
    plain = F.cross_entropy(z, y)
    assert plain == 0
    assert torch.autograd.grad(plain, z)[0][0, 0] == 0
    loss, grad, _ = run(z, y, backend=backend)
    assert relative_error(loss.item(), 3 * mpmath.exp(-30)) < 1e-6
    assert relative_error(grad[0, 0].item(), -3 * mpmath.exp(-30)) < 1e-6
