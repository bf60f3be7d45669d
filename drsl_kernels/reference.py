"""The specification: every loss of the family in plain, differentiable PyTorch.

Written for reading and for truth, not for speed. Gradients come from autograd, so nothing of the kernels'
gradient formulas is shared. Runs on any device, under `torch.compile`, `torch.func` and forward-mode
differentiation, to any order. It is the backend where no compiled one is usable, and what second derivatives
of the compiled ones go through. Relies on `spec`.

Plain numbers do not become tensors here, not even in gradients (`masked_fill`, not `torch.where`): those would be real
ones among fake tensors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .checks import check_tensors, class_dim
from .spec import LossSpec, LossStats
from .targets import soft_target

__all__ = ["RowStats", "distance", "row_stats", "sigsoftmax_logits", "softmax_loss", "truth"]


class RowStats(NamedTuple):
    """The statistics of a row z with label y that every loss is a function of. R is {k != y, z_k > -inf}.

    Attributes:
        delta: log sum_R exp(z_k) - (scale*z_y - margin). -inf stands for "R is empty" and is stored as 0.
        rho: sum_R r_k^2, with r = softmax over R.
        kappa: log sum_R exp(z_k) - mean_R z.
        variance: sum_R (z_k - mean_R z)^2.
        depth: max_R z - mean_R z.
        log_total: log sum_R exp(z_k - max_R z).
        rest: number of classes in R.
        margin: z_y - max_R z.
        label: z_y.
    """

    delta: Tensor
    rho: Tensor
    kappa: Tensor
    variance: Tensor
    depth: Tensor
    log_total: Tensor
    rest: Tensor
    margin: Tensor
    label: Tensor


def softmax_loss(
    logits: Tensor,
    y: Tensor,
    tau: Tensor | float,
    weight: Tensor | None,
    spec: LossSpec,
    return_stats: bool = False,
    margins: Tensor | None = None,
) -> tuple[Tensor, LossStats | None]:
    """The loss that `spec` names, and per-row statistics if asked for.

    Arguments and errors as in `drsl_kernels.softmax_loss`. Class probabilities may come as `y`, or as the parts of
    a `SoftTarget`: then y are its labels and `weight` its weights. `margins` (C,) are the classes' own, in place of
    that of `spec`.
    """
    if not spec.soft or y.is_floating_point():
        check_tensors(logits, y, tau, weight, spec, margins)
    if spec.soft and y.is_floating_point():
        y, weight, tau = soft_target(logits, y, tau, weight, spec.label_smoothing)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits.to(dtype).movedim(class_dim(logits), -1)
    if z.shape[-1] == 0:  # without classes every row must be an ignored one; a class that none has keeps sums defined
        z = torch.cat([z, z.new_zeros(*z.shape[:-1], 1)], -1)
    y = y.to(torch.int64).reshape(z.shape[:-1])
    valid = y != spec.ignore_index
    labels = y.masked_fill(~valid, 0)
    z = z.masked_fill(~valid.unsqueeze(-1), 0.0)
    if spec.activation == "sigsoftmax":
        z = sigsoftmax_logits(z)
    margin = spec.margin if margins is None else margins.detach().to(dtype)[labels]
    stats = row_stats(z, labels, spec.scale, margin)

    row_weight = torch.ones_like(stats.delta)
    if spec.soft:
        assert weight is not None
        loss = _soft_cross_entropy(z, labels, weight.reshape(*labels.shape, weight.shape[-1]), stats)
    elif weight is None:
        loss = truth(stats, spec)
    else:
        weight = weight.detach().to(dtype)
        row_weight = weight[labels]
        loss = row_weight * truth(stats, spec)
    cross_entropy = loss if spec.soft else -logsigmoid(-stats.delta)
    if spec.label_smoothing > 0.0 and not spec.soft:
        spread = spec.label_smoothing * _smoothing(z, labels, weight, stats)
        # An infinite loss of which nothing is left is none.
        loss = (1.0 - spec.label_smoothing) * loss + spread if spec.label_smoothing < 1.0 else spread
    if spec.distance is not None and (isinstance(tau, Tensor) or tau != 0):
        tau = (
            tau.to(device=z.device, dtype=dtype).reshape(() if tau.dim() == 0 else y.shape)
            if isinstance(tau, Tensor)
            else tau
        )
        strength, penalty = tau * row_weight, distance(stats, spec.distance, spec.soft)
        loss = loss + strength * penalty.masked_fill((strength == 0.0) & penalty.isinf(), 0.0)  # 0 * inf is no penalty
    loss = _defined(loss, stats, spec).masked_fill(~valid, 0.0)

    details = _loss_stats(stats, cross_entropy, valid, spec) if return_stats else None
    if spec.reduction == "none":
        return loss, details
    if spec.reduction == "sum":
        return loss.sum(), details
    return loss.sum() / row_weight.masked_fill(~valid, 0.0).sum(), details


def row_stats(z: Tensor, y: Tensor, scale: float = 1.0, margin: Tensor | float = 0.0) -> RowStats:
    """Statistics of rows `z` of shape (..., C) with labels `y` of shape (...)."""
    rest = _rest_of(z, y)
    count = rest.sum(-1).to(z.dtype)
    label = z.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    label = label.masked_fill(label == torch.inf, torch.nan)

    top = z.masked_fill(~rest, -torch.inf).amax(-1).detach()
    shift = top.masked_fill(count == 0, 0.0).unsqueeze(-1)
    below = (z - shift).masked_fill(~rest, 0.0)  # 0 or less; a constant added to the row cancels here
    exps = below.exp().masked_fill(~rest, 0.0)
    total = exps.sum(-1).masked_fill(count == 0, 1.0)
    log_total = total.log()
    delta = ((shift.squeeze(-1) - scale * label + margin) + log_total).masked_fill(count == 0, 0.0)
    # A loss that is linear in delta would have a finite gradient where delta is NaN.
    delta = delta * torch.ones_like(delta).masked_fill(delta.isnan(), torch.nan)
    depth = -below.sum(-1) / count.clamp(min=1.0)
    from_mean = (below + depth.unsqueeze(-1)).masked_fill(~rest, 0.0)
    return RowStats(
        delta=delta,
        rho=(exps / total.unsqueeze(-1)).square().sum(-1),
        kappa=depth + log_total,
        variance=from_mean.square().sum(-1),
        depth=depth,
        log_total=log_total,
        rest=count,
        margin=(label - top).masked_fill(delta.isnan(), torch.nan),
        label=label,
    )


def sigsoftmax_logits(z: Tensor) -> Tensor:
    """u = z + log sigmoid(z), whose softmax is exp(z) sigmoid(z), normalised. -inf stays -inf."""
    return z + logsigmoid(z)


def truth(stats: RowStats, spec: LossSpec) -> Tensor:
    """The truth term T(delta) per row: how badly the label does against all other classes."""
    cross_entropy = -logsigmoid(-stats.delta)
    if spec.truth == "ce":
        return cross_entropy
    if spec.truth == "gce":
        # Each branch has the exact gradient where the other's is lost: expm1 for hard rows, exp for easy ones.
        if spec.threshold > 0.0:
            cross_entropy = cross_entropy.clamp(max=-math.log(spec.threshold))
        log_power = -spec.q * cross_entropy
        return _where(log_power < -1.0, 1.0 - log_power.exp(), -log_power.expm1()) / spec.q
    if spec.truth == "mae":
        return 2.0 * _sigmoid(stats.delta)
    if spec.truth == "log_odds":
        return stats.delta
    raise NotImplementedError(f"truth {spec.truth!r} has no formula here")


def distance(stats: RowStats, name: str, soft: bool = False) -> Tensor:
    """The distance D per row: how far the softmax is from spreading evenly. With `soft` no class is a label."""
    n = stats.rest.clamp(min=1.0)
    p, w = _sigmoid(-stats.delta), _sigmoid(stats.delta)
    if name == "uniform":
        return p.square() + w.square() * stats.rho - 1.0 / (n + 1.0)
    if name == "non_target":
        return w.square() * (stats.rho - 1.0 / n)
    if name == "non_target_logits":
        return stats.variance
    if name == "conditional":
        return stats.rho - 1.0 / n
    if soft:
        # mean over all classes of -log p_k, which is softplus(delta) for one and lse - z_k on average for the others
        others = n * (stats.kappa - logsigmoid(stats.delta))
        return (others - logsigmoid(-stats.delta)) / (n + 1.0) - (n + 1.0).log()
    return stats.kappa - n.log()


def _smoothing(z: Tensor, y: Tensor, weight: Tensor | None, stats: RowStats) -> Tensor:
    """mean_k weight_k * -log softmax(z)_k, over the label and the rest."""
    weights = torch.ones_like(z) if weight is None else weight.expand_as(z)
    return _weighted_cross_entropy(z, y, weights, _rest_of(z, y), stats) / (stats.rest + 1.0)


def _soft_cross_entropy(z: Tensor, y: Tensor, weights: Tensor, stats: RowStats) -> Tensor:
    """sum_k weight_k * -log softmax(z)_k: infinite where a masked class has a weight."""
    weights = weights if weights.shape[-1] > 0 else weights.new_zeros(z.shape)
    others = ~_is_label(z, y) & ((z != -torch.inf) | (weights != 0.0))
    return _weighted_cross_entropy(z, y, weights, others, stats)


def _weighted_cross_entropy(z: Tensor, y: Tensor, weights: Tensor, others: Tensor, stats: RowStats) -> Tensor:
    """sum_k weights_k * -log softmax(z)_k, over the label and what `others` is true for."""
    label_term = -logsigmoid(-stats.delta)
    # -log softmax(z)_k = (log-sum-exp of the rest - M) + (M - z_k) + softplus(-delta), or z_y - z_k without a rest
    alone = stats.rest == 0
    top = z.masked_fill(~_rest_of(z, y), -torch.inf).amax(-1).detach().masked_fill(alone, 0.0)
    level = _where(alone, stats.label, stats.log_total - logsigmoid(stats.delta))
    # Both factors of what is left out are set to 0: it must not come back as 0 * inf in a gradient.
    costs = (level.unsqueeze(-1) + (top.unsqueeze(-1) - z)).masked_fill(~others, 0.0)
    label_weight = weights.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    label_term = label_term.masked_fill((label_weight == 0.0) & label_term.isinf(), 0.0)
    return label_weight * label_term + (weights.masked_fill(~others, 0.0) * costs).sum(-1)


def _where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return x.masked_fill(~condition, 0.0) + y.masked_fill(condition, 0.0)


def _sigmoid(x: Tensor) -> Tensor:
    """sigmoid with a gradient that is exact where it is near 1, too: sigmoid(x) * sigmoid(-x)."""
    return logsigmoid(x).exp()


def _is_label(z: Tensor, y: Tensor) -> Tensor:
    numbers = y.new_ones(z.shape[-1]).cumsum(0) - 1  # torch.arange would make a real tensor among fake ones
    return numbers == y.unsqueeze(-1)


def _rest_of(z: Tensor, y: Tensor) -> Tensor:
    return ~_is_label(z, y) & (z != -torch.inf)


def _defined(loss: Tensor, stats: RowStats, spec: LossSpec) -> Tensor:
    """A row without a rest has loss 0 (NaN if its label is not finite), but for probabilities of masked classes."""
    alone = loss.masked_fill(loss.isfinite(), 0.0) if spec.soft else torch.zeros_like(loss)
    alone = alone.masked_fill(~stats.label.isfinite(), torch.nan)
    return _where(stats.rest > 0, loss, alone)


def _loss_stats(stats: RowStats, cross_entropy: Tensor, valid: Tensor, spec: LossSpec) -> LossStats:
    ce = _defined(cross_entropy, stats, spec)
    dist = _defined(distance(stats, spec.distance or "uniform", spec.soft), stats, spec)
    cross_entropy, dist, margin = (t.masked_fill(~valid, 0.0).detach() for t in (ce, dist, stats.margin))
    return LossStats(cross_entropy, dist, margin, margin > 0)
