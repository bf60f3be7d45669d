"""What the tests compare with: textbook formulas over the whole softmax, sharing nothing with the package.

`row_losses` is plain PyTorch in whatever dtype it is given: float64 makes it the truth, the dtype of the kernels
makes it the naive formula whose error they must not exceed. Gradients come from autograd. `exact` is the same
in arbitrary precision for rows where float64 is not enough. Relies on torch and mpmath; the test files rely on it.
"""

from __future__ import annotations

import math
from typing import Any

import mpmath
import torch
import torch.nn.functional as F
from torch import Tensor

TRUTHS = ("ce", "gce", "mae", "log_odds")
DISTANCES = ("uniform", "non_target", "non_target_logits", "conditional", "kl")


def row_losses(
    z: Tensor,
    y: Tensor,
    tau: Tensor | float = 0.0,
    *,
    truth: str = "ce",
    q: float = 0.7,
    threshold: float = 0.0,
    distance: str | None = None,
    margin: Tensor | float = 0.0,
    scale: float = 1.0,
    activation: str = "softmax",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of each row of `z`, shape (N, C); 0 where y is ignore_index. Classes at -inf do not exist."""
    if torch.isneginf(z).any():
        columns = [
            torch.ones_like(row, dtype=torch.bool) if label == ignore_index else ~torch.isneginf(row)
            for row, label in zip(z.detach(), y.tolist(), strict=True)
        ]
        taus = tau.expand(len(y)) if isinstance(tau, Tensor) else [tau] * len(y)
        return torch.stack(
            [
                row_losses(
                    row[keep].unsqueeze(0),
                    torch.where(label == ignore_index, label, keep.cumsum(0)[label] - 1).reshape(1),
                    one_tau,
                    truth=truth,
                    q=q,
                    threshold=threshold,
                    distance=distance,
                    margin=margin[keep] if isinstance(margin, Tensor) else margin,
                    scale=scale,
                    activation=activation,
                    weight=None if weight is None else weight[keep],
                    ignore_index=ignore_index,
                    label_smoothing=label_smoothing,
                )[0]
                for row, label, keep, one_tau in zip(z, y, columns, taus, strict=True)
            ]
        )

    classes = z.shape[1]
    counts = y != ignore_index
    labels = torch.where(counts, y, 0)
    one_hot = F.one_hot(labels, classes).bool()
    z = torch.where(counts.unsqueeze(1), z, 0.0)
    u = torch.ones(classes, dtype=z.dtype) if weight is None else weight.to(z.dtype)

    if activation == "sigsoftmax":
        z = z + F.logsigmoid(z)
    own_margin = margin.to(z.dtype)[labels].unsqueeze(1) if isinstance(margin, Tensor) else margin
    shifted = torch.where(one_hot, scale * z - own_margin, z)
    log_p = shifted.log_softmax(1)
    p = shifted.softmax(1)
    wrong_z = z[~one_hot].view(len(z), classes - 1)
    wrong_p = p[~one_hot].view(len(z), classes - 1)

    if truth == "ce":
        smooth = -(u * log_p).sum(1) / classes
        term = (1 - label_smoothing) * u[labels] * -log_p[one_hot] + label_smoothing * smooth
    elif truth == "gce":
        log_p_y = log_p[one_hot] if threshold == 0.0 else log_p[one_hot].clamp(min=math.log(threshold))
        term = u[labels] * (1 - (q * log_p_y).exp()) / q  # p_y^q, with a gradient at p_y = 0 too
    elif truth == "mae":
        term = u[labels] * (p - one_hot.to(p.dtype)).abs().sum(1)
    else:
        term = u[labels] * (wrong_z.logsumexp(1) - shifted[one_hot])

    r = wrong_z.softmax(1)
    n = max(classes - 1, 1)
    penalty = torch.zeros_like(term)
    if distance == "uniform":
        penalty = ((p - 1 / classes) ** 2).sum(1)
    elif distance == "non_target":
        penalty = ((wrong_p - wrong_p.sum(1, keepdim=True) / n) ** 2).sum(1)
    elif distance == "non_target_logits":
        penalty = ((wrong_z - wrong_z.mean(1, keepdim=True)) ** 2).sum(1)
    elif distance == "conditional":
        penalty = ((r - 1 / n) ** 2).sum(1)
    elif distance == "kl":
        penalty = F.kl_div(wrong_z.log_softmax(1), torch.full_like(wrong_z, 1 / n), reduction="none").sum(1)
    tau = tau.to(z.dtype) if isinstance(tau, Tensor) else tau
    return torch.where(counts, term + tau * u[labels] * penalty, 0.0)


def loss_and_gradient(
    z: Tensor,
    y: Tensor,
    tau: Tensor | float = 0.0,
    *,
    reduction: str = "mean",
    upstream: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **arguments: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, gradient to the logits and gradient to tau (None for a float), computed in `dtype`.

    `z` has shape (C,), (N, C) or (N, C, d1, ...). `upstream` multiplies the gradients, default 1.
    """
    z = z.detach().to(dtype).requires_grad_()
    rows = z.unsqueeze(0) if z.dim() == 1 else z.movedim(1, -1).reshape(-1, z.shape[1])
    labels = y.reshape(-1).to(torch.int64)
    if isinstance(tau, Tensor):
        tau = tau.detach().to(dtype).requires_grad_()
    flat_tau = tau.reshape(-1) if isinstance(tau, Tensor) and tau.dim() > 0 else tau
    loss = row_losses(rows, labels, flat_tau, **arguments)
    if reduction == "none":
        loss = loss.reshape(y.shape)
    elif reduction == "sum":
        loss = loss.sum()
    else:
        loss = loss.sum() / denominator(labels, arguments.get("weight"), arguments.get("ignore_index", -100), dtype)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(dtype)
    inputs = [z, tau] if isinstance(tau, Tensor) else [z]
    grads = torch.autograd.grad(loss, inputs, upstream, materialize_grads=True)
    return loss.detach(), grads[0], grads[1] if len(grads) > 1 else None


def denominator(y: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What the mean divides by: the number, or the class weights, of the rows that count."""
    counted = y[y != ignore_index]
    return torch.tensor(len(counted)) if weight is None else weight.to(dtype)[counted].sum()


def exact(
    z: list[float],
    label: int,
    *,
    truth: str = "ce",
    q: float = 0.7,
    distance: str | None = None,
    tau: float = 0.0,
    activation: str = "softmax",
    digits: int = 700,
) -> tuple[mpmath.mpf, list[mpmath.mpf]]:
    """Loss of one row and its gradient to every logit, to far more digits than float64 holds."""
    with mpmath.workdps(digits):
        row = [mpmath.mpf(x) for x in z]

        def loss_at(k: int, x: mpmath.mpf) -> mpmath.mpf:
            changed = [x if i == k else v for i, v in enumerate(row)]
            if activation == "sigsoftmax":
                changed = [v - mpmath.log(1 + mpmath.exp(-v)) for v in changed]
            return _exact_loss(changed, label, truth, q, distance, tau)

        step = mpmath.mpf(10) ** (-digits // 3)
        slopes: dict[tuple[bool, mpmath.mpf], mpmath.mpf] = {}  # equal logits of wrong classes have equal slopes
        for k, x in enumerate(row):
            if (k == label, x) not in slopes:
                slopes[k == label, x] = (loss_at(k, x + step) - loss_at(k, x - step)) / (2 * step)
        return loss_at(0, row[0]), [slopes[k == label, x] for k, x in enumerate(row)]


def _exact_loss(z: list[mpmath.mpf], label: int, truth: str, q: float, distance: str | None, tau: float) -> mpmath.mpf:
    odds = [mpmath.exp(x) for x in z]
    p = [x / mpmath.fsum(odds) for x in odds]
    wrong = [k for k in range(len(z)) if k != label]
    n, p_wrong = len(wrong), mpmath.fsum(p[k] for k in wrong)
    loss = {
        "ce": lambda: -mpmath.log(p[label]),
        "gce": lambda: (1 - p[label] ** mpmath.mpf(q)) / mpmath.mpf(q),
        "mae": lambda: p_wrong + (1 - p[label]),
        "log_odds": lambda: mpmath.log(p_wrong / p[label]),
    }[truth]()
    mean_wrong = mpmath.fsum(z[k] for k in wrong) / n
    penalty = {
        None: lambda: mpmath.mpf(0),
        "uniform": lambda: mpmath.fsum((x - mpmath.mpf(1) / len(z)) ** 2 for x in p),
        "non_target": lambda: mpmath.fsum((p[k] - p_wrong / n) ** 2 for k in wrong),
        "non_target_logits": lambda: mpmath.fsum((z[k] - mean_wrong) ** 2 for k in wrong),
        "conditional": lambda: mpmath.fsum((p[k] / p_wrong - mpmath.mpf(1) / n) ** 2 for k in wrong),
        "kl": lambda: -mpmath.fsum(mpmath.log(n * p[k] / p_wrong) for k in wrong) / n,
    }[distance]()
    return loss + mpmath.mpf(tau) * penalty
