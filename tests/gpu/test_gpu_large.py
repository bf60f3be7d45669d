"""Size: offsets beyond 2^31 elements, and how much memory a call takes."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, random_logits
from on_device import pick
from truth import loss_and_gradient

from drsl_kernels import fused_drsl_loss

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("transposed", [False, True], ids=["rows_adjacent", "classes_apart"])
@pytest.mark.parametrize("classes", [10, 131072])
def test_more_than_2_to_the_31_elements(classes: int, transposed: bool, device: torch.device, gpu_backend: str) -> None:
    limit = pick(device, 2**31, 2**8 * classes.bit_length())
    classes = pick(device, classes, min(classes, 5001))
    rows = limit // classes + 3
    z = torch.empty((classes, rows) if transposed else (rows, classes), dtype=torch.bfloat16, device=device).normal_()
    z = (z.t() if transposed else z).requires_grad_()
    y = torch.randint(classes, (rows,), device=device)
    probes = sorted({0, 1, rows // 2, max(limit // classes - 1, 0), min(limit // classes, rows - 1), rows - 1})
    few, labels = z.detach()[probes].cpu(), y[probes].cpu()
    want, want_grad, _ = loss_and_gradient(few, labels, 0.5, distance="uniform", reduction="none")
    with torch.no_grad():
        loss = fused_drsl_loss(z, y, 0.5, reduction="none", backend=gpu_backend)
    torch.testing.assert_close(loss[probes].cpu().double(), want, rtol=1e-5, atol=1e-6)
    total = fused_drsl_loss(z, y, 0.5, reduction="sum", backend=gpu_backend)
    torch.testing.assert_close(total.detach().double(), loss.double().sum(), rtol=1e-5, atol=0)
    grad = torch.autograd.grad(total, z)[0]
    torch.testing.assert_close(grad[probes].cpu().double(), want_grad, rtol=2**-7, atol=1e-9)
    twice = torch.autograd.grad(2 * fused_drsl_loss(z, y, 0.5, reduction="sum", backend=gpu_backend), z)[0]
    assert torch.equal(twice[probes], 2 * grad[probes])


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2**20, 10), (4096, 1000), (1024, 50257)], ids=str)
def test_memory(
    shape: tuple[int, int], dtype: str, reduction: str, factor: float, device: torch.device, gpu_backend: str
) -> None:
    """Above the logits: one gradient, and at most 128 bytes a row."""
    if device.type == "cpu":
        pytest.skip("CPU memory is not counted")
    rows, classes = shape
    z = torch.randn(shape, dtype=DTYPES[dtype], device=device).requires_grad_()
    y = torch.randint(classes, (rows,), device=device)
    upstream = torch.full(() if reduction == "mean" else (rows,), factor, device=device)
    upstream = upstream.double() if dtype == "float64" else upstream

    def step() -> None:
        loss = fused_drsl_loss(z, y, 0.5, reduction=reduction, backend=gpu_backend)
        torch.autograd.grad(loss, z, upstream)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= z.numel() * z.element_size() + 128 * rows + 2**20


def test_memory_of_the_loss_alone(device: torch.device, gpu_backend: str) -> None:
    """No gradient: at most 128 bytes a row."""
    if device.type == "cpu":
        pytest.skip("CPU memory is not counted")
    z = random_logits(4096, 1000).to(device)
    y = torch.zeros(4096, dtype=torch.int64, device=device)
    fused_drsl_loss(z, y, 0.5, backend=gpu_backend)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_drsl_loss(z, y, 0.5, backend=gpu_backend)
    assert torch.cuda.max_memory_allocated() - before <= 128 * 4096 + 2**20
