"""The device's own time: CUDA graphs, streams, threads, several devices, no waiting, the same bits every time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import DTYPES, random_labels, random_logits, run
from on_device import assert_true_on, never_waiting, pick, recorded
from torch import Tensor
from truth import loss_and_gradient

from drsl_kernels import fused_drsl_loss

pytestmark = pytest.mark.gpu

# (rows, classes): several rows per program, and rows that are too long for one, as one piece and in several
SHAPES = pytest.mark.parametrize("shape", [(33, 10), (300, 9001), (2, 70001)], ids=["few", "many", "split"])


def inputs(shape: tuple[int, int], dtype: str, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, classes = pick(device, shape, (min(shape[0], 3), min(shape[1], 9001)))
    z = random_logits(rows, classes, dtype=DTYPES[dtype]).to(device).requires_grad_()
    return z, random_labels(rows, classes=classes).to(device)


@SHAPES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cuda_graph(dtype: str, shape: tuple[int, int], device: torch.device, gpu_backend: str) -> None:
    """Captured once, replayed with other inputs: whether the upstream gradient is 1 is for the device to find out."""
    z, y = inputs(shape, dtype, device)
    upstream = torch.ones((), device=device)

    def step() -> tuple[Tensor, Tensor]:
        loss = fused_drsl_loss(z, y, 0.5, backend=gpu_backend)
        return loss.detach(), torch.autograd.grad(loss, z, upstream)[0]

    replay = recorded(device, step)
    for seed, factor in enumerate((1.0, 3.0, 1.0)):
        fresh = random_logits(*z.shape, dtype=z.dtype, seed=seed + 10)
        labels = random_labels(len(z), classes=z.shape[1], seed=seed + 20)
        z.data.copy_(fresh)
        y.copy_(labels)
        upstream.fill_(factor)
        loss, grad = (x.clone() for x in replay())
        want = loss_and_gradient(fresh, labels, 0.5, distance="uniform", upstream=torch.tensor(factor))
        torch.testing.assert_close(loss.cpu().double(), want[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.cpu(), want[1].to(z.dtype), rtol=2 * torch.finfo(z.dtype).eps + 1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cuda_graph_of_the_loss_alone(reduction: str, device: torch.device, gpu_backend: str) -> None:
    z, y = inputs((33, 10), "float32", device)

    @torch.no_grad()
    def loss() -> Tensor:
        return fused_drsl_loss(z, y, 0.5, reduction=reduction, backend=gpu_backend)

    replay = recorded(device, loss)
    z.data.neg_()
    want = loss_and_gradient(z.cpu(), y.cpu(), 0.5, distance="uniform", reduction=reduction)[0]
    torch.testing.assert_close(replay().cpu().double(), want, rtol=1e-5, atol=1e-6)


CALLS: dict[str, dict[str, Any]] = {
    "mean": {},
    "none": {"reduction": "none"},
    "weights_and_smoothing": {"label_smoothing": 0.1},
    "statistics": {"return_stats": True},
    "non_target_logits": {"distance": "non_target_logits"},
}


@SHAPES
@pytest.mark.parametrize("call", CALLS)
def test_without_synchronising(call: str, shape: tuple[int, int], device: torch.device, gpu_backend: str) -> None:
    z, y = inputs(shape, "float32", device)
    y[0] = -100
    arguments = dict(CALLS[call])
    if call == "weights_and_smoothing":
        arguments["weight"] = torch.ones(z.shape[1], device=device)
    tau = torch.full((), 0.5, device=device, requires_grad=True)

    def step() -> None:
        for factor in (1.0, 2.0):
            result = fused_drsl_loss(z, y, tau, backend=gpu_backend, **arguments)
            loss = result[0] if isinstance(result, tuple) else result
            torch.autograd.grad(loss, (z, tau), torch.full_like(loss, factor))
        with torch.no_grad():
            fused_drsl_loss(z, y, tau, backend=gpu_backend, **arguments)

    step()  # compiles, and asks the device about itself
    with never_waiting(device):
        step()


@SHAPES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bit_identical_over_100_runs(
    dtype: str, shape: tuple[int, int], device: torch.device, gpu_backend: str
) -> None:
    z, y = inputs(shape, dtype, device)
    tau = torch.full((), 0.5, device=device)
    first = run(z, y, tau, distance="uniform", backend=gpu_backend)
    for _ in range(pick(device, 99, 2)):
        again = run(z, y, tau, distance="uniform", backend=gpu_backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_bit_identical_over_100_runs_of_many_rows(device: torch.device, gpu_backend: str) -> None:
    """So many that programs share the sums."""
    z, y = inputs((200_003, 10), "float32", device)
    first = run(z, y, 0.5, distance="kl", backend=gpu_backend)
    for _ in range(pick(device, 99, 2)):
        again = run(z, y, 0.5, distance="kl", backend=gpu_backend)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_on_a_side_stream(device: torch.device, gpu_backend: str) -> None:
    """The kernels come after what was put on the current stream before, in both directions."""
    z, y = inputs((300, 1000), "float32", device)
    fresh = random_logits(*z.shape, seed=9)
    stream = nullcontext() if device.type == "cpu" else torch.cuda.stream(torch.cuda.Stream())
    source = fresh.to(device)
    pick(device, torch.cuda.synchronize, lambda: None)()
    with stream:
        pick(device, torch.cuda._sleep, lambda cycles: None)(50_000_000)  # some 25 milliseconds
        z.data.copy_(source)
        loss = fused_drsl_loss(z, y, 0.5, backend=gpu_backend)
        grad = torch.autograd.grad(2 * loss, z)[0]
        loss, grad = loss.detach().cpu(), grad.cpu()
    want = loss_and_gradient(fresh, y.cpu(), 0.5, distance="uniform", upstream=torch.tensor(2.0))
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), want[1], rtol=1e-4, atol=1e-8)


def test_from_several_threads(device: torch.device, gpu_backend: str) -> None:
    """Each on a stream of its own."""
    if device.type == "cpu":
        pytest.skip("Triton's interpreter serves one thread")

    def work(seed: int) -> Tensor:
        rows = 100 + 50 * (seed % 3)
        z, y = random_logits(rows, 200, seed=seed).to(device), random_labels(rows, classes=200, seed=seed).to(device)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [run(z, y, 0.5, distance="uniform", backend=gpu_backend)[1].cpu() for _ in range(50)]
        assert all(torch.equal(results[0], other) for other in results)
        return results[0]

    want = [work(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(work, range(8)))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_long_rows_from_several_threads(device: torch.device, gpu_backend: str) -> None:
    """Each with a need for shared memory of its own."""
    if device.type == "cpu":
        pytest.skip("Triton's interpreter serves one thread")

    def work(classes: int) -> Tensor:
        z, y = random_logits(150, classes).to(device), random_labels(150, classes=classes).to(device)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [run(z, y, 0.5, distance="uniform", backend=gpu_backend)[1] for _ in range(100)]
            assert all(torch.equal(results[0], other) for other in results)
            return results[0].cpu()

    lengths = [12288, 12500, 14000, 17000, 20000, 32000]
    want = [work(classes) for classes in lengths]
    with ThreadPoolExecutor(len(lengths)) as pool:
        got = list(pool.map(work, lengths))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("shape", [(33, 10), (3, 9001)], ids=["few", "many"])
def test_on_a_device_that_is_not_the_current_one(
    shape: tuple[int, int], device: torch.device, gpu_backend: str
) -> None:
    if device.type == "cpu" or torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    z, y = random_logits(*shape), random_labels(shape[0], classes=shape[1])
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    assert_true_on(other, z, y, 0.5, distance="uniform", backend=gpu_backend)
    assert_true_on(other, z, y, 0.5, distance="uniform", upstream=torch.tensor(2.0), backend=gpu_backend)
    assert torch.cuda.current_device() == 0
