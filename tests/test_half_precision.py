"""Gradients of bfloat16 and float16 logits: rounded once, loss scaling, autocast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, ROWS, labels, leaf, random_logits, true_gradient
from truth import loss_and_gradient

from drsl_kernels import fused_drsl_loss


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("factor", [1.0, 1 / 3, 1000.0])
@pytest.mark.parametrize(("reduction", "rows"), [("sum", 64), ("mean", 400)])
def test_half_precision_gradient_is_rounded_once(
    reduction: str, rows: int, factor: float, dtype: str, backend: str
) -> None:
    if backend == "triton" and dtype == "bfloat16":
        pytest.skip("Triton's interpreter truncates where the hardware rounds")
    z = leaf(dtype, rows=rows, classes=50)
    loss = fused_drsl_loss(z, labels(rows, 50), 0.5, reduction=reduction, backend=backend) * factor
    loss.backward(retain_graph=True)
    want = true_gradient(z.detach(), reduction=reduction, upstream=torch.tensor(factor, dtype=torch.float64))
    assert z.grad is not None
    # Where float32 arithmetic falls on the other side of a rounding boundary the last bit differs: seldom.
    assert (z.grad != want).double().mean() < 1e-3
    once = torch.finfo(z.dtype)
    torch.testing.assert_close(z.grad, want, rtol=once.eps, atol=once.smallest_normal * once.eps)
    (again,) = torch.autograd.grad(loss, z)
    assert torch.equal(again, z.grad)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0x7FC00000])
@pytest.mark.parametrize("classes", [3, 10, 100, 400, 3000])
def test_every_kind_of_nan_stays_nan_in_bfloat16(classes: int, bits: int) -> None:
    """Rounding to the upper 16 bits as if it were a number makes an infinity or a zero of some of them."""
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    weight = torch.ones(classes)
    weight[1] = nan
    y = torch.arange(16) % 3
    for smoothing in (0.0, 0.1):
        loss = partial(fused_drsl_loss, tau=0.5, weight=weight, label_smoothing=smoothing, reduction="sum")
        z = leaf("bfloat16", rows=16, classes=classes)
        loss(z, y).sum().backward()
        assert z.grad is not None
        is_nan = z.grad.isnan()
        assert is_nan.any()
        torch.testing.assert_close(is_nan, _nan_of_float32(loss, z, y))


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0x7FC00000])
@pytest.mark.parametrize("classes", [3, 10, 100, 400, 3000])
def test_every_kind_of_nan_among_probabilities_stays_nan_in_bfloat16(classes: int, bits: int) -> None:
    shares = F.one_hot(torch.arange(16) % 3, classes).float()
    shares[::2, 1] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    loss = partial(fused_drsl_loss, tau=0.5, reduction="sum")
    z = leaf("bfloat16", rows=16, classes=classes)
    loss(z, shares).backward()
    assert z.grad is not None
    is_nan = z.grad.isnan()
    assert is_nan[::2, 1].all()
    torch.testing.assert_close(is_nan, _nan_of_float32(loss, z, shares))


def _nan_of_float32(loss: Callable[..., torch.Tensor], z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    wide = z.detach().float().requires_grad_()
    loss(wide, y).sum().backward()
    assert wide.grad is not None
    return wide.grad.isnan()


def test_loss_scale_keeps_small_float16_gradients(backend: str) -> None:
    """Gradients near 1e-9 are 0 in float16 by themselves; a loss scale of 2^16 brings them into range."""
    z = leaf("float16", rows=2, classes=1000)
    with torch.no_grad():
        z.div_(8)[:, 0] = 12.0
    y = torch.tensor([0, 0])
    scale = 2.0**16
    (fused_drsl_loss(z, y, 0.5, backend=backend) * scale).backward()
    want = loss_and_gradient(z, y, 0.5, distance="uniform")[1]
    assert (want.abs() < 2e-8).any()
    assert z.grad is not None
    assert (z.grad != 0).all()
    torch.testing.assert_close(z.grad.double() / scale, want, rtol=2e-2, atol=2.0**-24 / scale)


def test_gradient_scaler_finds_an_overflow(backend: str) -> None:
    z = leaf("float16")
    (fused_drsl_loss(z, labels(), 0.5, reduction="sum", backend=backend) * 2.0**20).backward()
    assert z.grad is not None
    assert z.grad.isinf().any()


def test_autocast(backend: str) -> None:
    weight, x = random_logits(CLASSES, 3, seed=4).requires_grad_(), random_logits(ROWS, 3, seed=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = F.linear(x, weight)
        loss = fused_drsl_loss(logits, labels(), 0.5, backend=backend)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert weight.grad is not None
    want = true_gradient(logits.detach().float()).t() @ x
    torch.testing.assert_close(weight.grad, want, rtol=2e-2, atol=2e-2)
