"""The loss of a linear layer as operators with gradients, for eager PyTorch and `torch.compile` alike.

A reduced loss computes its gradients together with its value, which the backward pass hands over, times the upstream
gradient; losses per row compute theirs in the backward pass. Second derivatives go through the whole logits.
Relies on `linear_chunks`, `functional`; `linear` relies on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from .checks import watches_operators
from .functional import family_loss
from .linear_chunks import Layer, Needs, Target, accumulator, chunk_rows, run
from .shards import NO_SECOND_DERIVATIVES, ClassShard, class_shard
from .spec import LossStats, spec_of_codes

__all__ = ["linear_loss", "through_logits"]

# float16 is short of range: gradients are kept so much larger, for a row's loss, until the upstream gradient is known.
_HALF_SCALE: Final = 64.0

_EVEN: Final = -1  # in the place of a shard's first class: all processes have equally many


def linear_loss(
    layer: Layer, target: Target, return_stats: bool, memory_budget: int | None, backend: str | None
) -> tuple[Tensor, LossStats | None]:
    """The loss, of reduction "none" (N,), and statistics (N,) if asked for."""
    recording = torch.is_grad_enabled()
    tau, tau_value = _split(target)
    needs = [recording and x is not None and x.requires_grad for x in (layer.hidden, layer.weight, layer.bias, tau)]
    loss, reports, *_ = _linear_loss(
        layer.hidden,
        layer.weight,
        layer.bias,
        target.y,
        tau,
        target.class_weight,
        target.margins,
        tau_value,
        *target.spec.codes,
        layer.logit_scale,
        layer.softcap or 0.0,
        memory_budget or 0,
        backend or "",
        *_names(layer.shard),
        return_stats,
        needs,
    )
    return loss, _as_stats(reports) if return_stats else None


def through_logits(
    layer: Layer, target: Target, return_stats: bool, backend: str | None
) -> tuple[Tensor, LossStats | None]:
    """The same with the whole logits, in operators that PyTorch can transform and differentiate to any order."""
    spec = target.spec
    logits = F.linear(layer.hidden, layer.weight, layer.bias)
    logits = logits * layer.logit_scale if layer.logit_scale != 1.0 else logits
    if layer.softcap is not None:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    member = (
        *(spec.truth, spec.q, spec.distance, spec.scale, spec.margin, spec.ignore_index, spec.reduction),
        *(spec.label_smoothing, spec.threshold, spec.activation),
    )
    y, tau, class_weight, margins = target.y, target.tau, target.class_weight, target.margins
    result = family_loss(logits, y, tau, class_weight, margins, member, return_stats, backend)
    return result if isinstance(result, tuple) else (result, None)


def _split(target: Target) -> tuple[Tensor | None, float]:
    """tau as a tensor and a number, of which one counts; no tensor where no distance is asked for."""
    if not isinstance(target.tau, Tensor):
        return None, target.tau
    return (target.tau, 0.0) if target.spec.distance is not None else (None, 0.0)


def _names(shard: ClassShard | None) -> tuple[str, int]:
    """A shard in the form that operators take."""
    if shard is None:
        return "", 0
    return shard.group.group_name, _EVEN if shard.even else shard.first


def _shard(group: str, first_class: int, classes: int) -> ClassShard | None:
    if not group:
        return None
    found = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type, attr-defined]
    return class_shard(found, None if first_class == _EVEN else first_class, classes)


def _as_stats(reports: Tensor) -> LossStats:
    cross_entropy, distance, margin = reports.unbind(0)
    return LossStats(cross_entropy, distance, margin, margin > 0)


# ---------------------------------------------------------------------------------------------------------
# Forward


@custom_op("drsl_kernels::linear_loss", mutates_args=())
def _linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    tau: Tensor | None,
    class_weight: Tensor | None,
    margins: Tensor | None,
    tau_value: float,
    truth: int,
    q: float,
    distance: int,
    scale: float,
    margin: float,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    soft: bool,
    threshold: float,
    activation: int,
    logit_scale: float,
    softcap: float,
    memory_budget: int,
    backend: str,
    group: str,
    first_class: int,
    return_stats: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, reports (3, N), and what the backward pass needs: gradients to hidden, weight, bias and per-row tau.

    Of no element where something is not wanted. Gradients are in the accumulator's type but for that of hidden, and of
    float16 times `_range`.
    """
    spec = spec_of_codes(
        truth, q, distance, scale, margin, ignore_index, reduction, label_smoothing, soft, threshold, activation
    )
    layer = Layer(hidden, weight, bias, logit_scale, softcap or None, _shard(group, first_class, weight.shape[0]))
    target = Target(y, tau_value if tau is None else tau, class_weight, margins, spec)
    per_row = spec.reduction == "none"
    now = Needs(*(False, False, False, needs[3]) if per_row else needs)
    share = _share(target, accumulator(hidden.dtype))
    upstream = _first_upstream(layer, share)
    found = run(
        layer,
        target,
        upstream,
        now,
        with_reports=return_stats,
        rows_at_a_time=chunk_rows(layer, memory_budget or None, now.logits),
        backend=backend or None,
    )
    loss = found.rows if per_row else _reduced(found.rows, target)
    if found.tau_slopes is not None:
        found.tau_slopes *= share
    nothing = loss.new_empty(0)
    extras = (found.reports, found.hidden, found.weight, found.bias, found.tau_slopes)
    reports, *gradients = (nothing.clone() if x is None else x for x in extras)
    return loss, reports, gradients[0], gradients[1], gradients[2], gradients[3]


