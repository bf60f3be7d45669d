"""Many classes: a row, or a slice of one, in tiles of PARTS x LANES words of WORD neighbouring classes.

    row_kernel          statistics of a row, then its gradient while the row is in the L2 cache; then the next row
    stats_kernel        statistics of a slice, kept in memory: where rows are too few to fill the device
    gradient_kernel     losses and gradient from statistics in memory: after the former, or in a later call

Relies on slices.py and steps.py; shapes.py decides shapes, launch.py launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_loss import merge_all, needs_moments, needs_squares, transformed
from .slices import slice_end, slice_stats, write_gradient, write_zeros
from .steps import class_index, finished_rows, jit, mean_denominator, row_start, scaled_gradient

SAVED: tl.constexpr = tl.constexpr(8)  # statistics per slice in memory, in the order of row_loss.py


@triton.jit
def label_of(labels, row, classes, ignore_index):
    """A row's label, whether the row counts, and the label as a column: -1 where it does not, or is no class."""
    y = tl.load(labels + row)
    valid = y != ignore_index
    return y, valid, tl.where(valid, class_index(y, classes), -1)


@triton.jit
def save_stats(saved, at, stats):
    for i in tl.static_range(SAVED):
        tl.store(saved + at * SAVED + i, stats[i])


@triton.jit
def saved_stats(saved, row, slices, SLICES_BLOCK: tl.constexpr):
    """Statistics of every slice of a row, as vectors; those of slices that do not exist are empty."""
    part = tl.arange(0, SLICES_BLOCK)
    at = saved + (row * slices + part) * SAVED
    exists = part < slices
    M = tl.load(at, mask=exists, other=-float("inf"))
    A1 = tl.load(at + 1, mask=exists, other=0.0)
    A2 = tl.load(at + 2, mask=exists, other=0.0)
    h = tl.load(at + 3, mask=exists, other=0.0)
    V = tl.load(at + 4, mask=exists, other=0.0)
    n = tl.load(at + 5, mask=exists, other=0.0)
    U = tl.load(at + 6, mask=exists, other=0.0)
    weighted_depth = tl.load(at + 7, mask=exists, other=0.0)
    return M, A1, A2, h, V, n, U, weighted_depth


