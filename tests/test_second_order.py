"""Numerical checks of first and second derivatives, and losses built on gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import PAIR_IDS, PAIRS, random_labels, random_logits
from torch import Tensor
from truth import loss_and_gradient, row_losses

from drsl_kernels import fused_drsl_loss, softmax_loss

# The others come here through the reference: test_triton.py has one test of it.
pytestmark = pytest.mark.backends("cpp", "reference")

MEMBERS = pytest.mark.parametrize(("truth", "distance"), PAIRS, ids=PAIR_IDS)
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 1.5], dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "none_weight_scale": {"reduction": "none", "weight": WEIGHT, "scale": 1.3, "margin": 0.2},
}


def inputs(rows: int = 3, classes: int = 4, per_row: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    z = random_logits(rows, classes, dtype=torch.float64, spread=1.0).requires_grad_()
    y = random_labels(rows, classes=classes)
    y[1] = -100
    tau = torch.linspace(0.3, 0.9, rows, dtype=torch.float64) if per_row else torch.tensor(0.6, dtype=torch.float64)
    return z, y, tau.requires_grad_()


@MEMBERS
@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck(truth: str, distance: str | None, option: str, backend: str) -> None:
    z, y, tau = inputs(per_row=option != "mean")

    def loss(z: Tensor, tau: Tensor) -> Tensor:
        return softmax_loss(z, y, truth=truth, distance=distance, tau=tau, backend=backend, **OPTIONS[option])

    assert torch.autograd.gradcheck(loss, (z, tau), check_undefined_grad=False)


@MEMBERS
@pytest.mark.parametrize("option", OPTIONS)
def test_gradgradcheck(truth: str, distance: str | None, option: str, backend: str) -> None:
    z, y, tau = inputs(per_row=option != "mean")

    def loss(z: Tensor, tau: Tensor) -> Tensor:
        return softmax_loss(z, y, truth=truth, distance=distance, tau=tau, backend=backend, **OPTIONS[option])

    assert torch.autograd.gradgradcheck(loss, (z, tau), check_undefined_grad=False)


@pytest.mark.parametrize("smoothing_weight", [None, WEIGHT], ids=["plain", "weight"])
def test_gradcheck_of_smoothing(smoothing_weight: Tensor | None, backend: str) -> None:
    z, y, tau = inputs()

    def loss(z: Tensor, tau: Tensor) -> Tensor:
        return fused_drsl_loss(z, y, tau, label_smoothing=0.2, weight=smoothing_weight, backend=backend)

    assert torch.autograd.gradcheck(loss, (z, tau), check_undefined_grad=False)
    assert torch.autograd.gradgradcheck(loss, (z, tau), check_undefined_grad=False)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_gradcheck_of_few_classes(classes: int, backend: str) -> None:
    z = random_logits(3, classes, dtype=torch.float64, spread=1.0).requires_grad_()
    y = random_labels(3, classes=classes)

    def loss(z: Tensor) -> Tensor:
        return fused_drsl_loss(z, y, 0.5, backend=backend)

    assert torch.autograd.gradcheck(loss, (z,))
    assert torch.autograd.gradgradcheck(loss, (z,))


def test_gradcheck_of_an_image(backend: str) -> None:
    z = random_logits(2, 3, 2, 2, dtype=torch.float64, spread=1.0).requires_grad_()
    y = random_labels(2, 2, 2, classes=3)

    def loss(z: Tensor) -> Tensor:
        return fused_drsl_loss(z, y, 0.5, reduction="none", backend=backend)

    assert torch.autograd.gradcheck(loss, (z,))
    assert torch.autograd.gradgradcheck(loss, (z,))


@MEMBERS
def test_hessian_is_that_of_the_textbook_formula(truth: str, distance: str | None, backend: str) -> None:
    z, y, _ = inputs()
    y = y.clamp(min=0)

    def ours(z: Tensor) -> Tensor:
        return softmax_loss(z, y, truth=truth, distance=distance, tau=0.6, backend=backend)

    def textbook(z: Tensor) -> Tensor:
        return row_losses(z, y, 0.6, truth=truth, distance=distance).mean()

    got = torch.autograd.functional.hessian(ours, z.detach())
    torch.testing.assert_close(got, torch.autograd.functional.hessian(textbook, z.detach()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_create_graph_gives_the_same_first_derivative(dtype: torch.dtype, backend: str) -> None:
    z, y = random_logits(5, 4, dtype=dtype).requires_grad_(), random_labels(5, classes=4)
    loss = fused_drsl_loss(z, y, 0.5, backend=backend)
    plain = torch.autograd.grad(loss, z, retain_graph=True)[0]
    with_graph = torch.autograd.grad(loss, z, create_graph=True)[0]
    assert with_graph.requires_grad
    torch.testing.assert_close(with_graph, plain)


def test_gradient_penalty(backend: str) -> None:
    """Loss plus the squared norm of its input gradient, as gradient regularisation trains with."""
    weight = random_logits(4, 6, dtype=torch.float64, seed=3)
    x, y = random_logits(5, 6, dtype=torch.float64, seed=4), random_labels(5, classes=4)

    def penalised(weight: Tensor, loss_of: Any) -> Tensor:
        inner = x.clone().requires_grad_()
        loss = loss_of(inner @ weight.t())
        slope = torch.autograd.grad(loss, inner, create_graph=True)[0]
        return loss + 3 * slope.square().sum()

    ours, textbook = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    penalised(ours, lambda z: fused_drsl_loss(z, y, 0.5, backend=backend)).backward()
    penalised(textbook, lambda z: row_losses(z, y, 0.5, distance="uniform").mean()).backward()
    torch.testing.assert_close(ours.grad, textbook.grad)


def test_second_derivative_by_tau_and_logits(backend: str) -> None:
    z, y, tau = inputs(per_row=True)
    loss = fused_drsl_loss(z, y, tau, reduction="sum", backend=backend)
    by_tau = torch.autograd.grad(loss, tau, create_graph=True)[0]
    mixed = torch.autograd.grad(by_tau.sum(), z)[0]
    want = loss_and_gradient(z, y, 1.0, distance="uniform", reduction="sum")[1]
    want -= loss_and_gradient(z, y, 0.0, distance="uniform", reduction="sum")[1]
    torch.testing.assert_close(mixed, want)


def test_third_derivative(backend: str) -> None:
    z, y, _ = inputs(rows=2, classes=3)

    def third(loss: Tensor) -> Tensor:
        first = torch.autograd.grad(loss, z, create_graph=True)[0]
        second = torch.autograd.grad(first.pow(2).sum(), z, create_graph=True)[0]
        return torch.autograd.grad(second.pow(2).sum(), z)[0]

    counted = y != -100
    textbook = row_losses(z, y, 0.5, distance="uniform").sum() / counted.sum()
    torch.testing.assert_close(third(fused_drsl_loss(z, y, 0.5, backend=backend)), third(textbook))


@pytest.mark.parametrize("case", ["masked", "ignored", "two_classes", "one_class", "tied"])
def test_second_derivative_is_finite_at_the_edges(case: str, backend: str) -> None:
    z = random_logits(3, {"two_classes": 2, "one_class": 1}.get(case, 4), dtype=torch.float64)
    y = torch.tensor([0, 1, 1]).clamp(max=z.shape[1] - 1)
    if case == "masked":
        z[:, 2] = -torch.inf
    elif case == "ignored":
        z[1], y[1] = torch.nan, -100
    elif case == "tied":
        z[:] = 1.0
    z.requires_grad_()
    loss = fused_drsl_loss(z, y, 0.0, backend=backend)
    first = torch.autograd.grad(loss, z, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), z)[0]
    plain = F.cross_entropy(z, y)
    plain_first = torch.autograd.grad(plain, z, create_graph=True)[0]
    want = torch.autograd.grad(plain_first.square().sum(), z)[0]
    if case != "ignored":  # there F.cross_entropy lets the NaN of the ignored row through
        torch.testing.assert_close(first, plain_first)
        torch.testing.assert_close(second, want)
    assert not second.isnan().any()