def _share(target: Target, dtype: torch.dtype) -> Tensor:
    """What the mean multiplies each row's loss by, 1 for other reductions. 0 where no row counts: the loss is NaN."""
    if target.spec.reduction != "mean":
        return torch.ones((), dtype=dtype, device=target.y.device)
    count = _denominator(target)
    return torch.where(count == 0.0, 0.0, 1.0 / count).to(dtype)


def _denominator(target: Target) -> Tensor:
    valid = target.y != target.spec.ignore_index
    if target.class_weight is None:
        return valid.sum().double()
    weights = target.class_weight.detach().double()[target.y.long().masked_fill(~valid, 0)]
    return weights.masked_fill(~valid, 0.0).sum()


def _reduced(rows: Tensor, target: Target) -> Tensor:
    total = rows.sum(dtype=torch.float64)
    return (total / _denominator(target) if target.spec.reduction == "mean" else total).to(rows.dtype)


def _first_upstream(layer: Layer, share: Tensor) -> Tensor:
    """What the gradient of each row is multiplied by while it is computed."""
    if layer.hidden.dtype == torch.float16:
        share = share * _range(share)
    return share * layer.logit_scale


def _range(share: Tensor) -> Tensor:
    """What makes a float16 gradient large: a power of two, so that nothing is rounded when it is taken back."""
    return _HALF_SCALE * torch.where(share == 0.0, 1.0, torch.exp2(-torch.floor(torch.log2(share))))


@_linear_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, reduction, _, _, _, _, _, _, _, _, _, _, return_stats, needs = rest
    dtype, rows = accumulator(hidden.dtype), hidden.shape[0]
    per_row = reduction == 0
    needs_hidden, needs_weight, needs_bias = (need and not per_row for need in needs[:3])
    return (
        hidden.new_empty(rows if per_row else (), dtype=dtype),
        hidden.new_empty((3, rows) if return_stats else (0,), dtype=dtype),
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0, dtype=dtype),
        torch.empty_like(weight, dtype=dtype) if needs_weight else hidden.new_empty(0, dtype=dtype),
        hidden.new_empty(weight.shape[0] if needs_bias else 0, dtype=dtype),
        hidden.new_empty(rows if needs[3] else 0, dtype=dtype),
    )


