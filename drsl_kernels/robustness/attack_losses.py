"""What attacks ascend: losses of logits by name or by callable, towards any wrong class or towards a given one.

Relies on `drsl_kernels.softmax_loss`, whose gradient stays exact where the model is very sure of itself; `attacks`
relies on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Final, Literal, TypeAlias, cast, get_args

import torch.nn.functional as F
from torch import Tensor

from drsl_kernels import gaussian_mixture_loss, softmax_loss
from drsl_kernels.spec import Truth

from .loss_names import BASELINE, GAUSSIAN, SMOOTHED
from .losses import LARGEST_MARGIN, TrainingLoss

__all__ = ["ATTACK_LOSSES", "AttackLoss", "AttackLossName", "Objective", "margins_of", "objective_of", "per_sample"]

AttackLossName: TypeAlias = Literal["log_odds", "ce", "margin", "dlr"]
AttackLoss: TypeAlias = AttackLossName | Callable[[Tensor, Tensor], Tensor]

# What the attacks' loop needs of a loss: (logits, y, target classes or None) -> (values to ascend, one per sample; is
# the sample still standing?). Without targets a sample stands while its label has the largest logit, a tie not
# counting; with targets, until its target has.
Objective: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]

_RowLoss: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

ATTACK_LOSSES: Final[tuple[str, ...]] = get_args(AttackLossName)

# As in the authors' code: where three logits are equal the ratio stays finite.
_DLR_FLOOR: Final = 1e-12


def objective_of(loss: AttackLoss) -> Objective:
    """The objective of a loss; `pgd` describes the names.

    Raises:
        ValueError: neither a name of `ATTACK_LOSSES` nor a callable.
    """
    if loss == "dlr":
        return _difference_of_logits_ratio
    if loss == "margin":
        return _towards_or_away(_margin)
    if loss in ("log_odds", "ce"):
        return _towards_or_away(partial(_fused, truth=cast(Truth, loss)))
    if callable(loss):
        return _from_callable(loss)
    raise ValueError(f"loss must be one of {', '.join(map(repr, ATTACK_LOSSES))} or a callable, got {loss!r}")


def margins_of(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of the label minus the largest other logit, shape (N,); positive means classified correctly."""
    return _logit_of(logits, y) - _largest_other(logits, y)


def per_sample(loss: TrainingLoss, *, label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """A training loss as something to attack with: (logits (N, C), y (N,)) -> losses (N,), not averaged."""
    smoothing = loss.smoothing(label_smoothing)

    def training(logits: Tensor, y: Tensor) -> Tensor:
        if loss.name in (BASELINE, SMOOTHED):
            return F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
        if loss.name == GAUSSIAN:
            return gaussian_mixture_loss(
                logits,
                y,
                alpha=LARGEST_MARGIN,
                likelihood=loss.tau,
                reduction="none",
                label_smoothing=smoothing,
            )
        losses: Tensor = softmax_loss(logits, y, reduction="none", label_smoothing=smoothing, **loss.arguments())
        return losses

    return training


def _towards_or_away(row_loss: _RowLoss) -> Objective:
    """Away from the label by ascending its loss; towards a target by descending the target's."""

    def objective(logits: Tensor, y: Tensor, targeted: Tensor | None) -> tuple[Tensor, Tensor]:
        if targeted is None:
            return row_loss(logits, y)
        losses, predicted = row_loss(logits, targeted)
        return -losses, ~predicted

    return objective


def _fused(logits: Tensor, y: Tensor, *, truth: Truth) -> tuple[Tensor, Tensor]:
    losses, stats = softmax_loss(logits, y, truth=truth, reduction="none", return_stats=True)
    return losses, stats.correct


def _margin(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    losses = -margins_of(logits, y)
    return losses, losses.detach() < 0


def _difference_of_logits_ratio(logits: Tensor, y: Tensor, targeted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Croce & Hein, arXiv 2003.01690, equations (6) and (7)."""
    least = 3 if targeted is None else 4
    if logits.shape[1] < least:
        with_targets = "" if targeted is None else " with targeted"
        raise ValueError(f"loss 'dlr'{with_targets} needs {least} classes or more, got {logits.shape[1]}")
    top = logits.topk(least, dim=1).values
    if targeted is None:
        losses, standing = _margin(logits, y)
        return losses / (top[:, 0] - top[:, 2] + _DLR_FLOOR), standing
    difference = _logit_of(logits, targeted) - _logit_of(logits, y)
    standing = ~_margin(logits.detach(), targeted)[1]
    return difference / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _DLR_FLOOR), standing


def _from_callable(loss: Callable[[Tensor, Tensor], Tensor]) -> Objective:
    def row_loss(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        losses = loss(logits, y)
        if not isinstance(losses, Tensor):
            raise TypeError(f"loss must return a Tensor, got {type(losses).__name__}")
        if losses.shape != y.shape:
            raise ValueError(
                f"loss must return one value per sample, shape (N,) = {tuple(y.shape)}, got {tuple(losses.shape)}"
            )
        return losses, _margin(logits.detach(), y)[1]

    return _towards_or_away(row_loss)


def _logit_of(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y.unsqueeze(1)).squeeze(1)


def _largest_other(logits: Tensor, y: Tensor) -> Tensor:
    return logits.scatter(1, y.unsqueeze(1), -math.inf).amax(1)
