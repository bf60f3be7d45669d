"""The pieces of composed losses on the device: gradients over the logits, statistics of some classes, several devices.

Of a gradient that takes the place of the logits a program out of turn would be a race: it shows as other bits.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import DTYPES, random_labels, random_logits, run
from on_device import pick
from torch import Tensor, multiprocessing
from torch.nn import functional as F

from drsl_kernels import fused_linear_drsl_loss, parallel_drsl_loss, reference, softmax_loss
from drsl_kernels.backends import choose_pieces
from drsl_kernels.backends.pieces import Losses, Shard
from drsl_kernels.spec import LossSpec, loss_spec

pytestmark = pytest.mark.gpu

# (rows, classes): several rows per program, rows that are too long for one, and such that several programs share
SHAPES = {"few": (5001, 10), "many": (300, 9001), "split": (2, 131072)}


def spec_of(distance: str, smoothing: float = 0.0) -> LossSpec:
    return loss_spec("ce", 0.7, distance, 1.0, 0.0, -100, "none", smoothing, 0.0)


def batch(shape: str, dtype: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with masked classes, labels of which one is ignored, upstream gradients."""
    rows, classes = pick(device, SHAPES[shape], (min(SHAPES[shape][0], 5), min(SHAPES[shape][1], 9001)))
    z, y = random_logits(rows, classes, dtype=DTYPES[dtype]), random_labels(rows, classes=classes)
    z[1, : classes // 3] = -torch.inf
    y[0], y[1] = -100, classes - 1
    return z.to(device), y.to(device), random_logits(rows, seed=7).to(device)


def over_logits(z: Tensor, y: Tensor, upstream: Tensor, spec: LossSpec, backend: str, shard: Shard | None) -> Losses:
    call = partial(choose_pieces(z, backend).over_logits, z, y, 0.4, None, None, spec)
    return call(upstream=upstream, with_tau=False, with_reports=False, shard=shard)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("distance", ["uniform", "kl"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_over_the_logits(
    dtype: str, distance: str, shape: str, device: torch.device, gpu_backend: str
) -> None:
    """Is that beside them, and bit-identical over 20 runs."""
    z, y, upstream = batch(shape, dtype, device)
    options = {"distance": distance, "reduction": "none", "backend": gpu_backend}
    want, want_gradient, _ = run(z, y, 0.4, upstream=upstream, **options)
    first = z.clone()
    losses = over_logits(first, y, upstream, spec_of(distance), gpu_backend, None)
    torch.testing.assert_close(losses.rows, want, rtol=1e-5, atol=1e-6)
    rtol, atol = 4 * torch.finfo(z.dtype).eps, 4 * torch.finfo(want.dtype).eps  # where terms cancel
    torch.testing.assert_close(first, want_gradient, rtol=rtol, atol=atol)
    for _ in range(pick(device, 20, 1)):
        again = z.clone()
        rows = over_logits(again, y, upstream, spec_of(distance), gpu_backend, None).rows
        assert torch.equal(again, first)
        assert torch.equal(rows, losses.rows)


@pytest.mark.parametrize("sizes", [(5, 5), (1, 2, 7), (8200, 17), (65536, 40000, 70000)], ids=str)
@pytest.mark.parametrize("distance", ["uniform", "kl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_classes_in_several_places(
    dtype: str, distance: str, sizes: tuple[int, ...], device: torch.device, gpu_backend: str
) -> None:
    """Give the loss and the gradient of whole rows, in float64."""
    sizes = tuple(min(size, pick(device, size, 400)) for size in sizes)
    rows, classes, spec = 6, sum(sizes), spec_of(distance, smoothing=0.1)
    z, y = random_logits(rows, classes, dtype=DTYPES[dtype]), random_labels(rows, classes=classes)
    y[2] = -100
    exact = z.double().requires_grad_()
    want, _ = reference.softmax_loss(exact, y, 0.4, None, spec)
    upstream = random_logits(rows, seed=7)
    (want_gradient,) = torch.autograd.grad(want, exact, upstream.double())

    z, y, upstream = z.to(device), y.to(device), upstream.to(device)
    parts = [part.contiguous() for part in z.split(sizes, 1)]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    local = [labels_from(y, first, size) for first, size in zip(firsts, sizes, strict=True)]
    pieces = choose_pieces(z, gpu_backend)
    assert pieces.row_stats is not None
    stats = torch.stack([pieces.row_stats(part, own, spec) for part, own in zip(parts, local, strict=True)], 1)
    label_logits = z.gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1).float()
    eps = torch.finfo(z.dtype).eps
    for part, own, first in zip(parts, local, firsts, strict=True):
        found = over_logits(part, own, upstream, spec, gpu_backend, Shard(label_logits, stats))
        torch.testing.assert_close(found.rows.cpu().double(), want.detach(), rtol=1e-5, atol=1e-5)
        expected = want_gradient[:, first : first + part.shape[1]]
        torch.testing.assert_close(part.cpu().double(), expected, rtol=max(2 * eps, 1e-4), atol=1e-7)


def labels_from(y: Tensor, first: int, size: int) -> Tensor:
    """Counted from `first`; -1 for those elsewhere."""
    here = (y >= first) & (y < first + size)
    return torch.where(y == -100, y, torch.where(here, y - first, -1))


def spread_over_processes(rank: int, processes: int, folder: str, device_type: str, backend: str) -> None:
    """What each process computes of its classes is what one device computes of all of them."""
    nccl = device_type == "cuda"
    device = torch.device(device_type, rank) if nccl else torch.device("cpu")
    if nccl:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if nccl else "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )
    try:
        rows, classes = 9, pick(device, 50_001, 301)
        first, last = classes * rank // processes, classes * (rank + 1) // processes
        hidden, weight = random_logits(rows, 16, spread=0.5).to(device), random_logits(classes, 16, seed=3).to(device)
        y = random_labels(rows, classes=classes).to(device)
        y[2] = -100
        whole = [x.clone().requires_grad_() for x in (hidden, weight)]
        logits = F.linear(*whole)
        want = softmax_loss(logits, y, distance="uniform", tau=0.4, backend=backend)
        want_logits, *want_gradients = torch.autograd.grad(want, (logits, *whole))

        own = logits.detach()[:, first:last].contiguous().requires_grad_()
        loss = parallel_drsl_loss(own, y, 0.4, first_class=first, backend=backend)
        close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)
        close(loss, want)
        close(torch.autograd.grad(loss, own)[0], want_logits[:, first:last])

        leaves = [hidden.clone().requires_grad_(), weight[first:last].clone().requires_grad_()]
        loss = fused_linear_drsl_loss(
            *leaves, y, 0.4, group=dist.group.WORLD, first_class=first, memory_budget=5 * 4 * classes, backend=backend
        )
        close(loss, want)
        gradients = torch.autograd.grad(loss, leaves)
        close(gradients[0], want_gradients[0])
        close(gradients[1], want_gradients[1][first:last])
    finally:
        dist.destroy_process_group()


def test_classes_on_one_device(tmp_path: Path, device: torch.device, gpu_backend: str) -> None:
    """One process is a group, too: whatever is sent passes through NCCL."""
    spread_over_processes(0, 1, str(tmp_path), device.type, gpu_backend)


def test_classes_on_two_devices(tmp_path: Path, device: torch.device, gpu_backend: str) -> None:
    if device.type == "cpu" or torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    multiprocessing.spawn(spread_over_processes, (2, str(tmp_path), device.type, gpu_backend), nprocs=2)
