"""Shapes and strides: every way the logits can lie in memory gives the loss and gradient of a contiguous copy, and
the memory that the caller's logits live in is never written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, assert_true, random_labels, random_logits, run
from torch import Tensor

from drsl_kernels import fused_drsl_loss

MEMBERS: dict[str, dict[str, Any]] = {
    "ce": {"distance": None},
    "uniform": {"distance": "uniform"},
    "kl_smoothing": {"distance": "kl", "label_smoothing": 0.1},
}


def padded(z: Tensor, value: float = 777.0) -> Tensor:
    """The same values, as a slice from the middle of a larger tensor: offset and gaps in every dimension."""
    around = torch.full([2 * size + 3 for size in z.shape], value, dtype=z.dtype)
    inside = around[tuple(slice(1, 1 + 2 * size, 2) for size in z.shape)]
    return inside.copy_(z)


def unaligned(z: Tensor) -> Tensor:
    """Contiguous, one element behind an aligned address."""
    return torch.empty(z.numel() + 1, dtype=z.dtype)[1:].view(z.shape).copy_(z)


def permuted(*order: int) -> Callable[[Tensor], Tensor]:
    """The dimension at order[0] lies outermost in memory, that at order[-1] innermost."""

    def lay(z: Tensor) -> Tensor:
        back = [order.index(d) for d in range(len(order))]
        return z.permute(order).contiguous().permute(back)

    return lay


def rows_from_end(z: Tensor) -> Tensor:
    """Rows apart by more than a row: a slice of wider rows."""
    wide = torch.full((*z.shape[:-1], z.shape[-1] + 5), 777.0, dtype=z.dtype)
    return wide[..., 5:].copy_(z)


def repeated_rows(z: Tensor) -> Tensor:
    """All rows are one: stride 0."""
    return z[:1].expand_as(z)


def repeated_classes(z: Tensor) -> Tensor:
    """All classes are one: stride 0 along the classes."""
    return z[:, :1].expand_as(z)


LAYOUTS_2D = {
    "contiguous": lambda z: z,
    "transposed": permuted(1, 0),
    "padded": padded,
    "unaligned": unaligned,
    "wide_rows": rows_from_end,
    "repeated_rows": repeated_rows,
    "repeated_classes": repeated_classes,
}
LAYOUTS_4D = {
    "contiguous": lambda z: z,
    "channels_last": lambda z: z.contiguous(memory_format=torch.channels_last),
    "padded": padded,
    "unaligned": unaligned,
    "wide_rows": rows_from_end,
    "spatial_outside": permuted(2, 3, 0, 1),
    "spatial_swapped": permuted(0, 1, 3, 2),
    "spatial_apart": permuted(2, 0, 3, 1),
    "batch_inside": permuted(1, 2, 3, 0),
    "batch_between": permuted(2, 1, 0, 3),
    "repeated_rows": repeated_rows,
    "repeated_classes": repeated_classes,
    "repeated_pixels": lambda z: z[..., :1].expand_as(z),
}


def storage_bytes(t: Tensor) -> Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(t.untyped_storage())


def check_layout(z: Tensor, y: Tensor, tau: Tensor | float, backend: str, **member: Any) -> None:
    before = storage_bytes(z).clone()
    for reduction in ("mean", "none"):
        arguments = {"reduction": reduction, "backend": backend, **member}
        upstream = None if reduction == "mean" else random_logits(*y.shape, seed=9)
        got = run(z, y, tau, upstream=upstream, **arguments)
        want = run(z.contiguous(), y.contiguous(), tau, upstream=upstream, **arguments)
        assert got[1].shape == z.shape
        torch.testing.assert_close(got, want)
        assert_true(z, y, tau, upstream=upstream, **arguments)
    assert torch.equal(storage_bytes(z), before)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS_2D)
@pytest.mark.parametrize("classes", [10, 131])
def test_matrix_layouts(classes: int, layout: str, dtype: str, member: str, backend: str) -> None:
    z = LAYOUTS_2D[layout](random_logits(19, classes, dtype=DTYPES[dtype]))
    check_layout(z, random_labels(19, classes=classes), 0.5, backend, **MEMBERS[member])


@pytest.mark.every_capability
@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS_4D)
@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (3, 130, 1, 4), (1, 6, 33, 1)], ids=["image", "many", "one"])
def test_image_layouts(shape: tuple[int, ...], layout: str, dtype: str, member: str, backend: str) -> None:
    z = LAYOUTS_4D[layout](random_logits(*shape, dtype=DTYPES[dtype]))
    y = random_labels(shape[0], *shape[2:], classes=shape[1])
    tau = random_logits(*y.shape, spread=0.5, seed=3)
    check_layout(z, y, tau, backend, **MEMBERS[member])


@pytest.mark.parametrize("y_layout", ["transposed", "strided", "expanded", "uint8"])
def test_target_layouts(y_layout: str, backend: str) -> None:
    z = random_logits(4, 6, 5)
    y = random_labels(4, 5, classes=6)
    y = {
        "transposed": lambda: y.t().contiguous().t(),
        "strided": lambda: y.repeat_interleave(2, 1)[:, ::2],
        "expanded": lambda: y[:, :1].expand(4, 5),
        "uint8": lambda: y.to(torch.uint8),
    }[y_layout]()
    check_layout(z, y, 0.5, backend)


def test_tau_rows_that_are_not_contiguous(backend: str) -> None:
    z, y = random_logits(4, 6, 5), random_labels(4, 5, classes=6)
    tau = random_logits(5, 4, seed=3).t()
    assert not tau.is_contiguous()
    assert_true(z, y, tau, distance="uniform", backend=backend)


def test_class_weights_that_are_not_contiguous(backend: str) -> None:
    z, y = random_logits(7, 6), random_labels(7, classes=6)
    weight = torch.arange(1.0, 13.0)[::2]
    assert_true(z, y, 0.5, distance="uniform", weight=weight, label_smoothing=0.1, backend=backend)


@pytest.mark.every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 10, 300])
def test_one_unbatched_row(classes: int, dtype: str, backend: str) -> None:
    z, y = random_logits(classes, dtype=DTYPES[dtype]), torch.tensor(classes - 1)
    if classes > 1:
        for reduction in ("none", "mean", "sum"):
            assert_true(z, y, torch.tensor(0.5), distance="uniform", reduction=reduction, backend=backend)
            assert_true(z[:].expand(2, -1)[1], y, 0.5, distance="kl", reduction=reduction, backend=backend)
    strided = z.repeat_interleave(3)[::3]
    torch.testing.assert_close(run(strided, y, backend=backend), run(z, y, backend=backend))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_unbatched_row_with_a_target_of_one_element(reduction: str, backend: str) -> None:
    z = random_logits(5)
    loss = fused_drsl_loss(z, torch.tensor([2]), 0.5, reduction=reduction, backend=backend)
    same = fused_drsl_loss(z, torch.tensor(2), 0.5, reduction=reduction, backend=backend)
    assert loss.shape == torch.nn.functional.cross_entropy(z, torch.tensor([2]), reduction=reduction).shape == ()
    assert torch.equal(loss, same)


@pytest.mark.parametrize("shape", [(3, 4, 2), (2, 3, 2, 2), (2, 3, 1, 2, 2), (2, 3, 2, 1, 2, 2)])
def test_more_dimensions(shape: tuple[int, ...], backend: str) -> None:
    z, y = random_logits(*shape), random_labels(shape[0], *shape[2:], classes=shape[1])
    check_layout(z, y, 0.5, backend, distance="uniform")
    check_layout(padded(z), y, 0.5, backend, distance="uniform")


def test_the_gradient_is_a_buffer_of_its_own(backend: str) -> None:
    z = random_logits(6, 5).requires_grad_()
    y = random_labels(6, classes=5)
    grad = torch.autograd.grad(fused_drsl_loss(z, y, 0.5, backend=backend), z)[0]
    assert grad.untyped_storage().data_ptr() != z.untyped_storage().data_ptr()
    grad.fill_(3.0)
    assert torch.equal(z, random_logits(6, 5))
