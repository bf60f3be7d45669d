"""Threads: results do not depend on how many there are, and calls from several at once do not disturb each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import DTYPES, random_labels, random_logits, run
from torch import Tensor

from drsl_kernels import fused_drsl_loss

SHAPES = [(20000, 10), (3000, 100), (600, 1000), (40, 32771), (1, 140000)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_and_two_threads_give_the_same_bits(shape: tuple[int, int], reduction: str, two_threads: None) -> None:
    z, y = random_logits(*shape), random_labels(shape[0], classes=shape[1])
    tau = random_logits(shape[0], seed=3)
    arguments: dict[str, Any] = {"distance": "uniform", "reduction": reduction, "backend": "cpp"}
    two = run(z, y, tau, **arguments)
    again = run(z, y, tau, **arguments)
    torch.set_num_threads(1)
    one = run(z, y, tau, **arguments)
    for a, b, c in zip(one, two, again, strict=True):
        assert a is not None
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_the_sum_of_its_rows(dtype: str) -> None:
    """A row's result does not depend on the rows around it."""
    z, y = random_logits(35, 11, dtype=DTYPES[dtype]), random_labels(35, classes=11)
    loss, grad, _ = run(z, y, 0.5, distance="kl", reduction="none", backend="cpp")
    for i in range(35):
        one, one_grad, _ = run(z[i : i + 1], y[i : i + 1], 0.5, distance="kl", reduction="none", backend="cpp")
        assert torch.equal(one[0], loss[i])
        assert torch.equal(one_grad[0], grad[i])


@pytest.mark.backends("cpp", "reference")  # Triton's interpreter is for one thread
def test_calls_from_several_threads(backend: str) -> None:
    def work(seed: int) -> Tensor:
        rows = 30 + 10 * (seed % 3)
        z, y = random_logits(rows, 200, seed=seed), random_labels(rows, classes=200, seed=seed)
        results = [run(z, y, 0.5, distance="uniform", backend=backend)[1] for _ in range(20)]
        assert all(torch.equal(results[0], other) for other in results)
        return results[0]

    want = [work(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(work, range(8)))
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.backends("cpp", "reference")
def test_backward_of_one_graph_from_several_threads(backend: str) -> None:
    z, y = random_logits(50, 30).requires_grad_(), random_labels(50, classes=30)
    loss = fused_drsl_loss(z, y, 0.5, backend=backend)

    def work(factor: int) -> Tensor:
        return torch.autograd.grad(loss, z, torch.tensor(float(factor)), retain_graph=True)[0]

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(work, [1, 2, 1, 4] * 10))
    once = got[0]
    for factor, grad in zip([1, 2, 1, 4] * 10, got, strict=True):
        torch.testing.assert_close(grad, factor * once)
