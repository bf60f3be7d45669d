"""The gradient to tau: a scalar or one value per row, with and without a gradient to the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CLASSES, ROWS, labels, leaf, random_logits, true_gradient
from truth import loss_and_gradient

from drsl_kernels import fused_drsl_loss, softmax_loss

REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


@REDUCTIONS
@pytest.mark.parametrize("tau_shape", ["scalar", "rows"])
@pytest.mark.parametrize("logits_need_grad", [False, True])
def test_gradient_of_tau(logits_need_grad: bool, tau_shape: str, reduction: str, backend: str) -> None:
    z = random_logits(ROWS, CLASSES).requires_grad_(logits_need_grad)
    tau = torch.tensor(0.5) if tau_shape == "scalar" else torch.linspace(-1, 1, ROWS)
    tau.requires_grad_()
    weight = random_logits(CLASSES, seed=8).abs()
    arguments: dict[str, Any] = {"distance": "non_target", "weight": weight, "reduction": reduction}
    loss = softmax_loss(z, labels(), tau=tau, backend=backend, **arguments)
    upstream = random_logits(*loss.shape, seed=7)
    loss.backward(upstream)
    want = loss_and_gradient(z, labels(), tau, upstream=upstream, **arguments)
    torch.testing.assert_close(tau.grad, want[2], check_dtype=False)
    if logits_need_grad:
        torch.testing.assert_close(z.grad, want[1], check_dtype=False)
    else:
        assert z.grad is None


@pytest.mark.parametrize("tau_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradient_of_tau_has_its_dtype(tau_dtype: torch.dtype, backend: str) -> None:
    z, tau = leaf(), torch.tensor(0.5, dtype=tau_dtype, requires_grad=True)
    fused_drsl_loss(z, labels(), tau, backend=backend).backward()
    assert tau.grad is not None
    assert tau.grad.dtype == tau_dtype
    want = loss_and_gradient(z, labels(), tau, distance="uniform")[2]
    torch.testing.assert_close(tau.grad, want, check_dtype=False, rtol=1e-2, atol=0)


def test_gradient_of_tau_without_a_distance_is_zero(backend: str) -> None:
    z, tau = leaf(), torch.tensor(0.5, requires_grad=True)
    for stats in (False, True):
        loss = softmax_loss(z, labels(), tau=tau, return_stats=stats, backend=backend)
        grads = torch.autograd.grad(loss[0] if stats else loss, [z, tau], materialize_grads=True)
        torch.testing.assert_close(grads[0], true_gradient(z, distance=None))
        assert grads[1] == 0


def test_tau_alone_then_logits_from_one_graph(backend: str) -> None:
    z, tau = leaf(), torch.tensor(0.5, requires_grad=True)
    loss = fused_drsl_loss(z, labels(), tau, backend=backend)
    alone = torch.autograd.grad(loss, tau, retain_graph=True)[0]
    both = torch.autograd.grad(loss, [z, tau])
    assert torch.equal(alone, both[1])
    torch.testing.assert_close(both[0], true_gradient(z))
