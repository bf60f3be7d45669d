"""Inputs that several test files share, and the comparison with the truth.

Relies on truth.py and the package; the test files rely on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from truth import DISTANCES, TRUTHS, loss_and_gradient

from drsl_kernels import softmax_loss

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PAIRS = [(truth, distance) for truth in TRUTHS for distance in (None, *DISTANCES)]
PAIR_IDS = [f"{truth}+{distance}" if distance else truth for truth, distance in PAIRS]

# What the dtype of the arithmetic costs: "bfloat16" and "float16" logits are computed with in float32.
ACCUMULATORS = {name: torch.float64 if name == "float64" else torch.float32 for name in DTYPES}


def random_logits(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 2.0, seed: int = 0) -> Tensor:
    """Normal logits of standard deviation `spread`, drawn in float64 and rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype)


def random_labels(*shape: int, classes: int, seed: int = 1) -> Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


# The small batch of the tests of autograd
ROWS, CLASSES = 6, 7


def leaf(dtype: str = "float32", rows: int = ROWS, classes: int = CLASSES, seed: int = 0) -> Tensor:
    return random_logits(rows, classes, dtype=DTYPES[dtype], seed=seed).requires_grad_()


def labels(rows: int = ROWS, classes: int = CLASSES) -> Tensor:
    return random_labels(rows, classes=classes)


def true_gradient(z: Tensor, tau: Tensor | float = 0.5, **arguments: Any) -> Tensor:
    arguments.setdefault("distance", "uniform")
    return loss_and_gradient(z, labels(*z.shape), tau, **arguments)[1].to(z.dtype)


def run(
    z: Tensor, y: Tensor, tau: Tensor | float = 0.0, *, upstream: Tensor | None = None, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The package's loss, gradient to the logits and gradient to tau (None for a float)."""
    z = z.detach().requires_grad_()
    if isinstance(tau, Tensor):
        tau = tau.detach().requires_grad_()
    loss = softmax_loss(z, y, tau=tau, **arguments)
    inputs = [z, tau] if isinstance(tau, Tensor) else [z]
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    grads = torch.autograd.grad(loss, inputs, upstream, materialize_grads=True)
    return loss.detach(), grads[0], grads[1] if len(grads) > 1 else None


def assert_true(
    z: Tensor,
    y: Tensor,
    tau: Tensor | float = 0.0,
    *,
    backend: str,
    tolerance: float = 32.0,
    upstream: Tensor | None = None,
    **arguments: Any,
) -> None:
    """Compare loss and gradients with the float64 truth.

    The error may be that of the naive formula in the arithmetic's dtype (float32 for half precision logits), plus
    `tolerance` rounding units of the largest value of the result, plus one rounding to the result's dtype.
    """
    got = run(z, y, tau, backend=backend, upstream=upstream, **arguments)
    best = loss_and_gradient(z, y, tau, upstream=upstream, **arguments)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    naive = loss_and_gradient(z, y, tau, upstream=upstream, dtype=dtype, **arguments)
    assert got[0].dtype == dtype
    assert got[1].dtype == z.dtype
    assert got[1].shape == z.shape
    # Where terms of size 1 cancel, errors count against 1: distances near 0, smoothing against cross-entropy. And so
    # does everything in float64, where the truth has no digits to spare (test_saturation.py has them).
    smoothed = arguments.get("label_smoothing", 0.0) > 0
    # Triton's interpreter truncates where the hardware rounds.
    half_ulps = 2.0 if backend == "triton" and z.dtype == torch.bfloat16 else 1.0
    for name, ours, truth, plain in zip(("loss", "gradient", "gradient of tau"), got, best, naive, strict=True):
        if truth is not None:
            scale = 1.0 if dtype == torch.float64 or name == "gradient of tau" or smoothed else 0.0
            assert_error(name, ours, truth, plain, tolerance * torch.finfo(dtype).eps, scale, half_ulps)


def assert_error(
    name: str, ours: Tensor, truth: Tensor, naive: Tensor, tolerance: float, scale: float = 0.0, half_ulps: float = 1.0
) -> None:
    """The error of `ours` is at most that of `naive` plus `tolerance` of the largest value of `truth` (or `scale`).

    Each value may be off by `half_ulps` times half a unit in the last place of its dtype besides.
    """
    assert ours.shape == truth.shape
    if truth.numel() == 0:
        return
    assert not ours.isnan().any(), f"{name} has NaN"
    finfo = torch.finfo(ours.dtype)
    rounding = half_ulps * 0.5 * finfo.eps * truth.abs() + 0.5 * finfo.smallest_normal * finfo.eps
    allowed = (naive - truth).abs().max() + tolerance * truth.abs().max().clamp(min=scale) + rounding
    error = (ours.double() - truth).abs()
    worst = (error - allowed).max().item()
    assert worst <= 0, f"{name}: error {error.max():.3e}, {worst:.3e} more than allowed"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
