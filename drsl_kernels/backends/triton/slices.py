"""Passes over a slice of a row, in tiles of PARTS x LANES words of WORD neighbouring classes: statistics and gradient.

Each lane, which is a thread's, keeps statistics of its own, merged at the end: no step of the loop waits for another.
Relies on row_loss.py and steps.py; many_classes.py relies on it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_loss import largest, merge, merge_all, row_stats_of, summed, take, transformed
from .steps import class_gradient, class_weights_at


@triton.jit
def tile_of(
    pointer, start, class_stride, WIDTH: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr, WORD: tl.constexpr
):  # fmt: skip
    """Columns of a tile, and their addresses."""
    part = tl.arange(0, PARTS)[:, None, None] * (LANES * WORD)
    column = start + part + tl.arange(0, LANES)[None, :, None] * WORD + tl.arange(0, WORD)[None, None, :]
    if WIDTH > 0:
        address = pointer + column
    else:
        address = pointer + column * class_stride
    return column, address


@triton.jit
def slice_end(last, classes, valid, WIDTH: tl.constexpr):
    """The end of a slice as a 32-bit index; 0 for an ignored row."""
    end = tl.where(valid, tl.minimum(last, classes), 0).to(tl.int32)
    if WIDTH > 0:
        end = end // WIDTH * WIDTH  # tells the compiler what it is a multiple of
    return end


@triton.jit
def whole_tiles_end(first, last, TILE: tl.constexpr):
    """Where the whole tiles of [first, last) end; less than a tile is left over."""
    return first + (last - first) // TILE * TILE


@triton.jit
def tile_stats(
    stats, z, row, label, column, class_weights, inside, classes,
    SQUARES: tl.constexpr, MOMENTS: tl.constexpr, WEIGHTED: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Statistics of lanes together with those of a tile, which has -inf at the label."""
    if MOMENTS:
        u = 0.0
        if WEIGHTED:
            u = class_weights_at(class_weights, row, column, inside, column == label, classes, SOFT)
        tile = row_stats_of(z, u, SQUARES, MOMENTS, WEIGHTED, SOFT)
        stats = merge(stats, tile, SQUARES, MOMENTS, WEIGHTED)
    else:
        stats = take(stats, z, SQUARES)
    return stats


