"""Few classes: a program takes one tile of whole rows after the other, so the logits are read once and the gradient
written once.

Relies on steps.py; shapes.py decides the shape of the tile, launch.py launches.
"""

from __future__ import annotations

import triton.language as tl

from .row_loss import needs_moments, needs_squares, row_stats_of, spread, transformed
from .steps import (
    class_gradient,
    class_index,
    class_weights_at,
    finished_rows,
    jit,
    mean_denominator,
    row_start,
    scaled_gradient,
)


@jit
def rows_kernel(
    logits,
    labels,  # int64 (rows,)
    class_weights,  # ACC (classes,) or None; with SOFT (rows, classes)
    class_margins,  # ACC (classes,) or None: margin
    tau,  # ACC, tau of row i at i * tau_step, or None: tau_value
    upstream,  # ACC, upstream gradient of row i at i * upstream_step, or None: 1
    parts,  # float64 (num_parts,), with MEAN == FROM_PARTS
    denominator,  # out: float64 (1,), or None
    grad,  # out, or None
    total,  # out: ACC (1,), the reduced loss, or None. With more than one program:
    losses,  # out: float64 (programs,), the sum of each program's losses
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
    PARTS: tl.constexpr,  # a row is PARTS x LANES words of WORD neighbouring classes
    BLOCK_R: tl.constexpr,
    LANES: tl.constexpr,
    WORD: tl.constexpr,
):
    if SKIP:
        if tl.load(upstream) == 1.0:
            return
    SQUARES: tl.constexpr = needs_squares(DISTANCE)
    WEIGHTED: tl.constexpr = SMOOTH and class_weights is not None
    MOMENTS: tl.constexpr = needs_moments(DISTANCE) or SMOOTH

    program = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)[:, None, None, None] * (LANES * WORD)
    lane = tl.arange(0, LANES)[None, None, :, None] * WORD
    column = part + lane + tl.arange(0, WORD)[None, None, None, :]
    if WIDTH > 0:
        classes = classes // WIDTH * WIDTH  # tells the compiler what it is a multiple of
        outer_stride = outer_stride // WIDTH * WIDTH
        grad_outer = grad_outer // WIDTH * WIDTH
        at = column
        grad_at = column
    else:
        at = column * class_stride
        grad_at = column * grad_class
    inside = column < classes
    divisor = mean_denominator(labels, class_weights, parts, num_parts, rows, classes, ignore_index, MEAN, SOFT)
    if denominator is not None:
        tl.store(denominator, divisor, mask=program == 0)
    loss_sum = tl.zeros([BLOCK_R], tl.float64)
    for block in range(program, tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = block * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        y = tl.load(labels + row, mask=row < rows, other=ignore_index)
        valid = y != ignore_index
        start = row_start(row, inner, outer_stride, inner_stride, FLAT)
        known = spread(valid, True) & inside
        z = tl.load(logits + spread(start, True) + at, mask=known, other=-float("inf")).to(ACC)
        z = transformed(z, ACTIVATION)
        label_column = class_index(y, classes)
        is_label = column == spread(label_column, True)
        u = 0.0
        if WEIGHTED:
            u = class_weights_at(class_weights, spread(row, True), column, known, is_label, classes, SOFT)

        z = tl.where(is_label, -float("inf"), z)
        stats = row_stats_of(z, u, SQUARES, MOMENTS, WEIGHTED, SOFT)
        label_at = logits + start + label_column * class_stride
        label_logit = tl.load(label_at, mask=valid & (label_column >= 0), other=float("nan")).to(ACC)
        label_logit = transformed(tl.where(valid, label_logit, 0.0), ACTIVATION)
        loss, gradient = finished_rows(
            stats, label_logit, row, valid, y, tau, tau_value, tau_step, class_weights, class_margins, classes,
            ignore_index, q, most, scale, margin, smoothing, row_losses, reports, tau_grad, rows, row < rows,
            TRUTH, DISTANCE, SMOOTH, WEIGHTED, SOFT, ACTIVATION, ACC,
        )  # fmt: skip
        loss_sum += loss.to(tl.float64)
        if grad is not None:
            a, b, c, offset, smooth, label, top = scaled_gradient(
                gradient, stats, row, upstream, upstream_step, divisor, valid, ACC
            )
            # An ignored row has no logits, and 0 for the label; the mean over no row at all would make that NaN.
            a = tl.where(valid, a, 0.0)
            b = tl.where(valid, b, 0.0)
            label = tl.where(valid, label, 0.0)
            g = class_gradient(
                z, u, spread(a, True), spread(b, True), spread(c, True), spread(offset, True), spread(smooth, True),
                spread(top, True), SQUARES, MOMENTS, WEIGHTED, SOFT, ACTIVATION,
            )  # fmt: skip
            # Read anew: a thread would have to keep where its labels are, bit by bit.
            y = tl.load(labels + row, mask=row < rows, other=ignore_index, cache_modifier=".ca")
            g = tl.where(column == spread(class_index(y, classes), True), spread(label, True), g)
            g = g.to(grad.dtype.element_ty)
            grad_start = row_start(row, inner, grad_outer, grad_inner, FLAT)
            if WIDTH > 0 and LANES * WORD * grad.dtype.element_ty.primitive_bitwidth < 256:
                # Neighbouring threads write to different rows, less than 32 bytes each: the memory had better see whole
                # rows, and shared memory brings them together.
                COLUMNS: tl.constexpr = PARTS * LANES * WORD
                g = tl.reshape(tl.permute(g, (1, 0, 2, 3)), (BLOCK_R, COLUMNS))
                flat = tl.arange(0, COLUMNS)[None, :]
                mask = (row < rows)[:, None] & (flat < classes)
                tl.store(grad + grad_start[:, None] + flat, g, mask=mask)
            else:
                tl.store(grad + spread(grad_start, True) + grad_at, g, mask=spread(row < rows, True) & inside)

    if losses is not None:
        tl.store(losses + program, tl.sum(loss_sum, axis=0))
    elif total is not None:
        tl.store(total, (tl.sum(loss_sum, axis=0) / divisor).to(ACC))
