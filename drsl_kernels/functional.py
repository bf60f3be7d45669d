"""The public functions. Each picks a backend and hands it a validated `LossSpec`.

Relies on `spec` and `backends`; `modules` and `robustness` rely on it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import ops, reference
from .backends import Backend, choose, is_compiled
from .checks import check_tensors, class_dim
from .spec import (
    DISTANCES,
    Activation,
    BackendName,
    Distance,
    LossSpec,
    LossStats,
    Reduction,
    Truth,
    cached_loss_spec,
    loss_spec,
    number,
)
from .targets import soft_target

__all__ = ["family_loss", "fused_drsl_loss", "softmax_loss"]


@overload
def fused_drsl_loss(
    logits: Tensor,
    y: Tensor,
    tau: Tensor | float,
    *,
    distance: Distance = ...,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    return_stats: Literal[False] = ...,
    backend: BackendName | None = ...,
) -> Tensor: ...
@overload
def fused_drsl_loss(
    logits: Tensor,
    y: Tensor,
    tau: Tensor | float,
    *,
    distance: Distance = ...,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    return_stats: Literal[True],
    backend: BackendName | None = ...,
) -> tuple[Tensor, LossStats]: ...
@overload
def fused_drsl_loss(
    logits: Tensor,
    y: Tensor,
    tau: Tensor | float,
    *,
    distance: Distance = ...,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    return_stats: bool = ...,
    backend: BackendName | None = ...,
) -> Tensor | tuple[Tensor, LossStats]: ...
def fused_drsl_loss(
    logits: Tensor,
    y: Tensor,
    tau: Tensor | float,
    *,
    distance: Distance = "uniform",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    return_stats: bool = False,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Cross-entropy plus tau times the distance of the softmax from uniform.

    .. math:: L = w_y \left( -\log p_y + \tau D \right), \qquad p = \mathrm{softmax}(z)

    With n = C - 1 wrong classes, r the softmax over the wrong classes alone and sums over k != y, D is

    ===================== ========================================= =============================================
    ``uniform``           sum_all (p_k - 1/C)^2                     the whole softmax to uniform
    ``non_target``        sum (p_k - (1 - p_y)/n)^2                 the wrong classes' share, evenly spread
    ``non_target_logits`` sum (z_k - mean z)^2                      the wrong logits; the authors' published code
    ``conditional``       sum (r_k - 1/n)^2                         does not vanish as p_y -> 1
    ``kl``                KL(uniform || r) = mean(-log r_k) - log n
    ===================== ========================================= =============================================

    The authors' code sums its penalty over the batch with weight b; with reduction="mean" that is
    tau = b * batch size for ``non_target_logits`` (0.001 * 128 = 0.128).

    Replaces ``F.cross_entropy(logits, y)``, which is tau = 0. Loss and label gradient keep full relative
    precision on saturated rows (losses far below 1e-7), where ``F.cross_entropy`` returns 0.

    With class probabilities q as y, the loss of a row is

    .. math:: L = \sum_k w_k q_k (-\log p_k) + \tau D \sum_k w_k q_k

    (without class weights :math:`-\sum_k q_k \log p_k + \tau D`), the mean is that over rows, and ``kl`` is
    KL(uniform || p) over all classes. A row of q should sum to 1; as in ``F.cross_entropy``, that is not checked.
    Probability of a class at -inf is an infinite loss, with the finite gradient p_k sum_j w_j q_j - w_k q_k. q is
    differentiable, too; where it requires grad, the slower reference computes the loss. The result is float32 for
    float32 logits, whatever the dtype of q.

    Args:
        logits: shape (C,), (N, C) or (N, C, d1, ...); float32, float64, bfloat16 or float16; any strides.
            Never written. Classes at -inf are left out of p, r, n and C and get gradient 0.
        y: class indices in [0, C), int64 (or uint8), of the shape of logits without its class dimension; or class
            probabilities, floating and of the shape of logits, as mixup and CutMix make them.
        tau: weight of the distance: a float, a tensor of shape (), or one value per row (a tensor of the shape of
            logits without its class dimension). Differentiable when it requires grad. Inside ``torch.compile`` give
            a tau that changes as a tensor: each new float compiles anew, until torch's limit of recompilations.
        distance: which D. With class probabilities ``uniform`` or ``kl``.
        weight: weight w of each class, shape (C,), applied to the whole row. No gradient flows to it.
        ignore_index: rows with this label have loss and gradient 0 and do not count in the mean.
        reduction: "mean" (over the weights of the rows that count, as in F.cross_entropy), "sum" or "none".
        label_smoothing: in [0, 1], as in F.cross_entropy.
        return_stats: return (loss, LossStats) instead of the loss alone.
        backend: None chooses. "cpp", "triton", "cuda" or "reference" forces one.

    Returns:
        The loss: a scalar, or one value per row for reduction="none". float64 for float64 logits, else float32.
        With return_stats, a pair of it and `LossStats`.

    Raises:
        ValueError: unknown distance, reduction or backend; tau not finite or of a wrong shape; batch sizes
            of logits and y differ.
        IndexError: a label outside [0, C) (on the CPU; the message names row and value).
        RuntimeError: other shapes, y of a wrong dtype, tensors on different devices, label_smoothing outside
            [0, 1], class probabilities with an ignore_index that is not negative, a forced backend that is not usable.
        NotImplementedError: logits of another dtype.
        TypeError: something that should be a tensor or a number is not.

    Source: Wang et al., arXiv 2303.12363; ``conditional`` and ``kl`` are this project's own.
    """
    if distance is None:  # what softmax_loss takes for "no penalty" is a mistake here
        raise ValueError(f"distance must be one of {', '.join(map(repr, DISTANCES))}, got None")
    member = ("ce", 0.7, distance, 1.0, 0.0, ignore_index, reduction, label_smoothing, 0.0, "softmax")
    return family_loss(logits, y, tau, weight, None, member, return_stats, backend)


