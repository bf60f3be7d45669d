"""The Triton kernels for whoever composes the loss: gradients over the logits, statistics of some classes.

Relies on launch.py; `backends.choose_pieces` hands it out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...spec import LossSpec
from ..pieces import Losses, Pieces, Shard
from . import on_device
from .launch import SAVED, Task, run, run_stats

__all__ = ["PIECES"]


def _over_logits(
    logits: Tensor,
    y: Tensor,
    tau: Tensor | float,
    weight: Tensor | None,
    margins: Tensor | None,
    spec: LossSpec,
    *,
    upstream: Tensor | None,
    with_tau: bool,
    with_reports: bool,
    shard: Shard | None = None,
) -> Losses:
    acc = _accumulator(logits)
    rows = y.numel()

    def ready(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().to(device=logits.device, dtype=acc).contiguous()

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=acc, device=logits.device)

    task = Task(
        logits=logits,
        labels=y.to(torch.int64).contiguous(),
        weight=ready(weight),
        margins=ready(margins),
        tau=ready(tau) if isinstance(tau, Tensor) and spec.distance is not None else None,
        tau_value=0.0 if isinstance(tau, Tensor) or spec.distance is None else tau,
        spec=replace(spec, reduction="none"),
        distance_code=spec.distance_code or int(with_reports),  # `uniform` is what is reported of a loss without one
        upstream=ready(upstream),
        grad=None if upstream is None else logits,
        row_losses=empty(rows),
        reports=empty(3, rows) if with_reports else None,
        tau_grad=empty(rows) if with_tau else None,
    )
    if shard is not None:
        task.saved, task.saved_known = ready(shard.stats), True
        task.label_logits = ready(shard.label_logits)
    else:
        task.label_logits = _label_logits(logits, task.labels)
    if logits.numel() > 0:
        with on_device(logits):
            run(task)
    assert task.row_losses is not None
    return Losses(task.row_losses, task.tau_grad, task.reports)


def _label_logits(logits: Tensor, y: Tensor) -> Tensor:
    """Read before the gradient takes their place. NaN for a label that is no class."""
    is_class = (y >= 0) & (y < logits.shape[1])
    found = logits.gather(1, y.masked_fill(~is_class, 0).unsqueeze(1)).squeeze(1)
    return found.to(_accumulator(logits)).masked_fill(~is_class, torch.nan)


def _row_stats(logits: Tensor, y: Tensor, spec: LossSpec) -> Tensor:
    stats = torch.empty(y.numel(), 1, SAVED, dtype=_accumulator(logits), device=logits.device)
    task = Task(logits.contiguous(), y.to(torch.int64).contiguous(), None, None, 0.0, spec, spec.distance_code or 1)
    task.saved = stats
    with on_device(logits):
        run_stats(task)
    return stats.squeeze(1)


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


PIECES = Pieces(_over_logits, _row_stats)