@triton.jit
def label_logit_of(
    row_logits, label_logits, row, label, valid, class_stride, ACTIVATION: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """z_y, transformed; NaN for a label that is no class, 0 for an ignored row."""
    if label_logits is None:
        logit = tl.load(row_logits + label * class_stride, mask=label >= 0, other=float("nan")).to(ACC)
    else:
        logit = tl.load(label_logits + row)
    return transformed(tl.where(valid, logit, 0.0), ACTIVATION)


@jit
def row_kernel(
    logits,
    labels,  # int64 (rows,)
    label_logits,  # ACC (rows,), or None: among the logits
    class_weights,  # ACC (classes,) or None; with SOFT (rows, classes)
    class_margins,  # ACC (classes,) or None: margin
    tau,  # ACC, tau of row i at i * tau_step, or None: tau_value
    upstream,  # ACC, upstream gradient of row i at i * upstream_step, or None: 1
    parts,  # float64 (num_parts,), with MEAN == FROM_PARTS
    denominator,  # out: float64 (1,), or None
    saved,  # out: ACC (rows, SAVED), or None
    grad,  # out, or None
    losses,  # out: float64 (rows,), or None
    row_losses,  # out: ACC (rows,), or None
    reports,  # out: ACC (3, rows): cross-entropy, distance, margin, or None
    tau_grad,  # out: ACC (rows,), or None
    rows: tl.int64,
    classes: tl.int64,
    ignore_index: tl.int64,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    class_stride: tl.int64,
    grad_outer: tl.int64,
    grad_inner: tl.int64,
    grad_class: tl.int64,
    tau_step: tl.int64,
    upstream_step: tl.int64,
    num_parts: tl.int64,
    tau_value: tl.float64,
    q: tl.float64,
    most: tl.float64,  # -log of the threshold of gce
    scale: tl.float64,
    margin: tl.float64,
    smoothing: tl.float64,
    TRUTH: tl.constexpr,
    DISTANCE: tl.constexpr,
    SMOOTH: tl.constexpr,  # smoothing > 0, or SOFT
    SOFT: tl.constexpr,  # the target is class probabilities
    ACTIVATION: tl.constexpr,
    MEAN: tl.constexpr,
    SKIP: tl.constexpr,  # return at once where the upstream gradient is 1
    FLAT: tl.constexpr,  # rows are outer_stride apart
    WIDTH: tl.constexpr,  # adjacent classes that may be read as one word; 0 where classes are not adjacent
    ACC: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    WORD: tl.constexpr,
):
    if SKIP:
        if tl.load(upstream) == 1.0:
            return
    SQUARES: tl.constexpr = needs_squares(DISTANCE)
    WEIGHTED: tl.constexpr = SMOOTH and class_weights is not None
    MOMENTS: tl.constexpr = needs_moments(DISTANCE) or SMOOTH

    if WIDTH > 0:
        outer_stride = outer_stride // WIDTH * WIDTH
        grad_outer = grad_outer // WIDTH * WIDTH
    divisor = mean_denominator(labels, class_weights, parts, num_parts, rows, classes, ignore_index, MEAN, SOFT)
    program = tl.program_id(0).to(tl.int64)
    if denominator is not None:
        tl.store(denominator, divisor, mask=program == 0)
    for row in range(program, rows, tl.num_programs(0)):
        y, valid, label = label_of(labels, row, classes, ignore_index)
        row_logits = logits + row_start(row, inner, outer_stride, inner_stride, FLAT)
        end = slice_end(classes, classes, valid, WIDTH)  # an ignored row is not read
        stats = slice_stats(
            row_logits, row, label, class_weights, classes, 0, end, class_stride,
            WIDTH, SQUARES, MOMENTS, WEIGHTED, SOFT, ACTIVATION, ACC, PARTS, LANES, WORD,
        )  # fmt: skip
        if saved is not None:
            save_stats(saved, row, stats)
        label_logit = label_logit_of(row_logits, label_logits, row, label, valid, class_stride, ACTIVATION, ACC)
        loss, gradient = finished_rows(
            stats, label_logit, row, valid, y, tau, tau_value, tau_step, class_weights, class_margins, classes,
            ignore_index, q, most, scale, margin, smoothing, row_losses, reports, tau_grad, rows, row >= 0,
            TRUTH, DISTANCE, SMOOTH, WEIGHTED, SOFT, ACTIVATION, ACC,
        )  # fmt: skip
        if losses is not None:
            tl.store(losses + row, loss.to(tl.float64))
        if grad is not None:
            row_grad = grad + row_start(row, inner, grad_outer, grad_inner, FLAT)
            coefficients = scaled_gradient(gradient, stats, row, upstream, upstream_step, divisor, row >= 0, ACC)
            write_gradient(
                row_logits, row_grad, row, label, class_weights, classes, 0, end, class_stride, grad_class,
                coefficients, WIDTH, SQUARES, MOMENTS, WEIGHTED, SOFT, ACTIVATION, ACC, PARTS, LANES, WORD,
            )  # fmt: skip
            last = slice_end(classes, classes, row >= 0, WIDTH)
            write_zeros(row_grad, end, last, grad_class, WIDTH, PARTS, LANES, WORD)


@jit
def stats_kernel(
    logits,
    labels,  # int64 (rows,)
    class_weights,  # ACC (classes,) or None; with SOFT (rows, classes)
    upstream,  # with SKIP: ACC, the upstream gradient
    saved,  # out: ACC (rows, slices, SAVED)
    rows: tl.int64,
    classes: tl.int64,
    ignore_index: tl.int64,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    class_stride: tl.int64,
    slices: tl.int64,
    slice_size: tl.int64,
    DISTANCE: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SKIP: tl.constexpr,  # return at once where the upstream gradient is 1
    FLAT: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    WORD: tl.constexpr,
):
    if SKIP:
        if tl.load(upstream) == 1.0:
            return
    SQUARES: tl.constexpr = needs_squares(DISTANCE)
    WEIGHTED: tl.constexpr = SMOOTH and class_weights is not None
    MOMENTS: tl.constexpr = needs_moments(DISTANCE) or SMOOTH

    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if WIDTH > 0:
        outer_stride = outer_stride // WIDTH * WIDTH
    _, valid, label = label_of(labels, row, classes, ignore_index)
    first = slice_end(part * slice_size, classes, valid, WIDTH)
    last = slice_end((part + 1) * slice_size, classes, valid, WIDTH)
    row_logits = logits + row_start(row, inner, outer_stride, inner_stride, FLAT)
    stats = slice_stats(
        row_logits, row, label, class_weights, classes, first, last, class_stride,
        WIDTH, SQUARES, MOMENTS, WEIGHTED, SOFT, ACTIVATION, ACC, PARTS, LANES, WORD,
    )  # fmt: skip
    save_stats(saved, row * slices + part, stats)


@jit
def gradient_kernel(
    logits,
    labels,  # int64 (rows,)
    label_logits,  # ACC (rows,), or None: among the logits
    class_weights,  # ACC (classes,) or None; with SOFT (rows, classes)
    class_margins,  # ACC (classes,) or None: margin
    tau,  # ACC, tau of row i at i * tau_step, or None: tau_value
    upstream,  # ACC, upstream gradient of row i at i * upstream_step, or None: 1
    parts,  # float64 (num_parts,), with MEAN == FROM_PARTS
    denominator,  # out: float64 (1,), or None
    saved,  # ACC (rows, slices, SAVED)
    grad,  # out, or None
    losses,  # out: float64 (rows,), or None
    row_losses,  # out: ACC (rows,), or None
    reports,  # out: ACC (3, rows): cross-entropy, distance, margin, or None
    tau_grad,  # out: ACC (rows,), or None
    rows: tl.int64,
    classes: tl.int64,
    ignore_index: tl.int64,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    class_stride: tl.int64,
    grad_outer: tl.int64,
    grad_inner: tl.int64,
    grad_class: tl.int64,
    tau_step: tl.int64,
    upstream_step: tl.int64,
    num_parts: tl.int64,
    slices: tl.int64,
    slice_size: tl.int64,  # of the gradient, which may be cut otherwise
    tau_value: tl.float64,
    q: tl.float64,
    most: tl.float64,  # -log of the threshold of gce
    scale: tl.float64,
    margin: tl.float64,
    smoothing: tl.float64,
    TRUTH: tl.constexpr,
    DISTANCE: tl.constexpr,
    SMOOTH: tl.constexpr,  # smoothing > 0, or SOFT
    SOFT: tl.constexpr,  # the target is class probabilities
    ACTIVATION: tl.constexpr,
    MEAN: tl.constexpr,
    SKIP: tl.constexpr,  # return at once where the upstream gradient is 1
    FLAT: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    WORD: tl.constexpr,
    SLICES_BLOCK: tl.constexpr,  # >= slices
):
    if SKIP:
        if tl.load(upstream) == 1.0:
            return
    SQUARES: tl.constexpr = needs_squares(DISTANCE)
    WEIGHTED: tl.constexpr = SMOOTH and class_weights is not None
    MOMENTS: tl.constexpr = needs_moments(DISTANCE) or SMOOTH

    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if WIDTH > 0:
        outer_stride = outer_stride // WIDTH * WIDTH
        grad_outer = grad_outer // WIDTH * WIDTH
    y, valid, label = label_of(labels, row, classes, ignore_index)
    row_logits = logits + row_start(row, inner, outer_stride, inner_stride, FLAT)
    stats = merge_all(saved_stats(saved, row, slices, SLICES_BLOCK), SQUARES, MOMENTS, WEIGHTED)
    label_logit = label_logit_of(row_logits, label_logits, row, label, valid, class_stride, ACTIVATION, ACC)
    divisor = mean_denominator(labels, class_weights, parts, num_parts, rows, classes, ignore_index, MEAN, SOFT)
    loss, gradient = finished_rows(
        stats, label_logit, row, valid, y, tau, tau_value, tau_step, class_weights, class_margins, classes,
        ignore_index, q, most, scale, margin, smoothing, row_losses, reports, tau_grad, rows, part == 0,
        TRUTH, DISTANCE, SMOOTH, WEIGHTED, SOFT, ACTIVATION, ACC,
    )  # fmt: skip
    if losses is not None:
        tl.store(losses + row, loss.to(tl.float64), mask=part == 0)
    if denominator is not None:
        tl.store(denominator, divisor, mask=(row == 0) & (part == 0))
    if grad is not None:
        row_grad = grad + row_start(row, inner, grad_outer, grad_inner, FLAT)
        coefficients = scaled_gradient(gradient, stats, row, upstream, upstream_step, divisor, row >= 0, ACC)
        first = slice_end(part * slice_size, classes, row >= 0, WIDTH)
        last = slice_end((part + 1) * slice_size, classes, row >= 0, WIDTH)
        middle = tl.where(valid, last, first)  # nothing of an ignored row is read
        if WIDTH > 0:
            middle = middle // WIDTH * WIDTH
        write_gradient(
            row_logits, row_grad, row, label, class_weights, classes, first, middle, class_stride, grad_class,
            coefficients, WIDTH, SQUARES, MOMENTS, WEIGHTED, SOFT, ACTIVATION, ACC, PARTS, LANES, WORD,
        )  # fmt: skip
        write_zeros(row_grad, middle, last, grad_class, WIDTH, PARTS, LANES, WORD)