@overload
def softmax_loss(
    logits: Tensor,
    y: Tensor,
    *,
    truth: Truth = ...,
    q: float = ...,
    threshold: float = ...,
    distance: Distance | None = ...,
    tau: Tensor | float = ...,
    margin: Tensor | float = ...,
    scale: float = ...,
    activation: Activation = ...,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    return_stats: Literal[False] = ...,
    backend: BackendName | None = ...,
) -> Tensor: ...
@overload
def softmax_loss(
    logits: Tensor,
    y: Tensor,
    *,
    truth: Truth = ...,
    q: float = ...,
    threshold: float = ...,
    distance: Distance | None = ...,
    tau: Tensor | float = ...,
    margin: Tensor | float = ...,
    scale: float = ...,
    activation: Activation = ...,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    return_stats: Literal[True],
    backend: BackendName | None = ...,
) -> tuple[Tensor, LossStats]: ...
@overload
def softmax_loss(
    logits: Tensor,
    y: Tensor,
    *,
    truth: Truth = ...,
    q: float = ...,
    threshold: float = ...,
    distance: Distance | None = ...,
    tau: Tensor | float = ...,
    margin: Tensor | float = ...,
    scale: float = ...,
    activation: Activation = ...,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    return_stats: bool = ...,
    backend: BackendName | None = ...,
) -> Tensor | tuple[Tensor, LossStats]: ...
def softmax_loss(
    logits: Tensor,
    y: Tensor,
    *,
    truth: Truth = "ce",
    q: float = 0.7,
    threshold: float = 0.0,
    distance: Distance | None = None,
    tau: Tensor | float = 0.0,
    margin: Tensor | float = 0.0,
    scale: float = 1.0,
    activation: Activation = "softmax",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    return_stats: bool = False,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""The general member of the family: a truth term plus tau times a distance.

    .. math:: L = w_y \left( T(\delta) + \tau D \right), \qquad
              \delta = \log \sum_{k \ne y} e^{z_k} - (s z_y - m)

    with scale s, margin m and p_y = sigmoid(-delta). T is

    ============= =============================== ============================================================
    ``ce``        log(1 + exp(delta)) = -log p_y   cross-entropy
    ``gce``       (1 - p_y^q) / q                  generalized cross-entropy, Zhang & Sabuncu 2018
    ``mae``       2 (1 - p_y)                      mean absolute error of the softmax against the one-hot label
    ``log_odds``  delta                            never saturates: the loss to attack with
    ============= =============================== ============================================================

    With activation="sigsoftmax" all of this is of logits :math:`u_k = z_k + \log \sigma(z_k)` in place of z, whose
    softmax is sigsoftmax(z), normalised :math:`e^{z_k} \sigma(z_k)` (Kanai et al. 2018).

    Args:
        truth: which T.
        q: exponent of ``gce``, in (0, 1] (no less than 1e-30).
        threshold: of the truncated ``gce``, in [0, 1): where p_y is below it, T stays as it is there, (1 - threshold^q)
            / q, and has no gradient. 0 for none.
        distance: which D, see `fused_drsl_loss`; None for none, and then tau is not used.
        margin: m, subtracted from the label's logit: a number, or one per class, of shape (C,), of which each row takes
            that of its label. No gradient flows to it.
        scale: s > 0, multiplies the label's logit.
        activation: "softmax" or "sigsoftmax". u is finite where 2 z is.

    The other arguments, the result and the errors are those of `fused_drsl_loss`. `label_smoothing` is defined
    for ``ce`` alone, `threshold` for ``gce`` alone: with another truth each must be 0, else ValueError.
    """
    margin, margins = (0.0, margin) if isinstance(margin, Tensor) else (margin, None)
    member = (truth, q, distance, scale, margin, ignore_index, reduction, label_smoothing, threshold, activation)
    return family_loss(logits, y, tau, weight, margins, member, return_stats, backend)


def family_loss(
    logits: Tensor,
    y: Tensor,
    tau: Tensor | float,
    weight: Tensor | None,
    margins: Tensor | None,
    member: tuple[Any, ...],
    return_stats: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, LossStats]:
    """`member`: the arguments of `loss_spec` but for `soft`."""
    if type(tau) is not float and not isinstance(tau, Tensor):
        tau = number("tau", tau)
    if not isinstance(return_stats, bool):
        raise TypeError(f"return_stats must be a bool, got {return_stats!r}")
    soft = isinstance(y, Tensor) and y.is_floating_point()
    compiling = torch.compiler.is_compiling()
    arguments = (*member, soft)
    spec = loss_spec(*arguments) if compiling else cached_loss_spec(*arguments)
    if compiling and is_compiled(logits, backend):
        if not soft:
            check_tensors(logits, y, tau, weight, spec, margins)
        chosen: Backend = partial(ops.softmax_loss, backend=backend)
    else:
        chosen = choose(logits, backend)
    if soft and margins is not None:
        check_tensors(logits, y, tau, weight, spec, margins)  # says that it is not for probabilities
    if soft:
        loss, stats = _soft_loss(chosen, logits, y, tau, weight, spec, return_stats)
    else:
        loss, stats = chosen(logits, y, tau, weight, spec, return_stats, margins)
    return loss if stats is None else (loss, stats)


def _soft_loss(
    backend: Backend,
    logits: Tensor,
    y: Tensor,
    tau: Tensor | float,
    weight: Tensor | None,
    spec: LossSpec,
    return_stats: bool,
) -> tuple[Tensor, LossStats | None]:
    """With class probabilities as `y`. The kernels give no gradient to them, so where one is wanted they do not run."""
    if backend is reference.softmax_loss or (y.requires_grad and torch.is_grad_enabled()):
        return reference.softmax_loss(logits, y, tau, weight, spec, return_stats)
    check_tensors(logits, y, tau, weight, spec)
    if logits.shape[class_dim(logits)] == 0:  # no class that could stand for the label
        return reference.softmax_loss(logits, y, tau, weight, spec, return_stats)
    target = soft_target(logits, y, tau, weight, spec.label_smoothing)
    return backend(logits, target.labels, target.tau, target.weights, spec, return_stats, None)
