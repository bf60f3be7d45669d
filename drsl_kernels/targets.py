"""Class probabilities as target, in the form that the kernels take: a class per row, and a weight per class of a row.

The loss sum_k w_k q_k (-log p_k) needs no label, but statistics leave one class out. Any class may stand for it; the
one with the largest probability keeps the gradient precise. Relies on `spec`; `functional` and `reference` rely on it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import class_dim

__all__ = ["SoftTarget", "soft_target"]


class SoftTarget(NamedTuple):
    """A target of class probabilities q.

    Attributes:
        labels: int64, the likeliest class of each row, in the shape of the logits without their class dimension.
        weights: w_k ((1 - e) q_k + e / C) in the dtype of the statistics, shape (rows, C), contiguous.
        tau: tau times the row's class weight, sum_k w_k q_k: without class weights tau itself.
    """

    labels: Tensor
    weights: Tensor
    tau: Tensor | float


def soft_target(
    logits: Tensor, q: Tensor, tau: Tensor | float, weight: Tensor | None, label_smoothing: float
) -> SoftTarget:
    """Take probabilities `q`, of the shape of the logits, apart. The arguments are checked already."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    at = class_dim(logits)
    q = q.movedim(at, -1).to(dtype)
    classes = q.shape[-1]
    masked = logits.detach().movedim(at, -1) == -torch.inf
    if classes > 0:
        labels = q.detach().masked_fill(masked & (q.detach() == 0.0), -torch.inf).argmax(-1)
    else:
        labels = q.new_zeros(q.shape[:-1], dtype=torch.int64)
    weights = q
    if label_smoothing > 0.0:
        # Masked classes do not exist, so nothing is spread over them.
        even = (~masked).to(dtype) / (~masked).sum(-1, keepdim=True).clamp(min=1)
        weights = (1.0 - label_smoothing) * q + label_smoothing * even
    if weight is not None:
        weight = weight.detach().to(dtype)
        weights = weights * weight
        row_weight = (q * weight).sum(-1)  # not a product of matrices: autocast would round it
        if isinstance(tau, Tensor):
            tau = tau.to(device=q.device, dtype=dtype).reshape(() if tau.dim() == 0 else labels.shape)
        tau = tau * row_weight
    return SoftTarget(labels, weights.reshape(labels.numel(), classes).contiguous(), tau)
