"""Output layer and loss in chunks of rows that fit a memory budget, without autograd.

In each chunk the loss's kernel puts the gradient in the place of the logits, from where matrix products take it to the
hidden states, the weight and the bias. Relies on `backends`; `linear` relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .backends import choose_pieces
from .backends.pieces import Losses, Pieces
from .shards import ClassShard, shard_pieces
from .spec import LossSpec

__all__ = ["Layer", "LinearLoss", "Needs", "Target", "accumulator", "chunk_rows", "run"]

# Bytes of logits at a time, where the caller names no budget. On the CPU a chunk of more rows gains nothing, and one of
# fewer than so many spends its time on the gradient of the weight, which each reads and writes; a GPU needs enough of
# them to be busy.
CPU_BUDGET: Final = 88 << 20
CPU_ROWS: Final = 176
GPU_BUDGET: Final = 512 << 20

# Elements of a gradient that are widened at a time, where a product cannot be added in a wider type.
_WIDENED: Final = 1 << 20

# Bytes of the weight that go through the layer together on the CPU.
_BLOCK: Final = 4 << 20


class Layer(NamedTuple):
    """hidden (N, H), weight (C, H), bias (C,) or None, and what makes logits of their product.

    .. code-block:: text

        z = logit_scale (hidden weight^T + bias), and with a softcap: softcap tanh(z / softcap)

    With a shard weight and bias are those of some of the classes.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    shard: ClassShard | None = None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    tau: bool

    @property
    def logits(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True)
class Target:
    """What the loss needs besides logits: y (N,), tau a number or () or (N,), weights and margins of classes (C,)."""

    y: Tensor
    tau: Tensor | float
    class_weight: Tensor | None
    margins: Tensor | None
    spec: LossSpec

    def rows(self, first: int, last: int) -> tuple[Tensor, Tensor | float]:
        tau = self.tau
        return self.y[first:last], tau[first:last] if isinstance(tau, Tensor) and tau.dim() else tau


