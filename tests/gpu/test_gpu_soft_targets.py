"""Class probabilities on the device, and compiled code that calls the kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, random_labels, random_logits
from torch import Tensor

from drsl_kernels import fused_drsl_loss

pytestmark = pytest.mark.gpu

# (rows, classes): several rows per program, and rows that are too long for one
SHAPES = pytest.mark.parametrize("shape", [(33, 10), (3, 9001)], ids=["few", "many"])


def loss_and_gradient(z: Tensor, q: Tensor, backend: str, **arguments: object) -> tuple[Tensor, Tensor]:
    leaf = z.detach().requires_grad_()
    loss = fused_drsl_loss(leaf, q, 0.5, backend=backend, **arguments)  # type: ignore[call-overload]
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@SHAPES
@pytest.mark.parametrize("distance", ["uniform", "kl"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_class_probabilities(
    dtype: str, smoothing: float, distance: str, shape: tuple[int, int], device: torch.device, gpu_backend: str
) -> None:
    """Against the reference in float64."""
    z, q = random_logits(*shape, dtype=DTYPES[dtype]), random_logits(*shape, seed=2).softmax(1)
    weight = torch.rand(shape[1], generator=torch.Generator().manual_seed(1))
    options = {"distance": distance, "label_smoothing": smoothing}
    best = loss_and_gradient(z.double(), q.double(), "reference", weight=weight.double(), **options)
    got = loss_and_gradient(z.to(device), q.to(device), gpu_backend, weight=weight.to(device), **options)
    eps = torch.finfo(z.dtype).eps
    torch.testing.assert_close(got[0].cpu().double(), best[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[1].cpu().double(), best[1], rtol=max(2 * eps, 1e-4), atol=1e-6)


def test_mixup_meets_the_mixed_losses(device: torch.device, gpu_backend: str) -> None:
    """Without a penalty the loss is linear in the probabilities."""
    z = random_logits(16, 10).to(device)
    a, b = (random_labels(16, classes=10, seed=seed).to(device) for seed in (1, 2))
    q = 0.3 * F.one_hot(a, 10) + 0.7 * F.one_hot(b, 10)
    mixed = 0.3 * fused_drsl_loss(z, a, 0.0, backend=gpu_backend) + 0.7 * fused_drsl_loss(
        z, b, 0.0, backend=gpu_backend
    )
    torch.testing.assert_close(fused_drsl_loss(z, q, 0.0, backend=gpu_backend), mixed)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_compiled(soft: bool, device: torch.device, gpu_backend: str) -> None:
    """A training step of two batch sizes gives what it gives uncompiled."""
    torch._dynamo.reset()

    def step(z: Tensor, y: Tensor) -> Tensor:
        return fused_drsl_loss(2 * z, y, 0.5, backend=gpu_backend)  # type: ignore[call-overload, no-any-return]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager" if device.type == "cpu" else "inductor")
    for rows in (9, 12):
        z = random_logits(rows, 10).to(device)
        y = (random_logits(rows, 10, seed=2).softmax(1) if soft else random_labels(rows, classes=10)).to(device)
        results = []
        for run in (step, compiled):
            leaf = z.clone().requires_grad_()
            loss = run(leaf, y)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(results[1], results[0])
