"""What a loss costs: seconds per training epoch, measured side by side with `F.cross_entropy`.

Relies on `train`; `experiment` relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch
from torch import Tensor, nn

from .losses import BASELINE, TrainingLoss
from .train import Recipe, make_optimizer, train_epoch

__all__ = ["ROUNDS", "EpochTime", "time_epochs"]

ROUNDS: Final = 20


@dataclass(frozen=True)
class EpochTime:
    """Median seconds per epoch, and the median of its ratio to `F.cross_entropy` in the same round."""

    seconds: float
    ratio: float


def time_epochs(
    losses: Sequence[TrainingLoss],
    make_model: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    *,
    rounds: int = ROUNDS,
) -> dict[TrainingLoss, EpochTime]:
    """Time whole training epochs (model, loss, optimizer, log), one epoch of every loss per round.

    Turns are taken, and the first turn moves on from round to round, so that whatever else the machine does
    falls on all losses alike. One round before the first is not counted. Cross-entropy takes part always.
    """
    contestants = list(dict.fromkeys([TrainingLoss(BASELINE), *losses]))
    models = {loss: make_model().to(x.device) for loss in contestants}
    optimizers = {loss: make_optimizer(models[loss], recipe) for loss in contestants}
    seconds: dict[TrainingLoss, list[float]] = {loss: [] for loss in contestants}
    for turn in range(rounds + 1):
        first = turn % len(contestants)
        for loss in contestants[first:] + contestants[:first]:
            generator = torch.Generator().manual_seed(turn)
            log = train_epoch(models[loss], x, y, loss, recipe, optimizers[loss], epoch=turn + 1, generator=generator)
            seconds[loss].append(log.seconds)
    baseline = seconds[TrainingLoss(BASELINE)][1:]
    return {
        loss: EpochTime(
            seconds=median(seconds[loss][1:]),
            ratio=median(mine / theirs for mine, theirs in zip(seconds[loss][1:], baseline, strict=True)),
        )
        for loss in losses
    }
