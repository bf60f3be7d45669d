"""Where the loss differs from `F.cross_entropy` on purpose, and what it leaves out: see docs/differences.md."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import random_labels, random_logits

from drsl_kernels import DRSLLoss, fused_drsl_loss, softmax_loss

ROWS, CLASSES = 4, 5


def probabilities(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random_logits(ROWS, CLASSES, dtype=dtype, seed=3).softmax(1)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_with_wide_probabilities(logits_dtype: torch.dtype, backend: str) -> None:
    z, q = random_logits(ROWS, CLASSES, dtype=logits_dtype), probabilities(torch.float64)
    loss = fused_drsl_loss(z, q, 0.0, backend=backend)
    assert loss.dtype == (torch.float64 if logits_dtype == torch.float64 else torch.float32)
    assert F.cross_entropy(z, q).dtype == torch.float64
    torch.testing.assert_close(loss.double(), F.cross_entropy(z.double(), q), rtol=1e-5, atol=1e-6)


def test_masked_class_of_probability_zero(backend: str) -> None:
    z = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    q = torch.tensor([[0.5, 0.0, 0.5]])
    assert F.cross_entropy(z, q).isnan()
    loss = fused_drsl_loss(z, q, 0.0, backend=backend)
    loss.backward()
    without = z.detach()[:, [0, 2]].requires_grad_()
    other = F.cross_entropy(without, q[:, [0, 2]])
    other.backward()
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(z.grad[:, [0, 2]], without.grad)
    assert z.grad[0, 1] == 0


@pytest.mark.parametrize("soft", [False, True])
def test_weight_is_a_constant(soft: bool, backend: str) -> None:
    z, weight = random_logits(ROWS, CLASSES).requires_grad_(), torch.rand(CLASSES, requires_grad=True)
    y = probabilities() if soft else random_labels(ROWS, classes=CLASSES)
    fused_drsl_loss(z, y, 0.5, weight=weight, backend=backend).backward()
    assert weight.grad is None
    assert z.grad is not None


def test_one_class_unbatched(backend: str) -> None:
    z, y = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="class probabilities"):
        F.cross_entropy(z, y)
    assert fused_drsl_loss(z, y, 0.5, backend=backend) == 0.0


def test_weight_of_another_dtype(backend: str) -> None:
    z, y, weight = random_logits(ROWS, CLASSES), random_labels(ROWS, classes=CLASSES), torch.rand(CLASSES).double()
    with pytest.raises(RuntimeError, match="scalar type"):
        F.cross_entropy(z, y, weight)
    torch.testing.assert_close(
        fused_drsl_loss(z, y, 0.0, weight=weight, backend=backend), F.cross_entropy(z, y, weight.float())
    )


def test_sparse_probabilities(backend: str) -> None:
    z, q = random_logits(ROWS, CLASSES), probabilities().to_sparse()
    assert F.cross_entropy(z, q).isfinite()
    with pytest.raises(TypeError, match="y must be a dense tensor"):
        fused_drsl_loss(z, q, 0.0, backend=backend)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_probabilities_of_no_class(reduction: str, backend: str) -> None:
    z, q = torch.zeros(ROWS, 0, requires_grad=True), torch.zeros(ROWS, 0)
    loss = softmax_loss(z, q, reduction=reduction, backend=backend)  # type: ignore[call-overload]
    theirs = F.cross_entropy(z, q, reduction=reduction)
    torch.testing.assert_close(loss, torch.zeros_like(theirs))
    assert (theirs.isnan() if reduction == "mean" else theirs == 0).all()
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert grad.shape == z.shape


def test_names_and_positions() -> None:
    parameters = inspect.signature(fused_drsl_loss).parameters.values()
    by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == ["logits", "y", "tau"]
    with pytest.raises(TypeError, match="input"):
        fused_drsl_loss(input=torch.zeros(1, 2), target=torch.zeros(1, dtype=torch.int64), tau=0.0)  # type: ignore[call-overload]


def test_what_is_not_there() -> None:
    """z-loss."""
    names = {
        name.lower() for function in (fused_drsl_loss, softmax_loss) for name in inspect.signature(function).parameters
    }
    assert not [name for name in names for word in ("z_loss", "lse") if word in name]


@pytest.mark.parametrize(("value", "error"), [(torch.tensor(0.1), TypeError), (True, TypeError), (-0.1, RuntimeError)])
def test_label_smoothing_is_a_number_from_0_to_1(value: Any, error: type[Exception], backend: str) -> None:
    z, y = random_logits(ROWS, CLASSES), random_labels(ROWS, classes=CLASSES)
    assert F.cross_entropy(z, y, label_smoothing=value).isfinite()
    with pytest.raises(error, match="label_smoothing must be"):
        fused_drsl_loss(z, y, 0.1, label_smoothing=value, backend=backend)


@pytest.mark.backends("cpp")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_again(dtype: torch.dtype, backend: str) -> None:
    z, y = random_logits(ROWS, CLASSES, dtype=dtype).requires_grad_(), random_labels(ROWS, classes=CLASSES)
    logits = z * 1
    loss = 3 * fused_drsl_loss(logits, y, 0.1, backend=backend)
    logits.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`", "ignore::DeprecationWarning")
def test_older_tracers() -> None:
    with pytest.raises(Exception, match=r"Tensor \| None|not supported|Unknown type"):
        torch.jit.script(DRSLLoss(0.1))
    with pytest.raises(TypeError, match="Proxy"):
        torch.fx.symbolic_trace(DRSLLoss(0.1))


@pytest.mark.backends("cpp", "reference")
def test_compiled_autograd(backend: str) -> None:
    z, y = random_logits(ROWS, CLASSES).requires_grad_(), random_labels(ROWS, classes=CLASSES)
    loss = fused_drsl_loss(z, y, 0.5, backend=backend)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        if backend == "reference":
            loss.backward()
            assert z.grad is not None
            return
        with pytest.raises(RuntimeError):
            loss.backward()
