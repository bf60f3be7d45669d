"""What is the CUDA backend's own, its kernels run on the CPU: rows of the block kernel, split rows, kept statistics,
labels that are no classes, and gradients that are handed over.

The tests that run on all backends are elsewhere; tests/cpp/test_cuda_kernels.cpp tests the kernels without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, assert_true, random_labels, random_logits, run
from truth import loss_and_gradient

from drsl_kernels import fused_drsl_loss

pytestmark = pytest.mark.usefixtures("cuda_on_host")
WEIGHTED: dict[str, Any] = {"distance": "non_target_logits", "label_smoothing": 0.1}


# Around the shapes of the group kernel, and beyond them; 200 long rows are more than are split.
@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("classes", [16, 17, 128, 129, 256, 257, 1024, 1025, 4099, 16385])
def test_edges_of_the_tables(classes: int, rows: int) -> None:
    z, y = random_logits(rows, classes), random_labels(rows, classes=classes)
    y[-1] = classes - 1
    assert_true(z, y, 0.3, distance="uniform", backend="cuda")
    assert_true(z, y, 0.3, weight=torch.linspace(0.1, 2.0, classes), backend="cuda", **WEIGHTED)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 150])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_long_rows_in_every_dtype(reduction: str, rows: int, dtype: str) -> None:
    z, y = random_logits(rows, 9001, dtype=DTYPES[dtype]), random_labels(rows, classes=9001)
    for distance in ("uniform", "kl"):
        assert_true(z, y, 0.3, distance=distance, reduction=reduction, backend="cuda")


@pytest.mark.parametrize("rows", [1, 150])
def test_beyond_2_to_the_18_classes(rows: int) -> None:
    classes = 2**18 + 3
    z = random_logits(1, classes).expand(rows, classes)
    y = torch.full((rows,), -100)
    y[0], y[-1] = 5, classes - 1
    loss, grad, _ = run(z, y, 0.3, distance="uniform", backend="cuda")
    counted = sorted({0, rows - 1})
    want = loss_and_gradient(z[counted], y[counted], 0.3, distance="uniform")
    torch.testing.assert_close(loss.double(), want[0], atol=0, rtol=1e-6)
    torch.testing.assert_close(grad[counted].double(), want[1], atol=1e-9, rtol=1e-5)
    assert not grad[1:-1].any()


@pytest.mark.parametrize("classes", [10, 1000, 9001])
@pytest.mark.parametrize("label", [-1, "classes", 2**40, -(2**63)])
def test_label_out_of_range_is_never_an_index(label: int | str, classes: int) -> None:
    """Loss and gradient of that row are NaN, the others are right, and class weights are not read there either."""
    z, y = random_logits(3, classes), random_labels(3, classes=classes)
    y[1] = classes if label == "classes" else label
    weight = torch.linspace(0.1, 2.0, classes)
    for w in (None, weight):
        loss, grad, _ = run(z, y, 0.3, distance="uniform", weight=w, reduction="none", backend="cuda")
        assert loss.isnan().tolist() == [False, True, False]
        assert grad.isnan().all(1).tolist() == [False, True, False]
        kept = [0, 2]
        want = loss_and_gradient(z[kept], y[kept], 0.3, distance="uniform", weight=w, reduction="none")
        torch.testing.assert_close(loss[kept].double(), want[0], atol=0, rtol=1e-6)
        torch.testing.assert_close(grad[kept].double(), want[1], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("classes", [10, 9001])
def test_the_gradient_is_handed_over(classes: int) -> None:
    """With an upstream gradient of 1 the buffer of the forward pass is what arrives; kept graphs get copies."""
    z, y = random_logits(4, classes).requires_grad_(), random_labels(4, classes=classes)
    loss = fused_drsl_loss(z, y, 0.3, backend="cuda")
    first = torch.autograd.grad(loss, z, retain_graph=True)[0]
    second = torch.autograd.grad(loss, z, retain_graph=True)[0]
    half = torch.autograd.grad(loss, z, torch.tensor(0.5), retain_graph=True)[0]
    last = torch.autograd.grad(loss, z)[0]
    assert torch.equal(first, second)
    assert torch.equal(first, last)
    assert first.data_ptr() not in (second.data_ptr(), last.data_ptr())
    torch.testing.assert_close(half, 0.5 * first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, z)


def test_more_dimensions_than_the_kernels_know(cuda_on_host: Callable[..., Any]) -> None:
    z = random_logits(2, 3, 4, 5, 6, 2, 2).permute(3, 1, 4, 2, 0, 6, 5)
    y = random_labels(5, 6, 4, 2, 2, 2, classes=3)
    got = run(z, y, 0.3, distance="uniform", backend="cuda")
    torch.testing.assert_close(got, run(z.contiguous(), y, 0.3, distance="uniform", backend="cuda"))


def test_batch_without_a_row_that_counts() -> None:
    z, y = random_logits(3, 10), torch.full((3,), -100)
    loss, grad, tau_grad = run(z, y, torch.tensor(0.3), distance="uniform", backend="cuda")
    assert math.isnan(loss)
    assert (grad == 0).all()
    assert tau_grad == 0


@pytest.mark.parametrize("seed", range(12))
def test_views_of_many_dimensions(seed: int) -> None:
    """Expanded and permuted: the gradient of such a view is laid out in another way than the view."""
    generator = torch.Generator().manual_seed(seed)
    dims = 5 + seed % 5
    sizes = [1 if torch.rand((), generator=generator) < 0.4 else 2 for _ in range(dims)]
    z = random_logits(*sizes, seed=seed).permute(*torch.randperm(dims, generator=generator).tolist())
    z = z.expand(*[2] * dims).permute(*torch.randperm(dims, generator=generator).tolist())
    y = random_labels(2, *z.shape[2:], classes=z.shape[1])
    got = run(z, y, 0.3, distance="uniform", backend="cuda")
    torch.testing.assert_close(got, run(z.contiguous(), y, 0.3, distance="uniform", backend="cuda"))


def test_rows_without_classes() -> None:
    z = torch.empty(3, 0)
    for reduction in ("none", "sum", "mean"):
        loss, stats = fused_drsl_loss(
            z, torch.full((3,), -100), 0.3, reduction=reduction, return_stats=True, backend="cuda"
        )
        assert (loss.isnan() if reduction == "mean" else loss == 0).all()
        assert all((value == 0).all() for value in stats)
        assert (
            fused_drsl_loss(z, torch.zeros(3, dtype=torch.long), 0.3, reduction=reduction, backend="cuda").isnan().all()
        )
