"""Where rows and classes of a tensor lie, in the few numbers that the Triton kernels take.

launch.py relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from ...checks import class_dim

__all__ = ["Rows", "is_laid_out", "rows_of", "unified", "width"]


@dataclass
class Rows:
    """Where rows and classes of a matrix lie, in elements: see `row_start` in steps.py."""

    inner: int
    outer_stride: int
    inner_stride: int
    class_stride: int

    @property
    def flat(self) -> bool:
        return self.inner == 1


def rows_of(tensor: Tensor) -> Rows | None:
    """The layout of a tensor of shape (C,), (N, C) or (N, C, d1, ...); None where it needs more than two strides."""
    at = class_dim(tensor)
    sizes: list[int] = []
    strides: list[int] = []
    for d, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if d == at or size == 1:
            continue
        if sizes and strides[-1] == stride * size:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 2:
        return None
    class_stride = tensor.stride(at) if tensor.shape[at] > 1 else 1
    if len(sizes) < 2:
        return Rows(1, strides[0] if strides else 0, 0, class_stride)
    return Rows(sizes[1], strides[0], strides[1], class_stride)


def unified(x: Rows, y: Rows) -> tuple[Rows, Rows] | None:
    """The two layouts with the same `inner`; None where they step unevenly in different places."""
    if x.inner != y.inner and not x.flat and not y.flat:
        return None
    if x.inner == y.inner:
        return x, y
    if x.flat:
        x = Rows(y.inner, x.outer_stride * y.inner, x.outer_stride, x.class_stride)
    else:
        y = Rows(x.inner, y.outer_stride * x.inner, y.outer_stride, y.class_stride)
    return x, y


def is_laid_out(logits: Tensor) -> bool:
    """Whether the kernels can address these logits, and a gradient like them."""
    layout = rows_of(logits)
    if layout is None or logits.dim() <= 2:
        return layout is not None
    grad_layout = rows_of(torch.empty_like(logits, device="meta"))
    return grad_layout is not None and unified(layout, grad_layout) is not None


def width(tensors: tuple[Tensor, ...], layouts: tuple[Rows, ...], classes: int) -> int:
    """How many adjacent classes may be read and written as one word of at most 16 bytes; 0 where none are adjacent."""
    if any(layout.class_stride != 1 for layout in layouts):
        return 0
    itemsize = tensors[0].element_size()
    common = gcd(16 // itemsize, classes)
    for tensor, layout in zip(tensors, layouts, strict=True):
        common = gcd(common, layout.outer_stride, layout.inner_stride if not layout.flat else 0)
        common = gcd(common, tensor.data_ptr() // itemsize)
    return common
