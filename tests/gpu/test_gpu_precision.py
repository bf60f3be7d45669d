"""Autocast and deterministic mode on the device: neither changes a bit, and neither fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import DTYPES, random_labels, random_logits
from torch import Tensor

from drsl_kernels import fused_drsl_loss

pytestmark = pytest.mark.gpu

# (rows, classes): several rows per program, and rows that are too long for one
SHAPES = pytest.mark.parametrize("shape", [(9, 10), (3, 9001)], ids=["few", "many"])
TARGETS = pytest.mark.parametrize("target", ["indices", "probabilities"])


def results(shape: tuple[int, int], dtype: str, target: str, device: torch.device, **arguments: Any) -> list[Tensor]:
    """Loss, statistics, gradients to the logits and to tau, and a second derivative."""
    z = random_logits(*shape, dtype=DTYPES[dtype]).to(device).requires_grad_()
    y = random_labels(shape[0], classes=shape[1])
    if target == "probabilities":
        y = random_logits(*shape, seed=1).softmax(1)
    else:
        y[0] = -100  # its gradient is written, too
    arguments["weight"] = random_logits(shape[1], seed=2).exp().to(device)
    tau = torch.tensor(0.5, device=device, requires_grad=True)
    loss, stats = fused_drsl_loss(z, y.to(device), tau, label_smoothing=0.1, return_stats=True, **arguments)
    first = torch.autograd.grad(3 * loss.sum(), (z, tau), retain_graph=True)
    (slope,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
    return [loss, *stats, *first, *torch.autograd.grad(slope.float().square().sum(), z)]


@SHAPES
@TARGETS
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_no_bit(
    dtype: str, target: str, shape: tuple[int, int], device: torch.device, gpu_backend: str
) -> None:
    def call(inside: bool) -> list[Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16) if inside else nullcontext():
            return results(shape, dtype, target, device, backend=gpu_backend)

    for inside, outside in zip(call(True), call(False), strict=True):
        assert inside.dtype == outside.dtype
        assert torch.equal(inside, outside)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Operators without a deterministic form raise, and memory comes filled with NaN instead of with what was there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@SHAPES
@TARGETS
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_deterministic_mode(
    dtype: str,
    reduction: str,
    target: str,
    shape: tuple[int, int],
    device: torch.device,
    gpu_backend: str,
    deterministic: None,
) -> None:
    """No error, the same bits twice, and every element of every result is written."""
    once, again = (results(shape, dtype, target, device, reduction=reduction, backend=gpu_backend) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        assert not a.isnan().any()
        assert torch.equal(a, b)
