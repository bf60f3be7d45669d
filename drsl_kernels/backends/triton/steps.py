"""Steps that the Triton kernels share: labels and the mean, from statistics to losses, and gradients.

Also the two small kernels that run before and after, where one program does not see every row. Sums are taken in an
order that never varies, and a label that is out of range is never used as an index. ACC is the dtype of the
statistics. Relies on row_loss.py for the mathematics; few_classes.py and many_classes.py rely on it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_loss import SIGSOFTMAX, class_exp, row_loss, sigsoftmax_slope_from

# How the mean's denominator comes about (`MEAN` of the kernels)
NO_MEAN: tl.constexpr = tl.constexpr(0)
FROM_LABELS: tl.constexpr = tl.constexpr(1)  # every program sums the class weights of all labels itself
FROM_PARTS: tl.constexpr = tl.constexpr(2)  # it is the sum of `parts`, of which there may be one

MAX_PARTS: tl.constexpr = tl.constexpr(32)
COUNT_BLOCK: tl.constexpr = tl.constexpr(256)  # labels that a program which has other things to do sums at a time

# Integers that must not be compiled in: they change from batch to batch.
COUNTS = (
    "count",
    "rows",
    "classes",
    "ignore_index",
    "inner",
    "num_parts",
    "tau_step",
    "upstream_step",
    "slices",
    "slice_size",
)
STRIDES = ("outer_stride", "inner_stride", "class_stride", "grad_outer", "grad_inner", "grad_class")
VALUES = ("tau_value", "q", "most", "scale", "margin", "smoothing")
jit = triton.jit(do_not_specialize=[*COUNTS, *STRIDES, *VALUES])


# ----------------------------------------------------------------------------------------------------------
# Labels, weights, and what the mean divides by. With SOFT the labels are classes of class probabilities, and
# class_weights holds (rows, classes) numbers: each probability times the weight of its class.


@triton.jit
def weights_of(labels, class_weights, classes, ignore_index):
    """u_y of each label: 0 for ignored ones, 1 for those out of range."""
    counts = labels != ignore_index
    weight = tl.where(counts, 1.0, 0.0)
    if class_weights is not None:
        known = counts & (labels >= 0) & (labels < classes)
        weight = tl.load(class_weights + labels, mask=known, other=1.0)
        weight = tl.where(counts, weight, 0.0)
    return weight


@triton.jit
def class_index(label, classes):
    """A label as a 32-bit column; -1 for what is no class."""
    return tl.where((label >= 0) & (label < classes), label, -1).to(tl.int32)


@triton.jit
def row_weights(labels, row, class_weights, classes, ignore_index, SOFT: tl.constexpr):
    """u_y of rows."""
    if SOFT:
        known = (labels != ignore_index) & (labels >= 0) & (labels < classes)
        weight = tl.load(class_weights + row * classes + labels, mask=known, other=1.0)
    else:
        weight = weights_of(labels, class_weights, classes, ignore_index)
    return weight


@triton.jit
def class_weights_at(class_weights, row, column, mask, is_label, classes, SOFT: tl.constexpr):
    """u_k of the classes of rows; with SOFT 0 at the label, which is not in the rest."""
    if SOFT:
        u = tl.load(class_weights + row * classes + column, mask=mask & (is_label == 0), other=0.0)
    else:
        u = tl.load(class_weights + column, mask=mask, other=0.0)
    return u


@triton.jit
def summed_label_weights(labels, class_weights, first, step, rows, classes, ignore_index, BLOCK: tl.constexpr):
    """Sum over labels from `first` on, BLOCK at a time in steps of `step`."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(first, rows, step):
        row = start + tl.arange(0, BLOCK)
        y = tl.load(labels + row, mask=row < rows, other=ignore_index)
        total += weights_of(y, class_weights, classes, ignore_index).to(tl.float64)
    return tl.sum(total, axis=0)


