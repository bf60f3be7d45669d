"""`sigsoftmax` and `log_sigsoftmax`: against the definition in float64, their limits, what autograd makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from cases import DTYPES, assert_error, labels, leaf, random_labels, random_logits
from torch import Tensor

from drsl_kernels import fused_drsl_loss, log_sigsoftmax, sigsoftmax

INF = math.inf
BOTH = pytest.mark.parametrize("function", [sigsoftmax, log_sigsoftmax], ids=["sigsoftmax", "log_sigsoftmax"])
Function = Callable[..., Tensor]


def naive(z: Tensor, dim: int = -1) -> Tensor:
    """The definition, for logits of moderate size."""
    powers = z.exp() * z.sigmoid()
    return powers / powers.sum(dim, keepdim=True)


def naive_gradient(z: Tensor, upstream: Tensor) -> Tensor:
    """Of sum(upstream * log sigsoftmax(z)): (upstream - p * sum of upstream) * (1 + sigmoid(-z))."""
    return (upstream - naive(z) * upstream.sum(-1, keepdim=True)) * (1.0 + (-z).sigmoid())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, 2, -2])
def test_values(dim: int, dtype: str) -> None:
    z = random_logits(4, 5, 3, dtype=DTYPES[dtype], spread=5.0)
    want = naive(z.double(), dim)
    arithmetic = z.to(torch.float64 if dtype == "float64" else torch.float32)
    for got, truth, plain in (
        (sigsoftmax(z, dim), want, naive(arithmetic, dim)),
        (log_sigsoftmax(z, dim), want.log(), naive(arithmetic, dim).log()),
    ):
        assert got.dtype == z.dtype
        assert_error("value", got, truth, plain.double(), 4 * torch.finfo(arithmetic.dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype: str) -> None:
    z, upstream = leaf(dtype), random_logits(6, 7, dtype=DTYPES[dtype], seed=3)
    (got,) = torch.autograd.grad(log_sigsoftmax(z), z, upstream)
    want = naive_gradient(z.detach().double(), upstream.double())
    assert_error("gradient", got, want, want, 16 * torch.finfo(z.dtype).eps)


@BOTH
def test_first_and_second_derivatives(function: Function) -> None:
    """From -60 to 60, and so beyond the point from which log sigmoid(z) is z."""
    z = torch.linspace(-60.0, 60.0, 24, dtype=torch.float64).reshape(4, 6)[:, torch.randperm(6)]
    for slice_ in (z, random_logits(2, 3, 2, dtype=torch.float64)):
        slice_.requires_grad_()
        assert torch.autograd.gradcheck(lambda z: function(z, 1), slice_, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda z: function(z, 1), slice_)


def test_large_constants() -> None:
    """p goes to softmax(z) at one end, and to softmax(2 z) at the other."""
    z = random_logits(5, 6, dtype=torch.float64)
    torch.testing.assert_close(sigsoftmax(z + 50.0), z.softmax(1), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(sigsoftmax(z - 50.0), (2.0 * z).softmax(1), rtol=1e-12, atol=0.0)
    assert (sigsoftmax(z) - z.softmax(1)).abs().max() > 0.01


def test_two_classes() -> None:
    """log(p_1 / p_2) of (z, 0) is u(z) - u(0) = 2 z - log((1 + e^z) / 2)."""
    z = torch.linspace(-8.0, 8.0, 33, dtype=torch.float64)
    log_p = log_sigsoftmax(torch.stack([z, torch.zeros_like(z)]), 0)
    torch.testing.assert_close(log_p[0] - log_p[1], 2.0 * z - ((1.0 + z.exp()) / 2.0).log())


def test_order_of_the_classes() -> None:
    z = random_logits(20, 9, spread=10.0)
    assert torch.equal(sigsoftmax(z).argsort(1), z.argsort(1))


def test_rank() -> None:
    """log softmax of logits of rank 1 has rank 2, log sigsoftmax all that the matrix allows."""
    z = torch.outer(*random_logits(2, 6, dtype=torch.float64))
    assert torch.linalg.matrix_rank(z.log_softmax(1)) == 2
    assert torch.linalg.matrix_rank(log_sigsoftmax(z)) >= 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(sign: int, dtype: str) -> None:
    """Around 1e4 and -1e4, and over both; finite, with gradients, and right."""
    spread = 10.0 if dtype in ("float32", "float64") else 64.0
    for base in (torch.zeros(7), torch.tensor([1e4, -1e4, 0.0, 1e4, -1e4, 3.0, -3.0])):
        z = (sign * (1e4 + base + random_logits(7, spread=spread))).clamp(-1e4, 1e4).to(DTYPES[dtype]).requires_grad_()
        log_p = log_sigsoftmax(z)
        (grad,) = torch.autograd.grad(log_p[0], z)
        want = exact_log(z.detach())
        assert log_p.isfinite().all()
        assert grad.isfinite().all()
        assert_error("log p", log_p.detach(), want, want, 2 * torch.finfo(z.dtype).eps)
        assert_error("p", sigsoftmax(z).detach(), want.exp(), want.exp(), 1e-6 if dtype != "float64" else 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_of_every_size(dtype: str) -> None:
    """Through the range in which exp overflows in one dtype and not in the other."""
    for low in range(-760, 760, 8):
        z = torch.arange(low, low + 8, dtype=DTYPES[dtype])
        want = exact_log(z)
        assert_error("log p", log_sigsoftmax(z), want, want, 64 * torch.finfo(z.dtype).eps)


def exact_log(z: Tensor) -> Tensor:
    """log sigsoftmax of one row with 60 digits."""
    with mpmath.workdps(60):
        u = [2 * mpmath.mpf(x) - mpmath.log1p(mpmath.exp(x)) for x in z.double().tolist()]
        total = mpmath.log(mpmath.fsum(mpmath.exp(x - max(u)) for x in u)) + max(u)
        return torch.tensor([float(x - total) for x in u], dtype=torch.float64)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("gap", [1.0, 9.0, 17.0, 30.0, 60.0])
@pytest.mark.parametrize("offset", [5.0, -20.0])
def test_exact_in_saturation_as_logits(offset: float, gap: float, dtype: str) -> None:
    """Through `fused_drsl_loss` the loss of a row that is all but decided, and its gradient, keep their digits."""
    z = torch.tensor([gap, 0.25, -0.5, 0.75], dtype=DTYPES[dtype]) + offset
    z.requires_grad_()
    loss = fused_drsl_loss(log_sigsoftmax(z), torch.tensor(0), 0.0)
    (grad,) = torch.autograd.grad(loss, z)
    with mpmath.workdps(60):
        u = [2 * mpmath.mpf(x) - mpmath.log1p(mpmath.exp(x)) for x in z.tolist()]
        others = mpmath.fsum(mpmath.exp(x - u[0]) for x in u[1:])
        want = mpmath.log1p(others)
        slope = -others / (1 + others) * (1 + 1 / (1 + mpmath.exp(z[0].item())))
    bound = 1e-5 if dtype == "float32" else 1e-13
    assert loss.item() == pytest.approx(float(want), rel=bound)
    assert grad[0].item() == pytest.approx(float(slope), rel=bound)


@BOTH
def test_masked_classes(function: Function) -> None:
    z = random_logits(3, 5)
    z[:, 1], z[0, 3] = -INF, -INF
    z[2] = -INF
    z.requires_grad_()
    result = function(z)
    got = result if function is sigsoftmax else result.exp()
    torch.testing.assert_close(got[1, [0, 2, 3, 4]], naive(z[1, [0, 2, 3, 4]]))
    assert (got[:2, 1] == 0.0).all()
    assert got[2].isnan().all()  # as torch.softmax
    (grad,) = torch.autograd.grad(result[:2, 0].sum(), z)
    assert grad[:2].isfinite().all()
    assert (grad[:2][z[:2] == -INF] == 0.0).all()


@BOTH
def test_nan_and_infinity_as_softmax(function: Function) -> None:
    z = torch.tensor([[math.nan, 1.0], [INF, 1.0], [0.0, 1.0]])
    assert torch.equal(function(z).isnan(), z.softmax(1).isnan())


@BOTH
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (), (1,), (2, 1, 3)])
def test_shapes(shape: tuple[int, ...], function: Function) -> None:
    assert function(torch.zeros(shape)).shape == shape
    assert function(torch.zeros(shape), 0).shape == shape


@BOTH
def test_strides(function: Function) -> None:
    z = random_logits(6, 8, 4)
    for view in (z.transpose(0, 2), z[:, ::3], z[1:2].expand(3, -1, -1)):
        torch.testing.assert_close(function(view, 1), function(view.contiguous(), 1))


@BOTH
def test_transforms(function: Function) -> None:
    z = random_logits(4, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(function)(z), function(z))
    jacobian = torch.func.jacrev(function)(z[0])
    torch.testing.assert_close(jacobian, torch.func.jacfwd(function)(z[0]))
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(function, z[0]))


@BOTH
def test_compiled(function: Function) -> None:
    z = leaf()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    upstream = random_logits(6, 7, seed=2)
    torch.testing.assert_close(compiled(z), function(z))
    (got,) = torch.autograd.grad(compiled(z), z, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(function(z), z, upstream)[0])


def test_keeps_no_more_than_log_softmax() -> None:
    """For the backward pass: the logits, which are there anyway, and the result."""

    def kept(function: Function) -> set[int]:
        found = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.add(t.data_ptr()), lambda _: None):
            result = function(z, 1)
        return found - {z.data_ptr(), result.data_ptr()}

    z = leaf(rows=30)
    assert kept(log_sigsoftmax) == kept(torch.log_softmax) == kept(sigsoftmax) == set()


def test_in_a_loss() -> None:
    """Cross-entropy of sigsoftmax, by its own formula."""
    z, y = random_logits(6, 7), labels()
    want = -naive(z.double())[torch.arange(6), y].log().mean()
    torch.testing.assert_close(fused_drsl_loss(log_sigsoftmax(z), y, 0.0).double(), want, rtol=1e-6, atol=0.0)
    soft = random_logits(6, 7, seed=4).softmax(1)
    want = -(soft * naive(z.double()).log()).sum(1).mean()
    torch.testing.assert_close(fused_drsl_loss(log_sigsoftmax(z), soft, 0.0).double(), want, rtol=1e-6, atol=0.0)


def test_of_images() -> None:
    z, y = random_logits(2, 5, 3, 4), random_labels(2, 3, 4, classes=5)
    got = fused_drsl_loss(log_sigsoftmax(z, 1), y, 0.5, distance="kl")
    rows = z.movedim(1, -1).reshape(-1, 5)
    torch.testing.assert_close(got, fused_drsl_loss(log_sigsoftmax(rows), y.flatten(), 0.5, distance="kl"))


@BOTH
def test_errors(function: Function) -> None:
    with pytest.raises(NotImplementedError, match=r"z must be float32, .* got torch\.int64"):
        function(torch.arange(3))
    with pytest.raises(TypeError, match="z must be a Tensor, got list"):
        function([1.0, 2.0])
    with pytest.raises(TypeError, match=r"dim must be an int, got 1\.0"):
        function(torch.zeros(2, 3), 1.0)
    with pytest.raises(IndexError, match=r"dim must be in \[-1, 0\] for z of shape \(3,\), got 1"):
        function(torch.zeros(3), 1)
    with pytest.raises(IndexError, match=r"dim must be in \[-2, 1\] for z of shape \(2, 3\), got 2"):
        function(torch.zeros(2, 3), 2)
