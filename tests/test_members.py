"""The named members of the family: GCE with its truncation, MAE, the margin, sigsoftmax; on every backend, as functions
and as modules.

Every option of every loss is in test_values.py; here are what only these have, and the published limits.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, assert_true, labels, leaf, random_labels, random_logits
from torch import Tensor, nn
from truth import DISTANCES, exact

import drsl_kernels
from drsl_kernels import GCELoss, ISCELoss, LogOddsLoss, MAELoss, gce_loss, isce_loss, mae_loss, softmax_loss
from drsl_kernels.members import Common

ROWS, CLASSES = 17, 11
MARGINS = torch.linspace(-0.5, 1.0, CLASSES)

MEMBERS: dict[str, dict[str, Any]] = {
    "truncated_gce": {"truth": "gce", "threshold": 0.2},
    "own_margins": {"margin": MARGINS, "scale": 1.4},
    "own_margins_smoothed": {"margin": MARGINS, "label_smoothing": 0.1},
    "sigsoftmax": {"activation": "sigsoftmax"},
    "sigsoftmax_smoothed": {"activation": "sigsoftmax", "label_smoothing": 0.1},
    "sigsoftmax_gce": {"activation": "sigsoftmax", "truth": "gce", "q": 0.4, "threshold": 0.05},
    "sigsoftmax_log_odds": {"activation": "sigsoftmax", "truth": "log_odds", "margin": MARGINS},
}
WEIGHT = torch.linspace(0.2, 2.0, CLASSES)


@pytest.mark.every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", [None, *DISTANCES])
@pytest.mark.parametrize("member", MEMBERS)
def test_values_and_gradients(member: str, distance: str | None, dtype: str, backend: str) -> None:
    z, y = random_logits(ROWS, CLASSES, dtype=DTYPES[dtype]), random_labels(ROWS, classes=CLASSES)
    y[3] = -100
    arguments = {"distance": distance, "backend": backend, **MEMBERS[member]}
    assert_true(z, y, 0.7, **arguments)
    assert_true(z, y, torch.linspace(-1, 1, ROWS), reduction="none", weight=WEIGHT, **arguments)
    assert_true(z, y, 0.7, reduction="sum", upstream=torch.tensor(-2.5), **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 16, 33, 321, 1003, 9000])
@pytest.mark.parametrize("member", ["sigsoftmax", "sigsoftmax_smoothed", "own_margins"])
def test_sizes(member: str, classes: int, dtype: str, backend: str) -> None:
    z, y = random_logits(5, classes, dtype=DTYPES[dtype]), random_labels(5, classes=classes)
    z[0, (y[0] + 1) % classes] = -torch.inf
    arguments = dict(MEMBERS[member])
    if "margin" in arguments:
        arguments["margin"] = torch.rand(classes)
    assert_true(z, y, 0.3, distance="uniform", backend=backend, tolerance=32 + classes**0.5, **arguments)


@pytest.mark.parametrize("member", MEMBERS)
def test_images(member: str, backend: str) -> None:
    z = random_logits(3, CLASSES, 4, 5)
    y = random_labels(3, 4, 5, classes=CLASSES)
    assert_true(z, y, 0.3, distance="kl", backend=backend, **MEMBERS[member])
    plain = z.movedim(1, -1).reshape(-1, CLASSES)
    arguments = {"distance": "kl", "tau": 0.3, "backend": backend, **MEMBERS[member]}
    torch.testing.assert_close(softmax_loss(z, y, **arguments), softmax_loss(plain, y.flatten(), **arguments))


@pytest.mark.parametrize("member", MEMBERS)
def test_derivatives_of_any_order(member: str, backend: str) -> None:
    arguments = {name: v.double()[:4] if name == "margin" else v for name, v in MEMBERS[member].items()}

    def loss(z: Tensor) -> Tensor:
        return softmax_loss(z, labels(2, 4), distance="uniform", tau=0.5, backend=backend, **arguments)  # type: ignore[call-overload,no-any-return]

    assert torch.autograd.gradcheck(loss, leaf("float64", 2, 4))
    assert torch.autograd.gradgradcheck(loss, leaf("float64", 2, 4))


def test_under_transforms_and_the_compiler() -> None:
    z, y = leaf("float32"), labels()
    margin = torch.rand(7)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return isce_loss(z, y, margin, 1.2, activation="sigsoftmax", distance="kl", tau=0.1)

    (want,) = torch.autograd.grad(loss(z, y), z)
    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(z, y), z)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.func.grad(loss)(z.detach(), y), want)


class TestLimits:
    def test_gce_between_cross_entropy_and_half_the_mean_absolute_error(self, backend: str) -> None:
        y = labels()
        for q, peer in ((1e-6, lambda z: F.cross_entropy(z, y)), (1.0, lambda z: mae_loss(z, y, backend=backend) / 2)):
            z = leaf("float64")
            (want,) = torch.autograd.grad(peer(z), z)
            ours = gce_loss(z, y, q, backend=backend)
            torch.testing.assert_close(ours, peer(z), rtol=1e-5, atol=0)
            torch.testing.assert_close(torch.autograd.grad(ours, z)[0], want, rtol=1e-4, atol=1e-7)

    def test_mae_is_the_error_of_the_softmax(self, backend: str) -> None:
        z, y = leaf("float64"), labels()
        want = (z.softmax(1) - F.one_hot(y, 7)).abs().sum(1).mean()
        torch.testing.assert_close(mae_loss(z, y, backend=backend), want)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gce_has_finite_gradients_where_the_label_is_impossible(self, dtype: str, backend: str) -> None:
        z = torch.tensor([[-1e4, 1e4, 0.0], [-torch.inf, 1.0, 2.0]], dtype=DTYPES[dtype]).requires_grad_()
        for threshold in (0.0, 0.5):
            loss = gce_loss(z, torch.tensor([0, 0]), threshold=threshold, reduction="none", backend=backend)
            torch.testing.assert_close(loss, torch.full_like(loss, (1 - threshold**0.7) / 0.7))
            (grad,) = torch.autograd.grad(loss.sum(), z)
            assert torch.equal(grad, torch.zeros_like(z))

    def test_truncated_gce_is_constant_below_its_threshold(self, backend: str) -> None:
        p = torch.tensor([0.1, 0.49, 0.51, 0.9], dtype=torch.float64)
        z = torch.stack([p.log(), (1 - p).log()], 1).requires_grad_()
        loss = gce_loss(z, torch.zeros(4, dtype=torch.int64), 0.7, threshold=0.5, reduction="none", backend=backend)
        torch.testing.assert_close(loss, (1 - p.clamp(min=0.5) ** 0.7) / 0.7)
        (grad,) = torch.autograd.grad(loss.sum(), z)
        torch.testing.assert_close(grad[:, 0], torch.where(p < 0.5, 0.0, -(p**0.7) * (1 - p)))

    def test_the_margin_is_that_of_am_softmax(self, backend: str) -> None:
        """On cosines: -log exp(s (cos - m)) / (exp(s (cos - m)) + sum exp(s cos_k))."""
        cosines, y = torch.rand(8, 5, dtype=torch.float64) * 2 - 1, random_labels(8, classes=5)
        s, m = 30.0, 0.35
        own = (s * (cosines.gather(1, y[:, None]).squeeze(1) - m)).exp()
        rest = (s * cosines).exp().scatter(1, y[:, None], 0.0).sum(1)
        want = -(own / (own + rest)).log().mean()
        torch.testing.assert_close(isce_loss(s * cosines, y, s * m, backend=backend), want)

    def test_equal_margins_are_one_margin(self, backend: str) -> None:
        z, y = leaf("float32"), labels()
        own = isce_loss(z, y, torch.full((7,), 0.3), backend=backend, distance="uniform", tau=0.5)
        one = isce_loss(z, y, 0.3, backend=backend, distance="uniform", tau=0.5)
        assert own.item() == one.item()

    def test_sigsoftmax_is_exp_times_sigmoid(self, backend: str) -> None:
        z, y = leaf("float64"), labels()
        product = z.exp() * z.sigmoid()
        p = product / product.sum(1, keepdim=True)
        want = -p.gather(1, y[:, None]).log().mean() + 0.5 * (p - 1 / 7).square().sum(1).mean()
        ours = softmax_loss(z, y, activation="sigsoftmax", distance="uniform", tau=0.5, backend=backend)
        torch.testing.assert_close(ours, want)
        grads = [torch.autograd.grad(loss, z)[0] for loss in (ours, want)]
        torch.testing.assert_close(*grads)

    def test_sigsoftmax_of_large_logits_is_softmax(self, backend: str) -> None:
        """log sigmoid(z) is 0 far above 0; far below, it is z, and the logits count twice."""
        z, y = leaf("float64"), labels()
        arguments: dict[str, Any] = {"distance": "kl", "tau": 0.2, "backend": backend}
        for offset, factor in ((60.0, 1.0), (-60.0, 2.0)):
            ours = softmax_loss(z + offset, y, activation="sigsoftmax", **arguments)
            torch.testing.assert_close(ours, softmax_loss(factor * z, y, **arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e4, 1e3, 50.0])
@pytest.mark.parametrize("truth", ["ce", "gce", "log_odds"])
def test_sigsoftmax_stays_finite(truth: str, scale: float, dtype: str, backend: str) -> None:
    z = (torch.tensor([[1.0, -1.0, 0.5], [-1.0, -0.5, 1.0], [-1.0, -1.0, -1.0]]) * scale).to(DTYPES[dtype])
    z.requires_grad_()
    loss = softmax_loss(
        z, torch.tensor([0, 0, 2]), truth=truth, activation="sigsoftmax", distance="kl", tau=0.1, backend=backend
    )  # type: ignore[call-overload]
    assert loss.isfinite()
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("truth", ["ce", "gce", "mae"])
def test_sigsoftmax_is_exact_in_saturation(truth: str, backend: str) -> None:
    """Loss and gradient of sure rows keep their relative precision."""
    for gap in (10.0, 20.0, 35.0):
        row = [gap, 0.5, -1.0, 0.25]
        z = torch.tensor([row]).requires_grad_()
        loss = softmax_loss(z, torch.tensor([0]), truth=truth, activation="sigsoftmax", backend=backend)  # type: ignore[call-overload]
        (grad,) = torch.autograd.grad(loss, z)
        value, slopes = exact(row, 0, truth=truth, activation="sigsoftmax", digits=60)
        assert abs(loss.item() / value - 1) < 4e-6
        # The Triton interpreter's exponential is that of the hardware, to a few 1e-6 at such arguments.
        for ours, slope in zip(grad[0].tolist(), slopes, strict=True):
            assert abs(mpmath.mpf(ours) / slope - 1) < 2e-5


class TestArguments:
    def test_a_function_and_its_module_agree(self) -> None:
        z, y = leaf("float32"), labels()
        margin = torch.rand(7)
        common: dict[str, Any] = {"distance": "kl", "tau": 0.2, "weight": torch.rand(7), "reduction": "sum"}
        pairs: list[tuple[nn.Module, Tensor]] = [
            (GCELoss(0.5, threshold=0.1, **common), gce_loss(z, y, 0.5, threshold=0.1, **common)),
            (MAELoss(**common), mae_loss(z, y, **common)),
            (
                ISCELoss(margin, 1.5, label_smoothing=0.1, **common),
                isce_loss(z, y, margin, 1.5, label_smoothing=0.1, **common),
            ),
            (LogOddsLoss(**common), drsl_kernels.log_odds_loss(z, y, **common)),
        ]
        for module, loss in pairs:
            assert torch.equal(module(z, y), loss)
            assert "tau=0.2" in repr(module)

    def test_tensors_of_modules_move_with_them(self) -> None:
        module = ISCELoss(torch.rand(7), weight=torch.rand(7), tau=nn.Parameter(torch.tensor(0.1)), distance="kl")
        assert set(module.state_dict()) == {"margin", "weight", "tau"}
        assert [name for name, _ in module.named_parameters()] == ["tau"]
        assert module.double().get_buffer("margin").dtype == torch.float64
        module(leaf("float64"), labels()).backward()
        assert module.tau.grad.isfinite()

    def test_statistics(self) -> None:
        z, y = leaf("float32"), labels()
        loss, stats = gce_loss(z, y, 0.7, return_stats=True, reduction="none")
        torch.testing.assert_close(loss, (1 - (-0.7 * stats.cross_entropy).exp()) / 0.7)
        _, stats = isce_loss(z, y, 0.5, activation="sigsoftmax", return_stats=True)
        u = z + F.logsigmoid(z)
        others = u.scatter(1, y[:, None], -torch.inf).amax(1)
        torch.testing.assert_close(stats.margin, (u.gather(1, y[:, None]).squeeze(1) - others).detach())
        assert torch.equal(stats.correct, z.argmax(1) == y)

    def test_the_common_arguments_are_those_of_softmax_loss(self) -> None:
        theirs = inspect.signature(softmax_loss).parameters
        assert set(Common.__annotations__) < set(theirs)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda z, y: gce_loss(z, y, 0.0), ValueError, r"q must be in \[1e-30, 1\], got 0.0"),
            (lambda z, y: gce_loss(z, y, threshold=1.0), ValueError, r"threshold must be in \[0, 1\), got 1.0"),
            (lambda z, y: gce_loss(z, y, threshold="a"), TypeError, "threshold must be a number, got 'a'"),
            (lambda z, y: softmax_loss(z, y, threshold=0.5), ValueError, r"threshold must be 0 with truth='ce'"),
            (
                lambda z, y: softmax_loss(z, y, activation="relu"),
                ValueError,
                "activation must be one of 'softmax', 'sig",
            ),
            (
                lambda z, y: isce_loss(z, y, torch.rand(3)),
                ValueError,
                r"margin must be a number or have shape \(C,\) = \(7,\)",
            ),
            (lambda z, y: isce_loss(z, y, torch.ones(7, dtype=torch.int64)), TypeError, "margin must be of a floating"),
            (lambda z, y: isce_loss(z, y, torch.full((7,), torch.nan)), ValueError, "margin must be finite, got nan"),
            (
                lambda z, y: isce_loss(z, z.softmax(1), torch.rand(7)),
                ValueError,
                "margin must be 0 where y holds class prob",
            ),
            (lambda z, y: isce_loss(z, y, math.inf), ValueError, "margin must be finite, got inf"),
            (lambda z, y: isce_loss(z, y, 0.1, -1.0), ValueError, "scale must be positive and finite, got -1.0"),
            (lambda z, y: GCELoss(2.0), ValueError, r"q must be in \[1e-30, 1\], got 2.0"),
            (lambda z, y: ISCELoss(torch.rand(2, 2)), ValueError, r"margin must be a number or have shape \(C,\), got"),
            (lambda z, y: MAELoss(q=0.5), TypeError, "MAELoss got an unexpected argument 'q'"),
            (lambda z, y: MAELoss(reduction="max"), ValueError, "reduction must be one of"),
        ],
    )
    def test_errors(self, call: Callable[[Tensor, Tensor], Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            call(leaf("float32"), labels())

    @pytest.mark.parametrize("wrong", [torch.rand(3), torch.full((7,), torch.inf), torch.ones(7).int()])
    def test_every_backend_refuses_wrong_margins(self, wrong: Tensor, backend: str) -> None:
        with pytest.raises((ValueError, TypeError), match="margin must be"):
            isce_loss(leaf("float32"), labels(), wrong, backend=backend)
