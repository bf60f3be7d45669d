"""What a loss costs: seconds of training, measured side by side with `F.cross_entropy`.

Relies on `train`; `experiment` relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch
from torch import Tensor, nn

from .loss_names import BASELINE
from .losses import TrainingLoss
from .train import Recipe, make_optimizer, train_epoch

__all__ = ["ROUNDS", "EpochTime", "Timed", "plan_timing", "time_epochs"]

ROUNDS: Final = 20

_LEAST_ROUNDS: Final = 5
_MOST_BATCHES: Final = 300  # per loss and round
_SECONDS: Final = 60.0  # that timing may take, if a batch or two of each loss and round do


@dataclass(frozen=True)
class EpochTime:
    """Median seconds per epoch, and the median of its ratio to `F.cross_entropy` in the same round."""

    seconds: float
    ratio: float


@dataclass(frozen=True)
class Timed:
    """How much is timed: in each of so many rounds each loss trains on the first `images` of `all_images`."""

    images: int
    all_images: int
    rounds: int

    def in_words(self) -> str:
        if self.images == self.all_images:
            return f"median of {self.rounds} training epochs"
        return f"median of {self.rounds} rounds over {self.images} of {self.all_images} training images, scaled to all"


def plan_timing(
    losses: int,
    make_model: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    device: torch.device | str = "cpu",
) -> Timed:
    """Rounds and images of `time_epochs` for so many losses, so that it takes about a minute where an epoch is long.

    Two batches are trained on the device to tell; the first of them may take longer than others.
    """
    few = min(len(y), 2 * recipe.batch_size)
    some, labels = x[:few].to(device), y[:few].to(device)
    model = make_model().to(device)
    optimizer, order = make_optimizer(model, recipe), torch.Generator().manual_seed(0)
    log = train_epoch(model, some, labels, TrainingLoss(BASELINE), recipe, optimizer, epoch=1, generator=order)
    batch = log.seconds / -(-few // recipe.batch_size)
    affordable = _SECONDS / (batch * (losses + 1))  # batches of each loss, in all rounds together
    rounds = int(min(max(affordable, _LEAST_ROUNDS), ROUNDS))
    batches = int(min(max(affordable / rounds, 1), _MOST_BATCHES))
    return Timed(min(len(y), batches * recipe.batch_size), len(y), rounds)


def time_epochs(
    losses: Sequence[TrainingLoss],
    make_model: Callable[[TrainingLoss], nn.Module],
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    *,
    rounds: int = ROUNDS,
) -> dict[TrainingLoss, EpochTime]:
    """Time whole training epochs (model, loss, optimizer, log), one epoch of every loss per round.

    Turns are taken, and the first turn moves on from round to round, so that whatever else the machine does
    falls on all losses alike. One round before the first is not counted. Cross-entropy takes part always.
    `make_model` makes the model that a loss needs.
    """
    contestants = list(dict.fromkeys([TrainingLoss(BASELINE), *losses]))
    models = {loss: make_model(loss).to(x.device) for loss in contestants}
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
