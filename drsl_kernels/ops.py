"""The loss as operators for `torch.compile`: opaque to the compiler, which plans around them from what is said here.

`loss` computes nothing but the loss; `loss_backward` goes over the logits once more, and writes the gradient. So
nothing of the size of the logits is kept between the two, and no gradient is scaled after it was rounded. The kernels
are those of the backend that the tensors' device has when the operator runs.

Relies on `backends`; `functional` calls it where `torch.compile` traces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import reference
from .backends import choose
from .backends.pieces import autograd_inside_an_operator
from .checks import class_dim
from .spec import REDUCTIONS, LossSpec, LossStats, spec_of_codes

__all__ = ["softmax_loss"]


def softmax_loss(
    logits: Tensor,
    y: Tensor,
    tau: Tensor | float,
    weight: Tensor | None,
    spec: LossSpec,
    return_stats: bool,
    margins: Tensor | None = None,
    *,
    backend: str | None,
) -> tuple[Tensor, LossStats | None]:
    """As the backends have it, through the operators."""
    tau_tensor, tau_value = (tau, 0.0) if isinstance(tau, Tensor) else (None, tau)
    if spec.distance is None:
        tau_tensor, tau_value = None, 0.0
    value, stats = loss(logits, y, weight, margins, tau_tensor, tau_value, *spec.codes, return_stats, backend or "")
    if not return_stats:
        return value, None
    cross_entropy, distance, margin = stats.unbind(0)
    return value, LossStats(cross_entropy, distance, margin, margin > 0)


@custom_op("drsl_kernels::loss", mutates_args=())
def loss(
    logits: Tensor,
    y: Tensor,
    weight: Tensor | None,
    margins: Tensor | None,
    tau: Tensor | None,
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
    return_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss, and what `LossStats` holds of floating numbers, (3, ...): of no element unless asked for."""
    spec = spec_of_codes(
        truth, q, distance, scale, margin, ignore_index, reduction, label_smoothing, soft, threshold, activation
    )
    with torch.no_grad():
        run = choose(logits, backend or None)
        value, stats = run(logits, y, tau_value if tau is None else tau, weight, spec, return_stats, margins)
        if stats is None:
            return value, value.new_empty(0)
        return value, torch.stack(stats[:3]).reshape(3, *_row_shape(logits, y))


@loss.register_fake
def _(
    logits: Tensor,
    y: Tensor,
    weight: Tensor | None,
    margins: Tensor | None,
    tau: Tensor | None,
    tau_value: float,
    *codes: Any,
) -> tuple[Tensor, Tensor]:
    *_, reduction, _, _, _, _, return_stats, _ = codes
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = _row_shape(logits, y)
    value = logits.new_empty(rows if REDUCTIONS[reduction] == "none" else (), dtype=dtype)
    return value, logits.new_empty((3, *rows) if return_stats else (0,), dtype=dtype)


@custom_op("drsl_kernels::loss_backward", mutates_args=())
def loss_backward(
    upstream: Tensor,
    logits: Tensor,
    y: Tensor,
    weight: Tensor | None,
    margins: Tensor | None,
    tau: Tensor | None,
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
    backend: str,
    for_logits: bool,
    for_tau: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients to logits and tau: of no element where none is wanted."""
    spec = spec_of_codes(
        truth, q, distance, scale, margin, ignore_index, reduction, label_smoothing, soft, threshold, activation
    )
    with autograd_inside_an_operator():
        z = logits.detach().requires_grad_(for_logits)
        t = tau if tau is None else tau.detach().requires_grad_(for_tau)
        run = choose(z, backend or None)
        value, _ = run(z, y, tau_value if t is None else t, weight, spec, False, margins)
        wanted = [x for x, is_wanted in ((z, for_logits), (t, for_tau)) if is_wanted and x is not None]
        found = list(torch.autograd.grad(value, wanted, upstream, materialize_grads=True))
    logits_grad = _laid_out_like(logits, found.pop(0)) if for_logits else upstream.new_empty(0)
    tau_grad = _laid_out_like(tau, found.pop(0)) if tau is not None and for_tau else upstream.new_empty(0)
    return logits_grad, tau_grad


@loss_backward.register_fake
def _(
    upstream: Tensor,
    logits: Tensor,
    y: Tensor,
    weight: Tensor | None,
    margins: Tensor | None,
    tau: Tensor | None,
    tau_value: float,
    *codes: Any,
) -> tuple[Tensor, Tensor]:
    *_, for_logits, for_tau = codes
    logits_grad = torch.empty_like(logits) if for_logits else upstream.new_empty(0)
    return logits_grad, torch.empty_like(tau) if for_tau and tau is not None else upstream.new_empty(0)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, y, weight, margins, tau, ctx.tau_value, *codes = inputs
    *ctx.codes, _, ctx.backend = codes
    ctx.save_for_backward(logits, y, weight, margins, tau)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, y, weight, margins, tau = ctx.saved_tensors
    for_logits, for_tau = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    nothing = (None,) * (1 + len(ctx.codes) + 2)
    if upstream is None or not (for_logits or for_tau):
        return None, None, None, None, None, *nothing
    logits_grad, tau_grad = loss_backward(
        upstream, logits, y, weight, margins, tau, ctx.tau_value, *ctx.codes, ctx.backend, for_logits, for_tau
    )
    return logits_grad if for_logits else None, None, None, None, tau_grad if for_tau else None, *nothing


loss.register_autograd(_backward, setup_context=_save_for_backward)


def _save_for_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    upstream, logits, y, weight, margins, tau, ctx.tau_value, *codes = inputs
    *ctx.codes, _, ctx.for_logits, ctx.for_tau = codes
    ctx.save_for_backward(upstream, logits, y, weight, margins, tau)


def _second(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
    """Through the reference."""
    upstream, logits, y, weight, margins, tau = ctx.saved_tensors
    spec = spec_of_codes(*ctx.codes)
    with torch.enable_grad():
        u, z = upstream.detach().requires_grad_(), logits.detach().requires_grad_()
        t = tau if tau is None else tau.detach().requires_grad_()
        value, _ = reference.softmax_loss(z, y, ctx.tau_value if t is None else t, weight, spec, margins=margins)
        pairs = [(z, upstreams[0])] if ctx.for_logits else []
        if ctx.for_tau:
            pairs.append((t, upstreams[1]))
        first = torch.autograd.grad(value, [x for x, _ in pairs], u, create_graph=True, materialize_grads=True)
    inputs = [u, z] if t is None else [u, z, t]
    differentiable = [(g, up) for g, (_, up) in zip(first, pairs, strict=True) if g.requires_grad]
    second = torch.autograd.grad(
        [g for g, _ in differentiable],
        inputs,
        [up for _, up in differentiable],
        materialize_grads=True,
        allow_unused=True,
    )
    nothing = (None,) * (1 + len(ctx.codes) + 3)
    return second[0], second[1], None, None, None, second[2] if t is not None else None, *nothing


loss_backward.register_autograd(_second, setup_context=_save_for_second)


def _row_shape(logits: Tensor, y: Tensor) -> torch.Size:
    """The shape of a value per row."""
    return torch.Size() if class_dim(logits) == 0 else y.shape


def _laid_out_like(tensor: Tensor, grad: Tensor) -> Tensor:
    """`grad` with the strides that the compiler was promised."""
    promised = torch.empty_like(tensor, device="meta")
    if grad.stride() == promised.stride():
        return grad
    return torch.empty_like(tensor).copy_(grad)
