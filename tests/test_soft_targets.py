"""Class probabilities as target: against the textbook formula in float64, and against F.cross_entropy at tau = 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, assert_error, random_labels, random_logits
from torch import Tensor

from drsl_kernels import DRSLLoss, fused_drsl_loss, softmax_loss

SHAPES = [(3,), (1, 1), (5, 3), (17, 10), (6, 2), (3, 200), (2, 1030), (2, 8200), (4, 5, 3), (2, 130, 2, 3)]
TAU = 0.7


def random_target(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    """Probabilities, a tenth of them exactly 0."""
    q = random_logits(*shape, dtype=torch.float64, seed=seed).softmax(class_dim(shape))
    return torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.1, 0.0, q).to(dtype)


def class_dim(shape: tuple[int, ...] | torch.Size) -> int:
    return 0 if len(shape) == 1 else 1


def textbook(
    z: Tensor,
    q: Tensor,
    tau: Tensor | float = TAU,
    *,
    distance: str | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """In the dtype of z, over the whole softmax."""
    at = class_dim(z.shape)
    classes = z.shape[at]
    z, q = z.movedim(at, -1), q.to(z.dtype).movedim(at, -1)
    w = torch.ones(classes, dtype=z.dtype) if weight is None else weight.to(z.dtype)
    log_p = z.log_softmax(-1)
    loss = -(w * ((1 - label_smoothing) * q + label_smoothing / classes) * log_p).sum(-1)
    penalty: Tensor | float = 0.0
    if distance == "uniform":
        penalty = (log_p.exp() - 1 / classes).square().sum(-1)
    elif distance == "kl":
        penalty = F.kl_div(log_p, torch.full_like(log_p, 1 / classes), reduction="none").sum(-1)
    row_weight = 1.0 if weight is None else (w * q).sum(-1)
    loss = loss + tau * row_weight * penalty
    return {"none": loss, "sum": loss.sum(), "mean": loss.mean()}[reduction]


def assert_true(z: Tensor, q: Tensor, backend: str, **arguments: Any) -> None:
    """Loss and gradient; the error may be that of the textbook formula in float32, plus some roundings."""
    weight, tau = arguments.get("weight"), arguments.pop("tau", TAU)
    leaf = z.detach().requires_grad_()
    loss = softmax_loss(leaf, q, tau=tau, backend=backend, **arguments)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    gradient = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))[0]
    results = []
    acc = torch.float64 if z.dtype == torch.float64 else torch.float32
    for dtype in (torch.float64, acc):
        wide = z.detach().to(dtype).requires_grad_()
        plain = arguments | ({} if weight is None else {"weight": weight.to(dtype)})
        value = textbook(wide, q.to(dtype), tau, **plain)
        results.append((value.detach(), torch.autograd.grad(value, wide, upstream.to(dtype))[0]))
    (want, want_gradient), (naive, naive_gradient) = results
    tolerance = 64 * torch.finfo(acc).eps
    half_ulps = 2.0 if backend == "triton" and z.dtype == torch.bfloat16 else 1.0  # its interpreter truncates
    assert loss.dtype == acc
    assert gradient.dtype == z.dtype
    assert_error("loss", loss.detach(), want, naive, tolerance, 1.0)
    assert_error("gradient", gradient, want_gradient, naive_gradient, tolerance, 1.0, half_ulps)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("distance", [None, "uniform", "kl"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient(shape: tuple[int, ...], distance: str | None, reduction: str, backend: str) -> None:
    assert_true(random_logits(*shape), random_target(*shape), backend, distance=distance, reduction=reduction)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_weights_and_smoothing(dtype: str, weighted: bool, label_smoothing: float, backend: str) -> None:
    for shape in ((7, 10), (3, 150)):
        weight = torch.linspace(0.0, 2.0, shape[1]) if weighted else None
        assert_true(
            random_logits(*shape, dtype=DTYPES[dtype]),
            random_target(*shape, dtype=DTYPES[dtype]),
            backend,
            distance="uniform",
            weight=weight,
            label_smoothing=label_smoothing,
        )


@pytest.mark.every_capability
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_as_cross_entropy(reduction: str, weighted: bool, backend: str) -> None:
    for shape in ((9, 12), (2, 5, 4), (3, 140)):
        z, q = random_logits(*shape, dtype=torch.float64), random_target(*shape, dtype=torch.float64)
        weight = torch.linspace(0.1, 2.0, shape[1], dtype=torch.float64) if weighted else None
        for smoothing in (0.0, 0.1):
            arguments: Any = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
            got = fused_drsl_loss(z, q, 0.0, backend=backend, **arguments)
            torch.testing.assert_close(got, F.cross_entropy(z, q, **arguments))


@pytest.mark.parametrize("distance", ["uniform", "kl"])
def test_certainty_is_a_label(distance: str, backend: str) -> None:
    """With all probability on one class, the loss is that of the label: to the last digits, also in saturation."""
    z, y = random_logits(40, 10, spread=20.0), random_labels(40, classes=10)
    for tau in (0.0, 0.5) if distance == "uniform" else (0.0,):
        by_label = fused_drsl_loss(z, y, tau, distance=distance, reduction="none", backend=backend)
        got = fused_drsl_loss(z, F.one_hot(y, 10).float(), tau, distance=distance, reduction="none", backend=backend)
        torch.testing.assert_close(got, by_label, rtol=1e-6, atol=0.0)


def test_mixup(backend: str) -> None:
    """The loss of a mixture of labels is the mixture of the losses."""
    z, first, second = random_logits(16, 10), random_labels(16, classes=10), random_labels(16, classes=10, seed=5)
    share = torch.linspace(0.0, 1.0, 16).unsqueeze(1)
    q = share * F.one_hot(first, 10) + (1 - share) * F.one_hot(second, 10)
    a, b = (fused_drsl_loss(z, y, 0.5, reduction="none", backend=backend) for y in (first, second))
    got = fused_drsl_loss(z, q, 0.5, reduction="none", backend=backend)
    torch.testing.assert_close(got, share.squeeze(1) * a + (1 - share.squeeze(1)) * b)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_of_tau(weighted: bool, backend: str) -> None:
    z, q = random_logits(8, 6, dtype=torch.float64), random_target(8, 6, dtype=torch.float64)
    weight = torch.linspace(0.5, 2.0, 6, dtype=torch.float64) if weighted else None
    for tau in (torch.tensor(0.3, dtype=torch.float64), torch.linspace(0, 1, 8, dtype=torch.float64)):
        tau.requires_grad_()
        for distance in ("uniform", "kl"):
            got = softmax_loss(z, q, tau=tau, distance=distance, weight=weight, backend=backend)  # type: ignore[arg-type]
            want = textbook(z, q, tau, distance=distance, weight=weight)
            torch.testing.assert_close(torch.autograd.grad(got, tau), torch.autograd.grad(want, tau))


def test_gradient_of_the_probabilities(backend: str) -> None:
    z, q = random_logits(5, 4, dtype=torch.float64).requires_grad_(), random_target(5, 4, dtype=torch.float64)
    q.requires_grad_()
    weight = torch.linspace(0.5, 2.0, 4, dtype=torch.float64)
    arguments: Any = {"distance": "uniform", "weight": weight, "label_smoothing": 0.1}
    got = torch.autograd.grad(softmax_loss(z, q, tau=TAU, backend=backend, **arguments), (z, q))
    torch.testing.assert_close(got, torch.autograd.grad(textbook(z, q, **arguments), (z, q)))


def test_second_derivatives(backend: str) -> None:
    z, q = random_logits(4, 5, dtype=torch.float64).requires_grad_(), random_target(4, 5, dtype=torch.float64)
    weight = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)
    for distance in ("uniform", "kl"):
        results = []
        for loss in (
            softmax_loss(z, q, tau=TAU, distance=distance, weight=weight, backend=backend),  # type: ignore[arg-type]
            textbook(z, q, distance=distance, weight=weight),
        ):
            first = torch.autograd.grad(loss, z, create_graph=True)[0]
            results.append(torch.autograd.grad(first.square().sum(), z)[0])
        torch.testing.assert_close(*results)


def test_masked_classes(backend: str) -> None:
    """Classes at -inf do not exist where they have no probability; where they have some, the loss is infinite."""
    z, q = random_logits(6, 7), random_target(6, 7)
    z[:, 2] = -torch.inf
    q[:, 2] = 0.0
    keep = [0, 1, 3, 4, 5, 6]
    weight = torch.linspace(0.5, 2.0, 7)
    for smoothing in (0.0, 0.1):
        for distance in ("uniform", "kl"):
            arguments: Any = {"distance": distance, "label_smoothing": smoothing, "backend": backend}
            got = fused_drsl_loss(z, q, TAU, weight=weight, **arguments)
            torch.testing.assert_close(
                got, fused_drsl_loss(z[:, keep], q[:, keep], TAU, weight=weight[keep], **arguments)
            )
    q[3, 2] = 0.5
    leaf = z.requires_grad_()
    losses = fused_drsl_loss(leaf, q, TAU, reduction="none", backend=backend)
    assert losses.isinf().tolist() == [False, False, False, True, False, False]
    grad = torch.autograd.grad(losses.sum(), leaf)[0]
    assert grad.isfinite().all()
    alone = torch.tensor([[1.0, -torch.inf]])
    got = [fused_drsl_loss(alone, torch.tensor([[1 - x, x]]), 0.0, backend=backend).item() for x in (0.0, 0.5, 1.0)]
    assert got == [0.0, torch.inf, torch.inf]


@pytest.mark.every_capability
@pytest.mark.parametrize("classes", [2, 10, 350, 5000])
def test_gradient_of_an_infinite_loss(classes: int, backend: str) -> None:
    """That of F.cross_entropy, also at the masked class that the probability is given to."""
    z, q = random_logits(4, classes), random_target(4, classes)
    z[:3, 1] = -torch.inf
    q[0], q[1] = 0.0, 0.0
    q[0, 1] = 1.0
    q[1, :2] = 0.5
    gradients = []
    for loss in (fused_drsl_loss, F.cross_entropy):
        leaf, weight = z.clone().requires_grad_(), torch.linspace(0.5, 2.0, classes)
        arguments = (q, 0.0) if loss is fused_drsl_loss else (q,)
        extra = {"backend": backend} if loss is fused_drsl_loss else {}
        value = loss(leaf, *arguments, weight=weight, reduction="none", **extra)  # type: ignore[operator]
        assert value[:2].isinf().all()
        gradients.append(torch.autograd.grad(value, leaf, torch.linspace(0.5, 1.5, 4))[0])
    torch.testing.assert_close(*gradients)


def test_gradient_of_probabilities_with_masked_classes(backend: str) -> None:
    """Finite where the loss is: a class that is not there costs nothing, and teaches nothing."""
    z = torch.tensor([[0.0, -torch.inf, 2.0], [0.0, 1.0, 2.0], [0.0, -torch.inf, 2.0]])
    q = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [0.3, 0.5, 0.2]], requires_grad=True)
    losses = fused_drsl_loss(z, q, 0.0, reduction="none", backend=backend)
    got = torch.autograd.grad(losses.sum(), q)[0]
    want = torch.autograd.grad(F.cross_entropy(z, q, reduction="sum"), q)[0]
    assert want[0, 1].isinf()
    want[0, 1] = 0.0
    torch.testing.assert_close(got, want)
    teacher = z[0].clone().requires_grad_()
    fused_drsl_loss(z[0], teacher.softmax(0), 0.0, backend=backend).backward()
    assert teacher.grad is not None
    assert teacher.grad.isfinite().all()


def test_sign_of_an_infinite_loss(backend: str) -> None:
    """With weights below 0 a masked class gains infinitely much; gains and losses together are NaN."""
    z = torch.tensor([[0.0, 1.0, -torch.inf], [2.0, -torch.inf, -torch.inf], [2.0, -torch.inf, -torch.inf]])
    q = torch.tensor([[0.2, 0.8, -0.5], [-0.1, -0.6, 0.0], [0.3, -0.5, 0.2]])
    leaf, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    losses = fused_drsl_loss(leaf, q, 0.0, reduction="none", backend=backend)
    assert [losses[0].item(), losses[1].item()] == [-torch.inf, -torch.inf]
    assert losses[2].isnan()
    theirs = F.cross_entropy(other, q, reduction="sum")
    for keep_graph in (False, True):
        got = torch.autograd.grad(losses.sum(), leaf, create_graph=keep_graph, retain_graph=True)[0]
        torch.testing.assert_close(got, torch.autograd.grad(theirs, other, retain_graph=True)[0])


def test_masked_tiles_of_long_rows(backend: str) -> None:
    z, q = random_logits(2, 9000), torch.zeros(2, 9000)
    z[:, 1000:8500] = -torch.inf
    q[:, [10, 20, 8999]] = torch.tensor([0.5, 0.25, 0.25])
    keep = [*range(1000), *range(8500, 9000)]
    got = fused_drsl_loss(z, q, TAU, backend=backend)
    torch.testing.assert_close(got, fused_drsl_loss(z[:, keep], q[:, keep], TAU, backend=backend))
    q[1, 5000] = 0.1
    assert fused_drsl_loss(z, q, TAU, reduction="none", backend=backend).isinf().tolist() == [False, True]


def test_nan_stays_in_its_row(backend: str) -> None:
    z, q = random_logits(4, 5), random_target(4, 5)
    z[1, 3] = torch.nan
    q[2, 4] = torch.nan
    losses = fused_drsl_loss(z, q, TAU, reduction="none", backend=backend)
    assert losses.isnan().tolist() == [False, True, True, False]


def test_statistics(backend: str) -> None:
    z, q = random_logits(6, 5), random_target(6, 5)
    losses, stats = softmax_loss(z, q, tau=TAU, distance="kl", reduction="none", return_stats=True, backend=backend)
    torch.testing.assert_close(stats.cross_entropy, F.cross_entropy(z, q, reduction="none"))
    torch.testing.assert_close(stats.cross_entropy + TAU * stats.distance, losses)
    assert torch.equal(stats.correct, z.argmax(1) == q.argmax(1))


def test_layouts(backend: str) -> None:
    """Strided logits and targets, and a target of another dtype, give what contiguous ones give."""
    z, q = random_logits(6, 10), random_target(6, 10)
    want = fused_drsl_loss(z, q, TAU, backend=backend)
    for z_view, q_view in ((z.t().contiguous().t(), q), (z, q.t().contiguous().t()), (z.repeat(2, 2)[:6, :10], q)):
        torch.testing.assert_close(fused_drsl_loss(z_view, q_view, TAU, backend=backend), want)
    torch.testing.assert_close(fused_drsl_loss(z, q.double(), TAU, backend=backend), want)
    torch.testing.assert_close(
        fused_drsl_loss(z, q[:1].expand(6, 10), TAU, backend=backend),
        fused_drsl_loss(z, q[:1].repeat(6, 1), TAU, backend=backend),
    )


def test_empty(backend: str) -> None:
    for reduction in ("mean", "sum", "none"):
        z, q = torch.empty(0, 5), torch.empty(0, 5)
        torch.testing.assert_close(
            fused_drsl_loss(z, q, TAU, reduction=reduction, backend=backend),  # type: ignore[arg-type]
            F.cross_entropy(z, q, reduction=reduction),
            equal_nan=True,
        )


def test_module() -> None:
    z, q = random_logits(4, 5), random_target(4, 5)
    torch.testing.assert_close(DRSLLoss(TAU)(z, q), fused_drsl_loss(z, q, TAU))


def test_under_transforms() -> None:
    z, q = random_logits(4, 5, dtype=torch.float64), random_target(4, 5, dtype=torch.float64)
    got = torch.func.vmap(torch.func.grad(lambda z, q: fused_drsl_loss(z, q, TAU)))(z, q)
    leaf = z.clone().requires_grad_()
    want = torch.autograd.grad(textbook(leaf, q, distance="uniform", reduction="sum"), leaf)[0]
    torch.testing.assert_close(got, want)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "truth": ({"truth": "gce"}, ValueError, "truth must be 'ce'"),
    "distance": ({"distance": "non_target"}, ValueError, "distance must be one of 'uniform', 'kl'"),
    "scale": ({"scale": 2.0}, ValueError, "scale and margin must be 1 and 0"),
    "margin": ({"margin": 0.5}, ValueError, "scale and margin must be 1 and 0"),
    "ignore_index": ({"ignore_index": 1}, RuntimeError, "ignore_index must be negative"),
    "shape": ({"y": torch.zeros(4, 3)}, RuntimeError, "y must have the shape of logits"),
    "weight": ({"weight": torch.ones(3)}, RuntimeError, r"weight must have shape \(C,\)"),
    "tau": ({"tau": torch.ones(3)}, ValueError, r"tau must have shape \(\) or that of y, \(4,\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str, backend: str) -> None:
    changed, error, message = BAD[name]
    arguments: dict[str, Any] = {"y": random_target(4, 5), "distance": "uniform", "tau": 0.5, **changed}
    with pytest.raises(error, match=message):
        softmax_loss(random_logits(4, 5), backend=backend, **arguments)
    if name in ("ignore_index", "shape", "weight"):  # conditions that F.cross_entropy has, too
        theirs = {k: v for k, v in arguments.items() if k in ("ignore_index", "weight")}
        with pytest.raises(error):
            F.cross_entropy(random_logits(4, 5), arguments["y"], **theirs)


WEIGHTS_THAT_CANCEL: dict[str, tuple[Any, Any]] = {
    "probabilities": (torch.tensor([[0.6, 0.2, -0.2, 0.0]]), {}),
    "class_weights": (torch.tensor([[0.25, 0.25, 0.25, 0.25]]), {"weight": torch.tensor([1.0, 1.0, -1.0, 0.0])}),
    "smoothing": (torch.tensor([0]), {"weight": torch.tensor([1.0, -1.0, 1.0, 0.0]), "label_smoothing": 0.2}),
}


@pytest.mark.parametrize("name", WEIGHTS_THAT_CANCEL)
def test_weights_that_add_up_to_0(name: str, backend: str) -> None:
    """Those of the rest: their mean is of no use then, and the gradient must not be made of it."""
    y, arguments = WEIGHTS_THAT_CANCEL[name]
    z = random_logits(1, 4).requires_grad_()
    got, want = fused_drsl_loss(z, y, 0.0, backend=backend, **arguments), F.cross_entropy(z, y, **arguments)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, z), torch.autograd.grad(want, z))


@pytest.mark.parametrize("distance", ["uniform", "kl"])
def test_a_row_without_probability_and_with_masked_classes(distance: Any, backend: str) -> None:
    """As of padding: only the penalty is left, over the classes that exist."""
    z, q = random_logits(1, 5), torch.zeros(1, 5)
    z[0, :2] = -torch.inf
    got = fused_drsl_loss(z, q, TAU, distance=distance, backend=backend)
    torch.testing.assert_close(got, fused_drsl_loss(z[:, 2:], q[:, 2:], TAU, distance=distance, backend=backend))


@pytest.mark.backends("cpp")
@pytest.mark.parametrize("layout", ["rows", "strided", "images"])
@pytest.mark.parametrize("classes", [1000, 128256])
def test_even_probabilities_of_many_classes(classes: int, layout: str, backend: str) -> None:
    """Sums of equal numbers round in one direction, so an error that grows with the classes would show here."""
    z = random_logits(2, classes, 3) if layout == "images" else random_logits(3, 2 * classes)
    z = z[:, ::2] if layout == "strided" else z[:, :classes].contiguous()
    q = torch.full(z.shape, 1 / classes)
    want = F.cross_entropy(z.double(), q.double())
    assert abs(fused_drsl_loss(z, q, 0.0, backend=backend).double() / want - 1) < 3e-7
