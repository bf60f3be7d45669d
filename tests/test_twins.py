"""The three implementations of the mathematics agree row by row: C++ for the CPU, Triton and CUDA run on it.

Loss, gradient and reported statistics of thousands of random rows, of every member of the family.

Relies on cases.py and truth.py for inputs; that each of them is right is for the other files to say.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import PAIR_IDS, PAIRS
from torch import Tensor

from drsl_kernels import softmax_loss

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("cuda_on_host")


def random_rows(rows: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of every kind: flat to saturated, offset, tied, partly masked; some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(rows, 4, generator=generator)
    spread = 10.0 ** (3.0 * uniform[:, :1] - 1.5)
    z = spread * torch.randn(rows, classes, generator=generator) + 20.0 * (uniform[:, 1:2] - 0.5)
    z = torch.where(uniform[:, 2:3] < 0.1, z.round(), z)
    masked = (torch.rand(rows, classes, generator=generator) < 0.3) & (uniform[:, 3:] < 0.3)
    y = torch.randint(0, classes, (rows,), generator=generator)
    masked[torch.arange(rows), y] = False
    y[torch.rand(rows, generator=generator) < 0.05] = -100
    return z.masked_fill(masked, -torch.inf), y


def results(z: Tensor, y: Tensor, backend: str, **arguments: Any) -> dict[str, Tensor]:
    """One row of numbers per row of logits, by name."""
    z = z.clone().requires_grad_()
    loss, stats = softmax_loss(z, y, tau=0.3, reduction="none", return_stats=True, backend=backend, **arguments)
    upstream = torch.linspace(0.5, 2.0, len(y))
    (grad,) = torch.autograd.grad(loss, z, upstream)
    columns = {"loss": loss.detach(), "gradient": grad, **stats._asdict()}
    return {name: value.reshape(len(y), -1) for name, value in columns.items()}


def assert_twins(z: Tensor, y: Tensor, **arguments: Any) -> None:
    cpp = results(z, y, "cpp", **arguments)
    for backend in ("triton", "cuda"):
        for name, value in results(z, y, backend, **arguments).items():
            if name == "correct":
                assert torch.equal(value, cpp[name]), f"{backend}: {name}"
                continue
            scale = cpp[name].abs().amax(1, keepdim=True).clamp(min=1.0)
            error = ((value - cpp[name]).abs() / scale).amax()  # infinite nowhere: labels are not masked
            assert error <= 64 * torch.finfo(torch.float32).eps, f"{backend}: {name} differs by {error:.2e}"


@pytest.mark.parametrize(("truth", "distance"), PAIRS, ids=PAIR_IDS)
def test_every_member(truth: str, distance: str | None) -> None:
    seed = PAIRS.index((truth, distance))
    z, y = random_rows(160, 10 + seed, seed)
    assert_twins(z, y, truth=truth, distance=distance, scale=1.25, margin=0.5)
    long_z, long_y = random_rows(3, 9001, seed)
    assert_twins(long_z, long_y, truth=truth, distance=distance)


@pytest.mark.parametrize(("truth", "distance"), PAIRS[:: len(PAIRS) // 8], ids=PAIR_IDS[:: len(PAIR_IDS) // 8])
@pytest.mark.parametrize(("rows", "classes"), [(160, 11), (3, 9001)])
def test_sigsoftmax_and_own_margins(rows: int, classes: int, truth: str, distance: str | None) -> None:
    z, y = random_rows(rows, classes, rows)
    margin = torch.rand(classes, generator=torch.Generator().manual_seed(2))
    threshold = 0.3 if truth == "gce" else 0.0
    assert_twins(
        z, y, truth=truth, distance=distance, activation="sigsoftmax", margin=margin, threshold=threshold, scale=1.25
    )


@pytest.mark.parametrize("distance", ["uniform", "kl"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "classes"), [(160, 10), (24, 300), (2, 20000)])
def test_smoothing(rows: int, classes: int, weighted: bool, distance: str) -> None:
    z, y = random_rows(rows, classes, rows)
    weight = torch.rand(classes, generator=torch.Generator().manual_seed(1)) if weighted else None
    assert_twins(z, y, distance=distance, weight=weight, label_smoothing=0.2)


@pytest.mark.parametrize("distance", [None, "uniform", "kl"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "classes"), [(96, 10), (12, 300), (2, 9001)])
def test_class_probabilities(rows: int, classes: int, weighted: bool, distance: str | None) -> None:
    """Of every kind: one class, a few, all of them; none for masked classes."""
    z, y = random_rows(rows, classes, rows)
    generator = torch.Generator().manual_seed(rows)
    share = torch.rand(rows, classes, generator=generator) ** 8 * torch.isfinite(z)
    one = torch.nn.functional.one_hot(torch.where(y < 0, z.argmax(1), y), classes)
    q = torch.where(torch.arange(rows)[:, None] % 3 == 0, one.float(), share + one)
    weight = torch.rand(classes, generator=generator) if weighted else None
    assert_twins(z, q / q.sum(1, keepdim=True), distance=distance, weight=weight, label_smoothing=0.1)
