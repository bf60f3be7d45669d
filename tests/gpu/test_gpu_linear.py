"""The fused linear loss on the device: as exact as whole logits, in less memory, without the host waiting for anything.

The truth is computed on the CPU, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, random_labels, random_logits
from on_device import never_waiting, pick, recorded
from torch import Tensor
from torch.nn import functional as F

from drsl_kernels import fused_linear_drsl_loss, fused_linear_softmax_loss, softmax_loss

pytestmark = pytest.mark.gpu

Leaves = tuple[Tensor, Tensor, Tensor]  # hidden, weight, bias


def tensors(dtype: str, device: torch.device, rows: int = 70) -> tuple[Leaves, Tensor]:
    """A layer with its input, and labels of which one is ignored."""
    rows, width, classes = pick(device, (rows, 128, 9001), (min(rows, 4), 8, 61))
    shapes = ((rows, width), (classes, width), (classes,))
    hidden, weight, bias = (
        random_logits(*shape, dtype=DTYPES[dtype], spread=0.3, seed=i).to(device) for i, shape in enumerate(shapes)
    )
    y = random_labels(rows, classes=classes).to(device)
    y[3] = -100
    return (hidden, weight, bias), y


def budget(leaves: Leaves) -> int:
    """Bytes of a third of the logits and one more row, so that there are several chunks."""
    hidden, weight, _ = leaves
    return (len(hidden) // 3 + 1) * len(weight) * hidden.element_size()


def gradients(loss_of: Callable[..., Tensor], leaves: Leaves, upstream: Tensor) -> list[Tensor]:
    """Loss, and gradients to hidden, weight and bias, in float64 on the CPU."""
    inputs = [x.detach().requires_grad_() for x in leaves]
    loss = loss_of(*inputs)
    found = torch.autograd.grad(loss, inputs, upstream.to(loss.dtype).to(loss.device).expand(loss.shape))
    return [x.detach().cpu().double() for x in (loss, *found)]


# The softcap of a layer, and a member of the family
MEMBERS: dict[str, tuple[float | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "uniform": (None, {"distance": "uniform", "tau": 0.4}),
    "smoothed": (4.0, {"distance": "kl", "tau": 0.2, "label_smoothing": 0.1}),
}


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_worse_than_whole_logits(
    dtype: str, reduction: str, member: str, device: torch.device, gpu_backend: str
) -> None:
    leaves, y = tensors(dtype, device)
    softcap, options = MEMBERS[member]
    options = {**options, "reduction": reduction}
    upstream = random_logits(len(y), seed=7).abs() if reduction == "none" else torch.tensor(64.0)

    def naive(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = F.linear(hidden, weight, bias)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return softmax_loss(z, y.to(z.device), backend="reference", **options)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_linear_softmax_loss(  # type: ignore[return-value]
            hidden, weight, y, bias=bias, softcap=softcap, memory_budget=budget(leaves), backend=gpu_backend, **options
        )

    exact = gradients(naive, tuple(x.cpu().double() for x in leaves), upstream)
    plain, fused = gradients(naive, leaves, upstream), gradients(ours, leaves, upstream)
    # The interpreter truncates to bfloat16 where a device rounds.
    allowed = pick(device, 1.3, 4.0) if dtype != "float32" else 4.0
    for name, truth, theirs, mine in zip(("loss", "hidden", "weight", "bias"), exact, plain, fused, strict=True):
        least = 4 * torch.finfo(torch.float32).eps * truth.norm()
        assert (mine - truth).norm() <= allowed * (theirs - truth).norm() + least, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_graph_of_a_linear_loss(dtype: str, device: torch.device, gpu_backend: str) -> None:
    """Captured once, replayed with other inputs and another upstream gradient."""
    leaves, y = tensors(dtype, device)
    inputs = [x.requires_grad_() for x in leaves]
    upstream = torch.ones((), device=device)

    def step() -> list[Tensor]:
        loss = fused_linear_drsl_loss(
            inputs[0], inputs[1], y, 0.5, bias=inputs[2], memory_budget=budget(leaves), backend=gpu_backend
        )
        return [loss.detach(), *torch.autograd.grad(loss, inputs, upstream)]

    replay = recorded(device, step)
    for seed, factor in enumerate(pick(device, (1.0, 3.0), (3.0,))):
        inputs[0].data.copy_(random_logits(*inputs[0].shape, dtype=DTYPES[dtype], spread=0.3, seed=seed + 10))
        y.copy_(random_labels(len(y), classes=len(inputs[1]), seed=seed + 20))
        upstream.fill_(factor)
        found = [x.clone() for x in replay()]
        for replayed, called in zip(found, step(), strict=True):
            eps = torch.finfo(called.dtype).eps
            torch.testing.assert_close(replayed, called, rtol=2 * eps, atol=2 * eps * called.abs().max().item())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_linear_loss_without_synchronising(
    dtype: str, reduction: str, device: torch.device, gpu_backend: str
) -> None:
    leaves, y = tensors(dtype, device)
    tau = torch.full((), 0.5, device=device, requires_grad=True)
    inputs = [*(x.requires_grad_() for x in leaves), tau]

    def step() -> None:
        loss, _ = fused_linear_drsl_loss(
            *(inputs[0], inputs[1], y, tau),
            bias=inputs[2],
            reduction=reduction,  # type: ignore[arg-type]
            return_stats=True,
            memory_budget=budget(leaves),
            backend=gpu_backend,  # type: ignore[arg-type]
        )
        torch.autograd.grad(loss, inputs, torch.full_like(loss, 2.0))

    step()  # compiles, and asks the device about itself
    with never_waiting(device):
        step()


def test_linear_losses_are_bit_identical(device: torch.device, gpu_backend: str) -> None:
    leaves, y = tensors("bfloat16", device)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_linear_drsl_loss(  # type: ignore[return-value]
            hidden, weight, y, 0.5, bias=bias, memory_budget=budget(leaves), backend=gpu_backend
        )

    def once() -> list[Tensor]:
        return gradients(ours, leaves, torch.ones(()))

    first = once()
    for _ in range(pick(device, 20, 1)):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_a_linear_loss(dtype: str, device: torch.device, gpu_backend: str) -> None:
    """Above hidden, weight and their gradients: the budget, a weight's gradient in float32, and 1 MiB with the rows."""
    if device.type == "cpu":
        pytest.skip("CPU memory is not counted")
    rows, width, classes, allowed = 8192, 256, 32000, 32 << 20
    hidden = torch.randn(rows, width, dtype=DTYPES[dtype], device=device).requires_grad_()
    weight = torch.randn(classes, width, dtype=DTYPES[dtype], device=device).mul_(0.1).requires_grad_()
    y = torch.randint(classes, (rows,), device=device)

    def step() -> None:
        loss = fused_linear_drsl_loss(hidden, weight, y, 0.5, memory_budget=allowed, backend=gpu_backend)
        torch.autograd.grad(loss, (hidden, weight))

    step()  # the matrix products keep a workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    gradients_of_both = (hidden.numel() + weight.numel()) * hidden.element_size()
    widened = weight.numel() * 4 if dtype == "bfloat16" else 0
    assert taken <= gradients_of_both + allowed + widened + 256 * rows + 2**20
