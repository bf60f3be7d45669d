"""Upstream gradients on the device, kept graphs, loss scaling, and logits of any layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, random_labels, random_logits, run
from on_device import assert_true_on
from torch import Tensor
from truth import loss_and_gradient

from drsl_kernels import fused_drsl_loss

pytestmark = pytest.mark.gpu

# (rows, classes): several rows per program, and rows that are too long for one
SHAPES = pytest.mark.parametrize("shape", [(9, 10), (3, 9001)], ids=["few", "many"])


@SHAPES
@pytest.mark.parametrize("factor", [1.0, 3.0, 0.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_upstream_of_the_mean(
    dtype: str, factor: float, shape: tuple[int, int], device: torch.device, gpu_backend: str
) -> None:
    z, y = random_logits(*shape, dtype=DTYPES[dtype]), random_labels(shape[0], classes=shape[1])
    upstream = torch.tensor(factor)
    assert_true_on(device, z, y, 0.5, distance="uniform", upstream=upstream, backend=gpu_backend)


@SHAPES
def test_upstream_per_row(shape: tuple[int, int], device: torch.device, gpu_backend: str) -> None:
    z, y = random_logits(*shape), random_labels(shape[0], classes=shape[1])
    for upstream in (random_logits(shape[0], seed=5), torch.ones(1).expand(shape[0])):
        assert_true_on(device, z, y, 0.5, distance="uniform", reduction="none", upstream=upstream, backend=gpu_backend)


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kept_graph_gives_the_same_again(
    dtype: str, shape: tuple[int, int], device: torch.device, gpu_backend: str
) -> None:
    """And what was returned is the caller's, to change."""
    z, y = random_logits(*shape, dtype=DTYPES[dtype]).to(device), random_labels(shape[0], classes=shape[1]).to(device)
    z.requires_grad_()
    loss = fused_drsl_loss(z, y, 0.5, backend=gpu_backend)
    first = torch.autograd.grad(loss, z, retain_graph=True)[0]
    kept = first.clone()
    first.fill_(99.0)
    assert torch.equal(torch.autograd.grad(loss, z, retain_graph=True)[0], kept)
    doubled = torch.autograd.grad(loss, z, torch.full_like(loss, 2.0), retain_graph=True)[0]
    torch.testing.assert_close(doubled, 2 * kept)
    assert torch.equal(torch.autograd.grad(loss, z)[0], kept)


def test_accumulated_gradients_do_not_share_memory(device: torch.device, gpu_backend: str) -> None:
    z, y = random_logits(9, 10).to(device).requires_grad_(), random_labels(9, classes=10).to(device)
    for _ in range(3):
        fused_drsl_loss(z, y, 0.5, backend=gpu_backend).backward()
    once = loss_and_gradient(z.cpu(), y.cpu(), 0.5, distance="uniform")[1]
    torch.testing.assert_close(z.grad.cpu().double(), 3 * once, rtol=1e-5, atol=1e-7)


def test_gradient_of_tau(device: torch.device, gpu_backend: str) -> None:
    z, y = random_logits(9, 10), random_labels(9, classes=10)
    for tau in (torch.tensor(0.5), random_logits(9, seed=3)):
        assert_true_on(device, z, y, tau, distance="uniform", upstream=torch.tensor(2.0), backend=gpu_backend)


def test_second_derivative(device: torch.device, gpu_backend: str) -> None:
    z, y = random_logits(3, 4, dtype=torch.float64).to(device).requires_grad_(), random_labels(3, classes=4).to(device)
    assert torch.autograd.gradgradcheck(lambda x: fused_drsl_loss(x, y, 0.5, backend=gpu_backend), z)


def test_loss_scaling_of_float16(device: torch.device, gpu_backend: str) -> None:
    """A training step with autocast and a gradient scaler."""
    weight = random_logits(10, 6, seed=4).to(device).requires_grad_()
    x, y = random_logits(32, 6, seed=5).to(device), random_labels(32, classes=10).to(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    before = weight.detach().clone()
    with torch.autocast(device.type, dtype=torch.float16):
        logits = F.linear(x, weight)
        loss = fused_drsl_loss(logits, y, 0.5, backend=gpu_backend)
    assert logits.dtype == torch.float16
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    want = loss_and_gradient(logits.detach().cpu(), y.cpu(), 0.5, distance="uniform")[1].float().t() @ x.cpu()
    torch.testing.assert_close((before - weight.detach()).cpu() / 0.1, want, rtol=1e-2, atol=1e-3)


def test_loss_scaling_finds_an_overflow(device: torch.device, gpu_backend: str) -> None:
    z, y = random_logits(9, 10, dtype=torch.float16).to(device), random_labels(9, classes=10).to(device)
    _, grad, _ = run(z, y, 0.5, distance="uniform", upstream=torch.tensor(2.0**24).to(device), backend=gpu_backend)
    assert grad.isinf().any()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows_apart": lambda x: x[::2],
    "padded_rows": lambda x: x[:, :-3],
    "off_alignment": lambda x: x[:, 1:],
    "every_third_class": lambda x: x[:, ::3],
    "transposed": lambda x: x.t(),
    "one_row_repeated": lambda x: x[:1].expand(5, -1),
    "one_row": lambda x: x[2],
    "images": lambda x: x.reshape(2, -1, 3, 4),
    "images_channels_last": lambda x: x.reshape(2, -1, 3, 4).to(memory_format=torch.channels_last),
    "part_of_an_image": lambda x: x.reshape(2, -1, 4, 6)[:, 1:, 1:3, ::2],
}


@pytest.mark.parametrize("classes", [12, 600], ids=["few", "many"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts(dtype: str, layout: str, classes: int, device: torch.device, gpu_backend: str) -> None:
    z = LAYOUTS[layout](random_logits(8, classes, dtype=DTYPES[dtype]).to(device))
    count = z.shape[0] if z.dim() == 1 else z.shape[1]
    shape = () if z.dim() == 1 else (z.shape[0], *z.shape[2:])
    y = random_labels(*shape, classes=count)
    before = z.clone()
    assert_true_on(device, z, y, 0.5, distance="uniform", reduction="none", backend=gpu_backend)
    assert torch.equal(z, before)
