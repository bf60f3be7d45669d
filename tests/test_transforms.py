"""Where only PyTorch's own operators work, calls go through the reference on their own: `torch.func`, forward mode,
fake tensors, dispatch modes. The results are those of the textbook formula.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import random_labels, random_logits
from torch import Tensor
from truth import DISTANCES, TRUTHS, loss_and_gradient, row_losses

from drsl_kernels import fused_drsl_loss, softmax_loss

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, inside functorch

ROWS, CLASSES = 4, 5


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return random_logits(ROWS, CLASSES, dtype=dtype), random_labels(ROWS, classes=CLASSES)


def ours(z: Tensor, y: Tensor, tau: Tensor | float = 0.5, **arguments: Any) -> Tensor:
    return fused_drsl_loss(z, y, tau, **arguments)


def textbook(z: Tensor, y: Tensor, tau: Tensor | float = 0.5) -> Tensor:
    return row_losses(z, y, tau, distance="uniform").mean()


def test_func_grad() -> None:
    z, y = inputs()
    grad, value = torch.func.grad_and_value(ours)(z, y)
    want, want_grad, _ = loss_and_gradient(z, y, 0.5, distance="uniform")
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad, want_grad)


def test_func_grad_of_tau() -> None:
    z, y = inputs()
    tau = torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(
        torch.func.grad(ours, argnums=2)(z, y, tau), loss_and_gradient(z, y, tau, distance="uniform")[2]
    )


def test_vmap() -> None:
    z, y = random_logits(3, ROWS, CLASSES), random_labels(3, ROWS, classes=CLASSES)
    got = torch.func.vmap(ours)(z, y)
    torch.testing.assert_close(got, torch.stack([ours(a, b) for a, b in zip(z, y, strict=True)]))


def test_vmap_over_unbatched_rows() -> None:
    z, y = inputs()
    got = torch.func.vmap(ours)(z, y)
    torch.testing.assert_close(got, ours(z, y, reduction="none"))


def test_vmap_over_tau_alone() -> None:
    z, y = inputs()
    taus = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    got = torch.func.vmap(ours, in_dims=(None, None, 0))(z, y, taus)
    torch.testing.assert_close(got, torch.stack([ours(z, y, tau.item()) for tau in taus]))


def test_vmap_with_statistics() -> None:
    z, y = inputs()
    _, got = torch.func.vmap(lambda z, y: fused_drsl_loss(z, y, 0.5, return_stats=True))(z, y)
    _, want = fused_drsl_loss(z, y, 0.5, return_stats=True)
    torch.testing.assert_close(tuple(got), tuple(want))


def test_per_sample_gradients() -> None:
    z, y = inputs()
    got = torch.func.vmap(torch.func.grad(ours))(z, y)
    torch.testing.assert_close(got, ROWS * loss_and_gradient(z, y, 0.5, distance="uniform")[1])


@pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd])
def test_jacobian(jacobian: Any) -> None:
    z, y = inputs()
    got = jacobian(lambda z: ours(z, y, reduction="none"))(z)
    want = torch.autograd.functional.jacobian(lambda z: row_losses(z, y, 0.5, distance="uniform"), z)
    torch.testing.assert_close(got, want)


def test_hessian() -> None:
    z, y = inputs()
    want = torch.autograd.functional.hessian(lambda z: textbook(z, y), z)
    torch.testing.assert_close(torch.func.hessian(lambda z: ours(z, y))(z), want)


def test_jvp() -> None:
    z, y = inputs()
    direction = random_logits(ROWS, CLASSES, dtype=torch.float64, seed=3)
    value, slope = torch.func.jvp(lambda z: ours(z, y), (z,), (direction,))
    want, grad, _ = loss_and_gradient(z, y, 0.5, distance="uniform")
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(slope, (grad * direction).sum())


def test_forward_mode() -> None:
    z, y = inputs()
    direction = random_logits(ROWS, CLASSES, dtype=torch.float64, seed=3)
    with torch.autograd.forward_ad.dual_level():
        loss = ours(torch.autograd.forward_ad.make_dual(z, direction), y)
        slope = torch.autograd.forward_ad.unpack_dual(loss).tangent
    torch.testing.assert_close(slope, (loss_and_gradient(z, y, 0.5, distance="uniform")[1] * direction).sum())


@pytest.mark.parametrize("vectorize", [False, True])
def test_functional_jacobian(vectorize: bool) -> None:
    z, y = inputs()
    got = torch.autograd.functional.jacobian(lambda z: ours(z, y, reduction="none"), z, vectorize=vectorize)
    want = torch.autograd.functional.jacobian(lambda z: row_losses(z, y, 0.5, distance="uniform"), z)
    torch.testing.assert_close(got, want)


def test_transforms_of_a_label_out_of_range_fail() -> None:
    z, y = inputs()
    y[1] = CLASSES
    with pytest.raises((IndexError, RuntimeError)):
        torch.func.grad(ours)(z, y)


def test_fake_tensors() -> None:
    with torch._subclasses.FakeTensorMode():
        loss = fused_drsl_loss(torch.empty(4, 5), torch.zeros(4, dtype=torch.long), 0.5, reduction="none")
    assert loss.shape == (4,)


@pytest.mark.parametrize("soft", [False, True])
def test_fake_tensors_outside_of_their_mode(soft: bool) -> None:
    """A tensor that is made of a plain number there would be a real one."""
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        z, weight, tau = torch.empty(4, 5, requires_grad=True), torch.empty(5), torch.empty(4)
        y = torch.empty(4, 5) if soft else torch.zeros(4, dtype=torch.long)
    for distance in ("uniform", "kl") if soft else DISTANCES:
        for arguments in ({}, {"weight": weight, "label_smoothing": 0.1}):
            loss, _ = softmax_loss(z, y, distance=distance, tau=tau, return_stats=True, **arguments)  # type: ignore[call-overload]
            assert torch.autograd.grad(loss, z)[0].shape == z.shape
    if not soft:
        for truth in TRUTHS:
            assert softmax_loss(z, y, truth=truth, reduction="none").shape == (4,)


@pytest.mark.filterwarnings("ignore:drsl_kernels runs on the slower")
def test_meta_tensors() -> None:
    z, y = torch.empty(4, 5, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
    loss = softmax_loss(z, y, distance="kl", tau=0.1, reduction="none")
    assert loss.shape == (4,)
    assert loss.is_meta


def test_dispatch_modes_see_the_operators() -> None:
    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    z, y = inputs()
    with Recorder() as recorder:
        loss = ours(z, y)
    torch.testing.assert_close(loss, textbook(z, y))
    assert recorder.names


def test_tensor_subclasses() -> None:
    class Named(Tensor):
        pass

    z, y = inputs()
    loss = ours(z.as_subclass(Named).requires_grad_(), y)
    torch.testing.assert_close(loss.detach().as_subclass(Tensor), textbook(z, y))


def test_default_device_and_dtype_do_not_matter() -> None:
    z, y = inputs(torch.float32)
    want = ours(z, y)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("cpu"):
            for backend in ("cpp", "reference"):
                assert ours(z, y, backend=backend).dtype == torch.float32
                torch.testing.assert_close(ours(z, y, backend=backend), want)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("which", ["func", "forward_mode"])
def test_forcing_the_compiled_backend_there_says_why(which: str) -> None:
    z, y = inputs()
    message = "backend='cpp' is not usable inside"
    if which == "func":
        with pytest.raises(RuntimeError, match=message):
            torch.func.grad(lambda z: ours(z, y, backend="cpp"))(z)
    else:
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
            ours(z, y, backend="cpp")


def test_negative_views(backend: str) -> None:
    """The imaginary part of a conjugate is a float tensor whose sign is not in memory."""
    values, y = torch.complex(*random_logits(2, ROWS, CLASSES)), random_labels(ROWS, classes=CLASSES)
    z = values.conj().imag
    assert z.is_neg()
    got = fused_drsl_loss(z, y, torch.complex(*random_logits(2, ROWS)).conj().imag, backend=backend)
    want = fused_drsl_loss(-values.imag, y, -torch.complex(*random_logits(2, ROWS)).imag, backend=backend)
    torch.testing.assert_close(got, want)
    leaf = values.requires_grad_()
    grad = torch.autograd.grad(fused_drsl_loss(leaf.conj().imag, y, 0.5, backend=backend), leaf)[0]
    torch.testing.assert_close(
        -grad.imag, loss_and_gradient(-values.imag, y, 0.5, distance="uniform")[1], check_dtype=False
    )


@pytest.mark.backends("cpp", "reference")
def test_zeros_without_memory(backend: str) -> None:
    """As logits, as probabilities, as upstream gradient: what forward-mode differentiation makes of constants."""
    zeros = torch._efficientzerotensor
    z, y = random_logits(4, 3).requires_grad_(), torch.tensor([0, 1, 2, 0])
    assert_close = torch.testing.assert_close
    assert_close(fused_drsl_loss(zeros((4, 3)), y, 0.0, backend=backend), F.cross_entropy(torch.zeros(4, 3), y))
    assert fused_drsl_loss(z, zeros((4, 3)), 0.0, backend=backend) == 0
    (grad,) = torch.autograd.grad(fused_drsl_loss(z, y, 0.5, backend=backend), z, zeros(()))
    assert_close(grad + 0.0, torch.zeros(4, 3))


def test_traced_in_a_fresh_process() -> None:
    """The first call of all, which looks for the backends, may be a traced one."""
    program = """
import torch
from drsl_kernels import fused_drsl_loss
z, y = torch.randn(6, 5), torch.randint(5, (6,))
traced = torch.jit.trace(lambda a, b: fused_drsl_loss(a, b, 0.3), (z, y))
torch.testing.assert_close(traced(z[:4], y[:4]), fused_drsl_loss(z[:4], y[:4], 0.3))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