@dataclass
class LinearLoss:
    """Results of `run`: of each row loss and, if asked for, (3, N) reports; gradients, each in the accumulator's type.

    Attributes:
        hidden, weight, bias: gradients of the sum of the rows' losses, each times its upstream; that of hidden in its
            own type. None where they are not wanted.
        tau_slopes: (N,), the derivatives of the rows' losses by tau. None where they are not wanted.
    """

    rows: Tensor
    reports: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    tau_slopes: Tensor | None = None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(layer: Layer, budget: int | None, with_grad: bool) -> int:
    """How many rows of logits, with what a group gathers for them, fit the budget; chunks are of even sizes.

    The processes of a group agree on the number: all must ask at once.
    """
    hidden, shard = layer.hidden, layer.shard
    rows, classes = hidden.shape[0], layer.weight.shape[0]
    buffers = 2 if with_grad and layer.softcap is not None else 1
    per_row = classes * hidden.element_size() * buffers
    if shard is not None:
        per_row += shard.bytes_per_row(accumulator(hidden.dtype).itemsize)
    if budget is None:
        budget = max(CPU_BUDGET, CPU_ROWS * per_row) if hidden.device.type == "cpu" else GPU_BUDGET
    most = max(1, budget // max(1, per_row))
    chunks = max(1, -(-rows // most))
    fitting = max(1, min(most, -(-rows // (16 * chunks)) * 16))
    return fitting if shard is None else shard.fewest(fitting, hidden.device)


def run(
    layer: Layer,
    target: Target,
    upstream: Tensor,
    needs: Needs,
    *,
    with_reports: bool,
    rows_at_a_time: int,
    backend: str | None,
) -> LinearLoss:
    """Loss and gradients, chunk by chunk; `upstream` (one value or one per row) multiplies the rows' gradients."""
    hidden, weight = layer.hidden, layer.weight
    count, wide = hidden.shape[0], accumulator(hidden.dtype)
    pieces = choose_pieces(hidden, backend) if layer.shard is None else shard_pieces(hidden, backend)
    found = LinearLoss(
        hidden.new_empty(count, dtype=wide), hidden.new_empty(3, count, dtype=wide) if with_reports else None
    )
    if needs.hidden:
        found.hidden = torch.empty_like(hidden)
    if needs.weight:
        found.weight = (torch.empty_like if count else torch.zeros_like)(weight, dtype=wide)
    if needs.bias:
        found.bias = weight.new_zeros(weight.shape[0], dtype=wide)
    if needs.tau:
        found.tau_slopes = hidden.new_empty(count, dtype=wide)
    buffer = hidden.new_empty(min(rows_at_a_time, count), weight.shape[0])
    for first in range(0, count, rows_at_a_time):
        last = min(first + rows_at_a_time, count)
        logits = buffer[: last - first]
        slopes = _fill_logits(layer, hidden[first:last], logits, with_slopes=needs.logits)
        rows_upstream = (upstream[first:last] if upstream.dim() else upstream) if needs.logits else None
        losses = _losses(pieces, layer, logits, target, first, last, rows_upstream, needs.tau, with_reports)
        found.rows[first:last] = losses.rows
        if found.reports is not None and losses.reports is not None:
            found.reports[:, first:last] = losses.reports
        if found.tau_slopes is not None and losses.tau_slopes is not None:
            found.tau_slopes[first:last] = losses.tau_slopes
        if slopes is not None:
            logits.mul_(slopes)
        if found.hidden is not None:
            torch.mm(logits, weight, out=found.hidden[first:last])
        if found.weight is not None:
            _add_product(found.weight, logits, hidden[first:last], start=first == 0)
        if found.bias is not None:
            found.bias += logits.sum(0, dtype=wide)
    if found.hidden is not None and layer.shard is not None:
        dist.all_reduce(found.hidden, group=layer.shard.group)
    return found


def _losses(
    pieces: Pieces,
    layer: Layer,
    logits: Tensor,
    target: Target,
    first: int,
    last: int,
    upstream: Tensor | None,
    with_tau: bool,
    with_reports: bool,
) -> Losses:
    """Of rows first .. last - 1, whose logits become their gradient."""
    y, tau = target.rows(first, last)
    wanted: dict[str, Any] = {"upstream": upstream, "with_tau": with_tau, "with_reports": with_reports}
    if layer.shard is None:
        return pieces.over_logits(logits, y, tau, target.class_weight, target.margins, target.spec, **wanted)
    return layer.shard.gather(pieces, logits, y, target.spec).losses(pieces, logits, tau, target.spec, **wanted)


def _fill_logits(layer: Layer, hidden: Tensor, out: Tensor, *, with_slopes: bool) -> Tensor | None:
    """Write the logits of some rows; returns their derivatives by what is capped, where there is a cap."""
    cap = layer.softcap
    step = _block(layer)
    for first in range(0, out.shape[1], step):
        block = slice(first, first + step)
        _product(hidden, layer.weight[block], layer.bias, block, layer.logit_scale, out[:, block])
    if cap is None:
        return None
    out.div_(cap).tanh_()
    slopes = torch.square(out).neg_().add_(1.0) if with_slopes else None
    out.mul_(cap)
    return slopes


def _block(layer: Layer) -> int:
    """How many classes go through the layer at a time: the library of CPUs is slow with few rows and many classes."""
    weight = layer.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return max(1, weight.shape[0])
    return max(256, _BLOCK // max(1, weight.shape[1] * weight.element_size()))


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, classes: slice, scale: float, out: Tensor) -> None:
    if bias is not None:
        torch.addmm(bias[classes], hidden, weight.t(), beta=scale, alpha=scale, out=out)
    elif scale != 1.0:
        torch.addmm(out, hidden, weight.t(), beta=0, alpha=scale, out=out)
    else:
        torch.mm(hidden, weight.t(), out=out)


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor, *, start: bool) -> None:
    """Add gradient^T hidden to what may be of a wider type; at the start there is nothing yet to add to."""
    if total.dtype == hidden.dtype:
        torch.addmm(total, gradient.t(), hidden, beta=0 if start else 1, out=total)
        return
    if hidden.is_cuda:
        beta = 0 if start else 1
        torch.ops.aten.addmm.dtype_out(total, gradient.t(), hidden, total.dtype, beta=beta, alpha=1, out=total)
        return
    hidden = hidden.to(total.dtype)
    step = max(1, _WIDENED // max(1, gradient.shape[0]))
    for first in range(0, total.shape[0], step):
        part = total[first : first + step]
        widened = gradient[:, first : first + step].to(total.dtype)
        torch.addmm(part, widened.t(), hidden, beta=0 if start else 1, out=part)
