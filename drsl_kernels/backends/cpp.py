"""The compiled extension as a backend: one call of a C++ function, with an autograd node in C++ (csrc/ops.cpp).

The device of the logits decides whether the kernels of csrc/cpu/ (backend "cpp") or of csrc/cuda/ (backend "cuda") run.
Relies on the extension that `_build` loads; `backends.choose` hands it out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, TypeAlias

from torch import Tensor

from .. import reference_op  # noqa: F401  (registers what csrc/ops.cpp calls)
from ..checks import check_tensors
from ..spec import LossSpec, LossStats, SpecCodes
from .pieces import Losses, Pieces, Shard

# (logits, y, weight, margins, tau, codes, return_stats) -> the loss; with return_stats a pair of it and
# statistics, (3, ...)
Function: TypeAlias = Callable[
    [Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | float", SpecCodes, bool], Any
]


def backend(function: Function) -> Callable[..., tuple[Tensor, LossStats | None]]:
    """A backend that calls `function`: that of the extension, or in a test one that does the same."""

    def softmax_loss(
        logits: Tensor,
        y: Tensor,
        tau: Tensor | float,
        weight: Tensor | None,
        spec: LossSpec,
        return_stats: bool = False,
        margins: Tensor | None = None,
    ) -> tuple[Tensor, LossStats | None]:
        """The loss that `spec` names, and per-row statistics if asked for."""
        try:
            result = function(logits, y, weight, margins, tau, spec.codes, return_stats)
        except (RuntimeError, ValueError, IndexError, TypeError):
            # The function only detects; the words, with argument and value, are in one place.
            if not spec.soft:  # of class probabilities only the parts arrive here; they are checked before
                check_tensors(logits, y, tau, weight, spec, margins)
            raise
        if not return_stats:
            return result, None
        loss, stats = result
        cross_entropy, distance, margin = stats.unbind(0)
        return loss, LossStats(cross_entropy, distance, margin, margin > 0)

    return softmax_loss


def pieces(operators: Any) -> Pieces:
    """Over the operators of csrc/pieces.cpp: those of the extension, or in a test others that do the same."""
    return Pieces(partial(_over_logits, operators), partial(_row_stats, operators))


def _over_logits(
    operators: Any,
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
    tau_tensor, tau_value = (tau, 0.0) if isinstance(tau, Tensor) else (None, tau)
    label_logits, stats = (None, None) if shard is None else shard
    with_grad = upstream is not None
    wanted = (with_grad, with_tau, with_reports)
    rows, slopes, reports = operators.loss_over_logits(
        logits, y, weight, margins, tau_tensor, tau_value, *spec.codes, upstream, label_logits, stats, *wanted
    )
    return Losses(rows, slopes if with_tau else None, reports if with_reports else None)


def _row_stats(operators: Any, logits: Tensor, y: Tensor, spec: LossSpec) -> Tensor:
    stats: Tensor = operators.row_stats(logits, y, *spec.codes)
    return stats


def capability() -> str:
    """The instruction set that the kernels run with: "avx512", "avx2" or "baseline"."""
    name: str = import_module("drsl_kernels._C").cpu_capability()
    return name
