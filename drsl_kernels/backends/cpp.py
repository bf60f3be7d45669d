"""The compiled extension as a backend: one call of a dispatcher operator, autograd node in C++ (csrc/ops.cpp).

The device of the logits decides whether the kernels of csrc/cpu/ (backend "cpp") or of csrc/cuda/ (backend "cuda") run.
Relies on the extension that `_build` loads; `backends.choose` hands it out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference_op  # noqa: F401  (registers what csrc/ops.cpp calls)
from ..spec import LossSpec, LossStats, check_tensors


def softmax_loss(
    logits: Tensor,
    y: Tensor,
    tau: Tensor | float,
    weight: Tensor | None,
    spec: LossSpec,
    return_stats: bool = False,
    operator: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, LossStats | None]:
    """The loss that `spec` names, and per-row statistics if asked for. Tests name another `operator`."""
    if operator is None:
        operator = torch.ops.drsl_kernels.softmax_loss.default
    tau_tensor, tau_value = (tau, 0.0) if isinstance(tau, Tensor) else (None, tau)
    try:
        loss, stats = operator(
            logits,
            y,
            weight,
            tau_tensor,
            tau_value,
            *spec.codes,
            return_stats,
        )
    except (RuntimeError, ValueError, IndexError, TypeError):
        # The operator only detects; the words, with argument and value, are in one place.
        if not spec.soft:  # of class probabilities only the parts arrive here; they are checked before
            check_tensors(logits, y, tau, weight, spec)
        raise
    if not return_stats:
        return loss, None
    cross_entropy, distance, margin = stats.unbind(0)
    return loss, LossStats(cross_entropy, distance, margin, margin > 0)


def capability() -> str:
    """The instruction set that the kernels run with: "avx512", "avx2" or "baseline"."""
    name: str = torch.ops.drsl_kernels.cpu_capability()
    return name