# ---------------------------------------------------------------------------------------------------------
# Backward


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, y, tau, class_weight, margins, *numbers = inputs
    _, reports, *gradients = output
    ctx.save_for_backward(hidden, weight, bias, y, tau, class_weight, margins, *gradients)
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(reports, *gradients)


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(ctx.numbers)
    if upstream is None:
        return (None,) * 7 + nothing
    hidden, weight, bias, y, tau, class_weight, margins, *gradients = ctx.saved_tensors
    tau_value, *codes, logit_scale, softcap, memory_budget, backend, group, first_class, _, needs = ctx.numbers
    spec = spec_of_codes(*codes)
    layer = Layer(hidden, weight, bias, logit_scale, softcap or None, _shard(group, first_class, weight.shape[0]))
    target = Target(y, tau_value if tau is None else tau, class_weight, margins, spec)
    if torch.is_grad_enabled() and not watches_operators():
        if layer.shard is not None:
            raise RuntimeError(NO_SECOND_DERIVATIVES)
        found = _differentiable(layer, target, upstream, needs, backend or None)
    elif spec.reduction == "none":
        inputs = (hidden, weight, bias, y, tau, class_weight, margins, tau_value, *codes)
        options = (logit_scale, softcap, memory_budget, backend, group, first_class)
        later = _linear_loss_backward(upstream, *inputs, *options, needs[:3])
        found = [gradient if need else None for gradient, need in zip(later, needs[:3], strict=True)]
        found.append(_tau_gradient(gradients[3] * upstream, tau) if needs[3] else None)
    else:
        found = _scaled_gradients(gradients, upstream, layer, target, needs)
    return found[0], found[1], found[2], None, found[3], None, None, *nothing


_linear_loss.register_autograd(_backward, setup_context=_save)


def _scaled_gradients(
    gradients: Sequence[Tensor], upstream: Tensor, layer: Layer, target: Target, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Those of the forward pass times upstream; they are handed over where nobody asks for them again."""
    factor = upstream
    if layer.hidden.dtype == torch.float16:
        factor = upstream / _range(_share(target, upstream.dtype))
    keep = watches_operators() or torch._C._autograd._get_current_graph_task_keep_graph()
    dtypes = (layer.hidden.dtype, layer.weight.dtype, layer.weight.dtype)
    found: list[Tensor | None] = [
        _scaled(gradient, factor, dtype, keep) if need else None
        for gradient, dtype, need in zip(gradients, dtypes, needs, strict=False)
    ]
    tau = target.tau
    found.append(_tau_gradient(gradients[3] * upstream, tau) if needs[3] and isinstance(tau, Tensor) else None)
    return found


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
    if watches_operators():
        return (gradient * factor).to(dtype)
    is_one = factor.device.type == "cpu" and factor.item() == 1.0
    if gradient.dtype == dtype and not keep:
        return gradient if is_one else gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _tau_gradient(rows: Tensor, tau: Tensor) -> Tensor:
    return (rows.sum() if tau.dim() == 0 else rows).to(dtype=tau.dtype, device=tau.device)


def _differentiable(
    layer: Layer, target: Target, upstream: Tensor, needs: Sequence[bool], backend: str | None
) -> list[Tensor | None]:
    loss, _ = through_logits(layer, target, False, backend)
    every = (layer.hidden, layer.weight, layer.bias, target.tau)
    inputs = [x for x, need in zip(every, needs, strict=True) if need and isinstance(x, Tensor)]
    found = iter(torch.autograd.grad(loss, inputs, upstream, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needs]


@custom_op("drsl_kernels::linear_loss_backward", mutates_args=())
def _linear_loss_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    tau: Tensor | None,
    class_weight: Tensor | None,
    margins: Tensor | None,
    tau_value: float,
    truth: int,
    q: float,
    distance: int,
    scale: float,
    margin: float,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    soft: bool,
    threshold: float,
    activation: int,
    logit_scale: float,
    softcap: float,
    memory_budget: int,
    backend: str,
    group: str,
    first_class: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of losses per row to hidden, weight and bias, of no element where one is not wanted."""
    spec = spec_of_codes(
        truth, q, distance, scale, margin, ignore_index, reduction, label_smoothing, soft, threshold, activation
    )
    layer = Layer(hidden, weight, bias, logit_scale, softcap or None, _shard(group, first_class, weight.shape[0]))
    target = Target(y, tau_value if tau is None else tau, class_weight, margins, spec)
    rows_at_a_time = chunk_rows(layer, memory_budget or None, True)
    found = run(
        layer,
        target,
        (upstream * logit_scale).contiguous(),
        Needs(needs[0], needs[1], needs[2], False),
        with_reports=False,
        rows_at_a_time=rows_at_a_time,
        backend=backend or None,
    )
    parts = (found.hidden, found.weight, found.bias)
    gradients = [hidden.new_empty(0) if x is None else x.to(hidden.dtype) for x in parts]
    return gradients[0], gradients[1], gradients[2]


@_linear_loss_backward.register_fake
def _(upstream: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs_hidden, needs_weight, needs_bias = rest[-1]
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs_weight else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0] if needs_bias else 0),
    )