@jit
def label_weights_kernel(
    labels,  # int64 (rows,)
    class_weights,  # (classes,) or None
    parts,  # out: float64 (programs,), which add up to the denominator
    rows: tl.int64,
    classes: tl.int64,
    ignore_index: tl.int64,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    first = program.to(tl.int64) * BLOCK
    step = tl.num_programs(0) * BLOCK
    total = summed_label_weights(labels, class_weights, first, step, rows, classes, ignore_index, BLOCK)
    tl.store(parts + program, total)


@triton.jit
def mean_denominator(
    labels, class_weights, parts, num_parts, rows, classes, ignore_index, MEAN: tl.constexpr, SOFT: tl.constexpr
):  # fmt: skip
    if MEAN == FROM_LABELS:
        weights = None if SOFT else class_weights
        total = summed_label_weights(labels, weights, 0, COUNT_BLOCK, rows, classes, ignore_index, COUNT_BLOCK)
    elif MEAN == FROM_PARTS:
        part = tl.arange(0, MAX_PARTS)
        total = tl.sum(tl.load(parts + part, mask=part < num_parts, other=0.0), axis=0)
    else:
        total = tl.full((), 1.0, tl.float64)
    return total


@jit
def sum_kernel(losses, denominator, total, count: tl.int64, BLOCK: tl.constexpr):
    """total = sum of losses[0:count] / denominator, in float64 and always in the same order."""
    lanes = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        lanes += tl.load(losses + at, mask=at < count, other=0.0)
    result = tl.sum(lanes, axis=0)
    if denominator is not None:
        result /= tl.load(denominator)
    tl.store(total, result.to(total.dtype.element_ty))


# ----------------------------------------------------------------------------------------------------------
# Rows


@triton.jit
def row_start(row, inner, outer_stride, inner_stride, FLAT: tl.constexpr):
    """Offset of a row: row i has the indices (i // inner, i % inner), and with FLAT there is only the first."""
    if FLAT:
        offset = row * outer_stride
    else:
        offset = (row // inner) * outer_stride + (row % inner) * inner_stride
    return offset


@triton.jit
def finished_rows(
    stats, label_logit, row, valid, y, tau, tau_value, tau_step, class_weights, class_margins, classes, ignore_index,
    q, most, scale, margin, smoothing, row_losses, reports, tau_grad, rows, write,
    TRUTH: tl.constexpr, DISTANCE: tl.constexpr, SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr, SOFT: tl.constexpr,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Losses of rows, their gradient coefficients, and what is reported of them. Elementwise over rows."""
    weight = row_weights(y, row, class_weights, classes, ignore_index, SOFT).to(ACC)
    if tau is None:
        strength = tl.zeros_like(label_logit) + tl.full((), tau_value, ACC)
    else:
        strength = tl.load(tau + row * tau_step, mask=valid, other=0.0)
    if class_margins is None:
        own_margin = tl.full((), margin, ACC)
    else:
        known = valid & (y >= 0) & (y < classes)
        own_margin = tl.load(class_margins + y, mask=known, other=0.0)
    report, gradient = row_loss(
        stats, label_logit, strength, weight,
        tl.full((), q, ACC), tl.full((), most, ACC), tl.full((), scale, ACC), own_margin, tl.full((), smoothing, ACC),
        TRUTH, DISTANCE, SMOOTH, WEIGHTED, SOFT,
    )  # fmt: skip
    loss = tl.where(valid, report[0], 0.0)
    if row_losses is not None:
        tl.store(row_losses + row, loss, mask=write)
    if reports is not None:
        for i in tl.static_range(3):
            tl.store(reports + i * rows + row, tl.where(valid, report[i + 1], 0.0), mask=write)
    if tau_grad is not None:
        tl.store(tau_grad + row, tl.where(valid, report[4], 0.0), mask=write)
    if ACTIVATION == SIGSOFTMAX:
        a, b, c, d, smooth, label = gradient
        gradient = (a, b, c, d, smooth, label * sigsoftmax_slope_from(label_logit))
    return loss, gradient


@triton.jit
def scaled_gradient(gradient, stats, row, upstream, upstream_step, denominator, write, ACC: tl.constexpr):
    """Coefficients over exp(z - M) instead of r, times the upstream gradient, divided by the denominator."""
    a, b, c, d, smooth, label = gradient
    M, A1, _, h, _, _, _, _ = stats
    factor = (1.0 / denominator).to(ACC)
    if upstream is not None:
        factor = factor * tl.load(upstream + row * upstream_step, mask=write, other=0.0)
    inverse = 1.0 / tl.where(A1 == 0.0, 1.0, A1)
    flat = c == 0.0  # then the moments do not count, even if they overflowed
    c = c * factor
    offset = tl.where(flat, 0.0, c * h) - d * factor
    top = tl.where(M == -float("inf"), 0.0, M)
    return a * factor * inverse, b * factor * inverse * inverse, c, offset, smooth * factor, label * factor, top


@triton.jit
def class_gradient(
    z, u, a, b, c, offset, smooth, top,
    SQUARES: tl.constexpr, MOMENTS: tl.constexpr, WEIGHTED: tl.constexpr, SOFT: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Gradient at classes with transformed logits z that are not the label, from `scaled_gradient`'s coefficients."""
    e = class_exp(z - top)
    g = e * a
    if SQUARES:
        g = e * (a + b * e)
    if MOMENTS:
        # Where c is 0 the distance from the maximum does not count, even if it is infinite.
        step = tl.where(c == 0.0, 0.0, c * (z - top)) + offset
        at_masked = 0.0
        if WEIGHTED:
            step -= smooth * u
            if SOFT:
                at_masked = -smooth * u
        else:
            step -= smooth
        g += tl.where(z == -float("inf"), at_masked, step)
    if ACTIVATION == SIGSOFTMAX:
        g = g * sigsoftmax_slope_from(z)
    return g
