"""Offsets beyond 2^31 elements: rows far apart in a tensor of which only the touched pages take memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import random_labels, random_logits, run
from torch import Tensor

from drsl_kernels import softmax_loss

FAR = 2**31 + 4096  # elements between two rows


def far_rows(classes: int, class_stride: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two rows FAR elements apart, and the same rows side by side."""
    storage = torch.empty(FAR + classes * class_stride + 64, dtype=dtype)  # the system hands out pages when touched
    z = storage.as_strided((2, classes), (FAR, class_stride))
    near = random_logits(2, classes, dtype=dtype)
    return z.copy_(near), near


@pytest.mark.parametrize("class_stride", [1, 3])
@pytest.mark.parametrize("classes", [10, 1000])
def test_rows_more_than_2_to_the_31_apart(classes: int, class_stride: int, backend: str) -> None:
    z, near = far_rows(classes, class_stride, torch.bfloat16)
    y = random_labels(2, classes=classes)
    for distance in ("uniform", "kl"):
        arguments: dict[str, Any] = {"distance": distance, "reduction": "none", "backend": backend}
        loss = softmax_loss(z, y, tau=0.5, **arguments)
        torch.testing.assert_close(loss, softmax_loss(near, y, tau=0.5, **arguments))
        # The gradient of strided logits is dense.
        torch.testing.assert_close(run(z, y, 0.5, **arguments)[1], run(near, y, 0.5, **arguments)[1])


def test_classes_more_than_2_to_the_31_apart(backend: str) -> None:
    storage = torch.empty(2 * FAR + 64, dtype=torch.bfloat16)
    z = storage.as_strided((5, 3), (2, FAR))
    near = random_logits(5, 3, dtype=torch.bfloat16)
    z.copy_(near)
    y = random_labels(5, classes=3)
    got = run(z, y, 0.5, distance="kl", backend=backend)
    torch.testing.assert_close(got, run(near, y, 0.5, distance="kl", backend=backend))


def test_more_than_2_to_the_31_logits_of_one_row_repeated() -> None:
    """2^31 + elements in all, stride 0 between rows: the arithmetic is done for a few rows only (the others are
    ignored), the counting for all.
    """
    classes = 2**22
    rows = 2**9 + 3
    row = random_logits(classes, dtype=torch.bfloat16)
    y = torch.full((rows,), -100)
    y[0], y[-1] = 5, classes - 1
    assert rows * classes > 2**31
    loss = softmax_loss(row.expand(rows, classes), y, tau=0.5, distance="uniform", backend="cpp")
    few = softmax_loss(row.expand(2, classes), y[[0, -1]], tau=0.5, distance="uniform", backend="cpp")
    torch.testing.assert_close(loss, few)
