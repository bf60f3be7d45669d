"""Launches of the Triton kernels: a `Task` in, work on the current stream out.

The host never waits for the device here. Relies on the kernels and on shapes.py; the autograd function in __init__.py
relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...checks import class_dim
from ...spec import LossSpec
from .few_classes import rows_kernel
from .layouts import rows_of, unified, width
from .many_classes import gradient_kernel, row_kernel, stats_kernel
from .row_loss import needs_moments
from .shapes import (
    MAX_SLICES,
    Shape,
    few_classes_shape,
    options,
    processor_count,
    rows_at_work,
    slice_count,
    sum_shape,
    tile_shape,
)
from .steps import label_weights_kernel, sum_kernel

SAVED = 8  # statistics per slice, see many_classes.py
NO_MEAN, FROM_LABELS, FROM_PARTS = 0, 1, 2  # see steps.py
MAX_PARTS = 32  # of the sum that the mean divides by, see steps.py
LABEL_READS = 2**17  # more than this many labels, read by all programs together, are summed once beforehand
# Programs of `rows_kernel` go on to further rows, so that the loss has not too many parts to sum, and a backward pass
# not too many programs to start that find nothing to do. More warps than a processor holds even out the end.
WARPS_PER_PROCESSOR = 256
WARPS_TO_SKIP = 64
MAX_CLASSES = 2**31 - 2**16  # column indices have 32 bits, the last tile included


@dataclass
class Task:
    """One run: what is read, what is wanted. `acc` below is float64 for float64 logits, else float32.

    Attributes:
        labels: int64, contiguous, one per row.
        weight: acc, contiguous, or None. (classes,); of class probabilities (rows, classes), see `targets`.
        tau: acc, contiguous: one value or one per row; None for `tau_value`.
        upstream: acc, contiguous: one value or one per row; None for 1.
        grad: as logits, written; None where no gradient is wanted.
        denominator: float64, one value: what the mean divides by. Written, or read where `denominator_known`.
        saved: acc (rows, slices, SAVED): statistics, written; or read where `saved_known`.
        margins: acc, contiguous, (classes,): the classes' own margins; None for that of `spec`.
        label_logits: acc (rows,), contiguous: of the labels, which may then lie elsewhere; `grad` may be `logits`.
            None: among the logits.
        skip_unit_upstream: do nothing where the upstream gradient is 1, for then `grad` is right already.
        loss, row_losses, reports, tau_grad: outputs, see the kernels.
    """

    logits: Tensor
    labels: Tensor
    weight: Tensor | None
    tau: Tensor | None
    tau_value: float
    spec: LossSpec
    distance_code: int
    upstream: Tensor | None = None
    grad: Tensor | None = None
    denominator: Tensor | None = None
    denominator_known: bool = False
    saved: Tensor | None = None
    saved_known: bool = False
    skip_unit_upstream: bool = False
    margins: Tensor | None = None
    label_logits: Tensor | None = None
    loss: Tensor | None = None
    row_losses: Tensor | None = None
    reports: Tensor | None = None
    tau_grad: Tensor | None = None

    @property
    def moments(self) -> bool:
        """Whether threads need the room that mean and variance of the logits take; a transformation takes it, too."""
        spec = self.spec
        return (
            spec.soft or spec.label_smoothing > 0 or spec.activation != "softmax" or needs_moments(self.distance_code)
        )

    @property
    def weighted(self) -> bool:
        """Whether the weight of every class is read, and not just that of the label."""
        return self.weight is not None and (self.spec.soft or self.spec.label_smoothing > 0)


def saved_slices(task: Task) -> int:
    """How many sets of statistics per row a run keeps for a later one; 0 where the logits are read again instead."""
    logits = task.logits
    classes = logits.shape[class_dim(logits)]
    rows = logits.numel() // max(classes, 1)
    layout = rows_of(logits)
    words = width((logits,), (layout,), classes) if layout is not None else 0
    if few_classes_shape(classes, rows, logits.element_size(), words, task.moments, task.weighted) is not None:
        return 0
    return slice_count(rows, classes, processor_count(logits.device))


def run(task: Task) -> None:
    """Put the work on the current stream."""
    logits, grad, spec = task.logits, task.grad, task.spec
    classes = logits.shape[class_dim(logits)]
    rows = task.labels.numel()
    layout = rows_of(logits)
    assert layout is not None
    grad_layout = layout
    if grad is not None:
        own = rows_of(grad)
        assert own is not None
        both = unified(layout, own)
        assert both is not None
        layout, grad_layout = both
    matrices = (logits,) if grad is None else (logits, grad)
    itemsize = logits.element_size()
    words = width(matrices, (layout, grad_layout)[: len(matrices)], classes)
    shape = None
    if task.label_logits is None:
        shape = few_classes_shape(classes, rows, itemsize, words, task.moments, task.weighted)
    slices = 1
    if shape is None:
        slices = slice_count(rows, classes, processor_count(logits.device))
        if task.saved is not None:
            slices = task.saved.shape[1]
    programs = _programs(task, rows, shape) if shape else rows * slices
    parts, num_parts, mean = _denominator_parts(task, rows, classes, programs)
    losses = None
    if task.loss is not None and (shape is None or programs > 1):
        losses = torch.empty(programs if shape else rows, dtype=torch.float64, device=logits.device)

    arguments: dict[str, Any] = {
        "logits": logits,
        "labels": task.labels,
        "class_weights": task.weight,
        "class_margins": task.margins,
        "tau": task.tau,
        "upstream": task.upstream,
        "parts": parts,
        "denominator": None if task.denominator_known or parts is task.denominator else task.denominator,
        "grad": grad,
        "losses": losses,
        "row_losses": task.row_losses,
        "reports": task.reports,
        "tau_grad": task.tau_grad,
        "rows": rows,
        "classes": classes,
        "ignore_index": spec.ignore_index,
        "inner": layout.inner,
        "outer_stride": layout.outer_stride,
        "inner_stride": layout.inner_stride,
        "class_stride": layout.class_stride,
        "grad_outer": grad_layout.outer_stride,
        "grad_inner": grad_layout.inner_stride,
        "grad_class": grad_layout.class_stride,
        "tau_step": int(task.tau is not None and task.tau.dim() > 0),
        "upstream_step": int(task.upstream is not None and task.upstream.dim() > 0),
        "num_parts": num_parts,
        "tau_value": task.tau_value,
        "q": spec.q,
        "most": -log(spec.threshold) if spec.threshold > 0.0 else inf,
        "scale": spec.scale,
        "margin": spec.margin,
        "smoothing": spec.label_smoothing,
        "TRUTH": spec.truth_code,
        "DISTANCE": task.distance_code,
        "SMOOTH": spec.soft or spec.label_smoothing > 0,
        "SOFT": spec.soft,
        "ACTIVATION": spec.activation_code,
        "MEAN": mean,
        "SKIP": task.skip_unit_upstream,
        "FLAT": layout.flat,
        "WIDTH": words,
        "ACC": tl.float64 if itemsize == 8 else tl.float32,
    }
    if shape is not None:
        total = task.loss if losses is None else None
        rows_kernel[(programs,)](
            **arguments,
            total=total,
            PARTS=shape.parts,
            BLOCK_R=shape.rows,
            LANES=shape.lanes,
            WORD=shape.word,
            **options(shape.warps, shape.registers),
        )
    else:
        _run_long_rows(task, arguments, rows, classes, slices)
    if losses is not None:
        block, warps = sum_shape(losses.numel())
        sum_kernel[(1,)](losses, task.denominator, task.loss, losses.numel(), BLOCK=block, **options(warps))


def _programs(task: Task, rows: int, shape: Shape) -> int:
    """How many programs share the tiles of a batch."""
    warps = WARPS_TO_SKIP if task.skip_unit_upstream else WARPS_PER_PROCESSOR
    most = max(1, processor_count(task.logits.device) * warps // shape.warps)
    return min(-(-rows // shape.rows), most)


def _denominator_parts(task: Task, rows: int, classes: int, programs: int) -> tuple[Tensor | None, int, int]:
    """The numbers that add up to what the mean divides by, how many there are, and how a kernel comes by them."""
    if task.denominator is None:
        return None, 0, NO_MEAN
    if task.denominator_known:
        return task.denominator, 1, FROM_PARTS
    if programs * rows <= LABEL_READS:
        return None, 0, FROM_LABELS
    count = min(256, triton.cdiv(rows, 1024))
    parts = torch.empty(count, dtype=torch.float64, device=task.logits.device)
    weight = None if task.spec.soft else task.weight
    label_weights_kernel[(count,)](
        task.labels, weight, parts, rows, classes, task.spec.ignore_index, BLOCK=1024, **options(4)
    )
    if count <= MAX_PARTS:
        return parts, count, FROM_PARTS
    sum_kernel[(1,)](parts, None, task.denominator, count, BLOCK=256, **options(4))
    return task.denominator, 1, FROM_PARTS


def run_stats(task: Task) -> None:
    """Put statistics of all classes of each row into `saved`, acc (rows, 1, SAVED), and nothing else."""
    logits, spec = task.logits, task.spec
    rows, classes = logits.shape
    layout = rows_of(logits)
    assert layout is not None
    words = width((logits,), (layout,), classes)
    tile = tile_shape(logits.element_size(), words, task.moments, False, rows_at_work(logits, classes) == 1)
    stats_kernel[(rows, 1)](
        logits,
        task.labels,
        None,
        None,
        task.saved,
        rows=rows,
        classes=classes,
        ignore_index=spec.ignore_index,
        inner=layout.inner,
        outer_stride=layout.outer_stride,
        inner_stride=layout.inner_stride,
        class_stride=layout.class_stride,
        slices=1,
        slice_size=classes,
        DISTANCE=task.distance_code,
        SMOOTH=spec.label_smoothing > 0,
        SOFT=False,
        ACTIVATION=spec.activation_code,
        SKIP=False,
        FLAT=layout.flat,
        WIDTH=words,
        ACC=tl.float64 if logits.element_size() == 8 else tl.float32,
        PARTS=tile.parts,
        LANES=tile.lanes,
        WORD=tile.word,
        **options(tile.warps, tile.registers),
    )


STATS_ARGUMENTS = (
    *("logits", "labels", "class_weights", "upstream", "rows", "classes", "ignore_index"),
    *("inner", "outer_stride", "inner_stride", "class_stride"),
    *("DISTANCE", "SMOOTH", "SOFT", "ACTIVATION", "SKIP", "FLAT", "WIDTH", "ACC"),
)


def _run_long_rows(task: Task, arguments: dict[str, Any], rows: int, classes: int, slices: int) -> None:
    logits = task.logits
    at_work = rows_at_work(logits, classes)
    tile = tile_shape(logits.element_size(), arguments["WIDTH"], task.moments, task.weighted, at_work == 1)
    common: dict[str, Any] = dict(
        PARTS=tile.parts, LANES=tile.lanes, WORD=tile.word, **options(tile.warps, tile.registers)
    )
    saved = task.saved
    if slices == 1 and not task.saved_known:
        most = processor_count(logits.device) * at_work
        # Where many would have nothing to do in the last turn, all rows are at work together.
        programs = most if rows >= 0.9 * triton.cdiv(rows, most) * most else rows
        row_kernel[(programs,)](**arguments, label_logits=task.label_logits, saved=saved, **common)
        return
    if not task.saved_known:
        if saved is None:
            dtype = torch.float64 if task.logits.dtype == torch.float64 else torch.float32
            saved = torch.empty(rows, slices, SAVED, dtype=dtype, device=task.logits.device)
        size = triton.cdiv(triton.cdiv(classes, slices), 1024) * 1024
        stats_kernel[(rows, slices)](
            **{name: arguments[name] for name in STATS_ARGUMENTS}, saved=saved, slices=slices, slice_size=size, **common
        )
    # Each program that writes a part of a row finishes the row by itself, so the parts must not be small.
    cuts = max(slices, min(MAX_SLICES, classes // 32768, triton.cdiv(1024, rows))) if task.grad is not None else 1
    size = triton.cdiv(triton.cdiv(classes, cuts), 1024) * 1024
    gradient_kernel[(rows, cuts)](
        **arguments,
        label_logits=task.label_logits,
        saved=saved,
        slices=slices,
        slice_size=size,
        SLICES_BLOCK=triton.next_power_of_2(slices),
        **common,
    )