@triton.jit
def slice_stats(
    row_logits, row, label, class_weights, classes, first, last, class_stride,
    WIDTH: tl.constexpr, SQUARES: tl.constexpr, MOMENTS: tl.constexpr, WEIGHTED: tl.constexpr, SOFT: tl.constexpr,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Statistics of the classes [first, last) of a row, the label left out."""
    lowest = -float("inf")
    TILE: tl.constexpr = PARTS * LANES * WORD
    # Without moments nobody needs to know in each tile how many classes are masked: only whether some are, in the end.
    COUNTED: tl.constexpr = SQUARES and not MOMENTS
    zero = tl.zeros([LANES], ACC)
    lanes = (zero + lowest, zero, zero, zero, zero, zero, zero, zero)
    bottom = zero
    whole = whole_tiles_end(first, last, TILE)
    for start in range(first, whole, TILE):
        column, address = tile_of(row_logits, start, class_stride, WIDTH, PARTS, LANES, WORD)
        z = transformed(tl.load(address).to(ACC), ACTIVATION)
        if COUNTED:
            bottom = tl.minimum(bottom, -largest(-z))
        if (label >= start) & (label < start + TILE):
            z = tl.where(column == label, lowest, z)
        lanes = tile_stats(
            lanes, z, row, label, column, class_weights, column >= 0, classes, SQUARES, MOMENTS, WEIGHTED, SOFT
        )
    rest = zero
    if whole < last:
        column, address = tile_of(row_logits, whole, class_stride, WIDTH, PARTS, LANES, WORD)
        inside = column < last
        z = transformed(tl.load(address, mask=inside, other=lowest).to(ACC), ACTIVATION)
        z = tl.where(column == label, lowest, z)
        lanes = tile_stats(
            lanes, z, row, label, column, class_weights, inside, classes, SQUARES, MOMENTS, WEIGHTED, SOFT
        )
        if COUNTED:
            rest = summed((z != lowest).to(ACC))
    M, A1, A2, h, V, n, U, weighted_depth = merge_all(lanes, SQUARES, MOMENTS, WEIGHTED)
    if COUNTED:
        if tl.min(bottom, axis=0) == lowest:
            for start in range(first, whole, TILE):
                column, address = tile_of(row_logits, start, class_stride, WIDTH, PARTS, LANES, WORD)
                present = (tl.load(address).to(ACC) != lowest) & (column != label)
                rest += summed(present.to(ACC))
            n = tl.sum(rest, axis=0)
        else:
            here = (label >= first) & (label < whole)
            n = tl.sum(rest, axis=0) + (whole - first - here.to(tl.int32)).to(ACC)
    return M, A1, A2, h, V, n, U, weighted_depth


@triton.jit
def tile_gradient(
    z, row, label, column, class_weights, inside, classes, coefficients,
    SQUARES: tl.constexpr, MOMENTS: tl.constexpr, WEIGHTED: tl.constexpr, SOFT: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    a, b, c, offset, smooth, _, top = coefficients
    u = 0.0
    if WEIGHTED:
        u = class_weights_at(class_weights, row, column, inside, column == label, classes, SOFT)
    return class_gradient(z, u, a, b, c, offset, smooth, top, SQUARES, MOMENTS, WEIGHTED, SOFT, ACTIVATION)


@triton.jit
def write_gradient(
    row_logits, row_grad, row, label, class_weights, classes, first, last, class_stride, grad_class, coefficients,
    WIDTH: tl.constexpr, SQUARES: tl.constexpr, MOMENTS: tl.constexpr, WEIGHTED: tl.constexpr, SOFT: tl.constexpr,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Gradient of the classes [first, last) of a row, last tile first: it was read last and is still in the cache."""
    TILE: tl.constexpr = PARTS * LANES * WORD
    label_gradient = coefficients[5]
    whole = whole_tiles_end(first, last, TILE)
    if whole < last:
        column, address = tile_of(row_logits, whole, class_stride, WIDTH, PARTS, LANES, WORD)
        inside = column < last
        z = tl.load(address, mask=inside, other=-float("inf"), eviction_policy="evict_first").to(ACC)
        z = transformed(z, ACTIVATION)
        g = tile_gradient(
            z, row, label, column, class_weights, inside, classes, coefficients,
            SQUARES, MOMENTS, WEIGHTED, SOFT, ACTIVATION,
        )  # fmt: skip
        g = tl.where(column == label, label_gradient, g)
        _, grad_address = tile_of(row_grad, whole, grad_class, WIDTH, PARTS, LANES, WORD)
        tl.store(grad_address, g.to(row_grad.dtype.element_ty), mask=inside, eviction_policy="evict_first")
    tiles = (whole - first) // TILE
    for i in range(0, tiles):
        start = first + (tiles - 1 - i) * TILE
        column, address = tile_of(row_logits, start, class_stride, WIDTH, PARTS, LANES, WORD)
        z = transformed(tl.load(address, eviction_policy="evict_first").to(ACC), ACTIVATION)
        g = tile_gradient(
            z, row, label, column, class_weights, column >= 0, classes, coefficients,
            SQUARES, MOMENTS, WEIGHTED, SOFT, ACTIVATION,
        )  # fmt: skip
        if (label >= start) & (label < start + TILE):
            g = tl.where(column == label, label_gradient, g)
        _, grad_address = tile_of(row_grad, start, grad_class, WIDTH, PARTS, LANES, WORD)
        tl.store(grad_address, g.to(row_grad.dtype.element_ty), eviction_policy="evict_first")


@triton.jit
def write_zeros(
    row_grad, first, last, grad_class,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    for start in range(first, last, PARTS * LANES * WORD):
        column, address = tile_of(row_grad, start, grad_class, WIDTH, PARTS, LANES, WORD)
        tl.store(address, tl.zeros([PARTS, LANES, WORD], tl.float32).to(row_grad.dtype.element_ty), mask=column < last)
