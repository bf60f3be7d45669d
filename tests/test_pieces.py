"""The pieces that composed losses are made of: gradients over the logits, and statistics of some of the classes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drsl_kernels import reference, softmax_loss
from drsl_kernels.backends import choose_pieces
from drsl_kernels.backends.pieces import Shard
from drsl_kernels.spec import DISTANCES, LossSpec, loss_spec

ROWS = 13


def _spec(distance: str | None, truth: str = "ce", smoothing: float = 0.0, activation: str = "softmax") -> LossSpec:
    return loss_spec(truth, 0.7, distance, 1.3, 0.2, -100, "none", smoothing, 0.0, activation)


def _batch(classes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with masked classes and a saturated row, labels of which one is ignored, upstream gradients."""
    generator = torch.Generator().manual_seed(classes)
    z = torch.randn(ROWS, classes, generator=generator, dtype=torch.float64) * 3
    z[3, : classes // 2] = -torch.inf
    z[4] *= 100
    y = torch.randint(classes, (ROWS,), generator=generator)
    y[5] = -100
    y[6] = 0
    return z.to(dtype), y, torch.rand(ROWS, generator=generator)


def _expected(z: Tensor, y: Tensor, upstream: Tensor, tau: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and derivative by tau of every row in float64."""
    z, tau = z.double().clone().requires_grad_(), tau.double().clone().requires_grad_()
    loss, _ = reference.softmax_loss(z, y, tau, None, spec)
    gradient, slopes = torch.autograd.grad(loss, [z, tau], upstream.double(), materialize_grads=True)
    return loss.detach(), gradient, slopes / upstream


# Rows in tiles, in blocks, and in chunks of one row.
@pytest.mark.parametrize("classes", [1, 2, 10, 400, 2500, 9000])
@pytest.mark.parametrize("distance", [*DISTANCES, None])
def test_the_gradient_takes_the_place_of_the_logits(classes: int, distance: str | None, backend: str) -> None:
    if classes > 400 and backend in ("triton", "cuda"):
        pytest.skip("interpreted kernels are slow; 400 classes are as many as they need")
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        for activation in ("softmax", "sigsoftmax"):
            spec = _spec(distance, smoothing=0.1, activation=activation)
            z, y, upstream = _batch(classes, dtype)
            tau = torch.linspace(0.1, 2.0, ROWS)
            loss, gradient, slopes = _expected(z, y, upstream, tau, spec)
            found = choose_pieces(z, backend).over_logits(
                z, y, tau, None, None, spec, upstream=upstream, with_tau=True, with_reports=True
            )
            scale = gradient[gradient.isfinite()].abs().max().clamp(min=1.0)
            torch.testing.assert_close(found.rows.double(), loss, rtol=max(tolerance, 1e-5), atol=tolerance)
            torch.testing.assert_close(z.double(), gradient, rtol=tolerance, atol=tolerance * scale.item())
            if distance is not None:
                assert found.tau_slopes is not None
                torch.testing.assert_close(found.tau_slopes.double(), slopes, rtol=1e-4, atol=1e-5)


def test_without_an_upstream_gradient_the_logits_are_left_alone(backend: str) -> None:
    z, y, _ = _batch(40)
    before = z.clone()
    choose_pieces(z, backend).over_logits(
        z, y, 0.3, None, None, _spec("uniform"), upstream=None, with_tau=False, with_reports=False
    )
    assert torch.equal(z, before)


@pytest.mark.backends("cpp", "triton", "cuda")
@pytest.mark.parametrize("sizes", [(5, 5), (1, 2, 7), (300, 41), (8200, 17)])
@pytest.mark.parametrize("distance", [*DISTANCES, None])
def test_classes_in_several_places_are_those_of_one_row(
    sizes: tuple[int, ...], distance: str | None, backend: str
) -> None:
    if sum(sizes) > 400 and backend != "cpp":
        pytest.skip("interpreted kernels are slow; 341 classes are as many as they need")
    for truth, smoothing in (("ce", 0.1), ("gce", 0.0)):
        spec = _spec(distance, truth, smoothing)
        z, y, upstream = _batch(sum(sizes))
        loss, stats = softmax_loss(
            z, y, truth=truth, scale=1.3, margin=0.2, distance=distance, tau=0.4, label_smoothing=smoothing,
            reduction="none", return_stats=True, backend="reference",
        )  # fmt: skip
        _, gradient, _ = _expected(z, y, upstream, torch.full((ROWS,), 0.4, dtype=torch.float64), spec)
        pieces = choose_pieces(z, backend)
        assert pieces.row_stats is not None
        parts = [part.contiguous() for part in z.split(sizes, 1)]
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        local = [_local(y, first, size) for first, size in zip(firsts, sizes, strict=True)]
        everybody = torch.stack([pieces.row_stats(p, labels, spec) for p, labels in zip(parts, local, strict=True)], 1)
        shard = Shard(z.gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1), everybody)
        for part, labels, first in zip(parts, local, firsts, strict=True):
            wanted = gradient[:, first : first + part.shape[1]]
            found = pieces.over_logits(
                part, labels, 0.4, None, None, spec, upstream=upstream, with_tau=False, with_reports=True, shard=shard
            )
            torch.testing.assert_close(found.rows, loss, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(part, wanted, rtol=1e-10, atol=1e-10 * gradient.abs().max().item())
            torch.testing.assert_close(found.reports, torch.stack(stats[:3]), rtol=1e-9, atol=1e-10)


def _local(y: Tensor, first: int, size: int) -> Tensor:
    """Labels counted from `first`; -1 for those elsewhere, as they are for ignored ones."""
    here = (y >= first) & (y < first + size)
    return torch.where(y == -100, y, torch.where(here, y - first, -1))
