"""Training: a plain loop with Adam, the same for every loss.

Relies on `losses`; `experiment` and `timing` rely on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from .losses import BatchResult, TrainingLoss

__all__ = ["EpochLog", "Recipe", "make_optimizer", "train", "train_epoch"]


@dataclass(frozen=True)
class Recipe:
    """How to train: Adam at a constant learning rate, shuffled batches, nothing else.

    The defaults suit cross-entropy, judged on held-out training images: longer training, weight decay or a
    larger learning rate do not make it more robust.
    """

    epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be 1 or more, got {self.epochs!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate!r}")


@dataclass(frozen=True)
class EpochLog:
    """Means over the training images of one epoch, each taken before the step on its batch.

    `distance` is D without tau, None for plain cross-entropy; `accuracy` is in [0, 1]; `seconds` is wall
    time.
    """

    epoch: int
    loss: float
    cross_entropy: float
    distance: float | None
    accuracy: float
    seconds: float


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: TrainingLoss,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    on_epoch: Callable[[EpochLog], None] | None = None,
) -> list[EpochLog]:
    """Train the model in place and return one log per epoch.

    Args:
        model: maps x to logits (N, C).
        x, y: images (N, ...) and classes (N,), on the device of the model.
        loss, recipe: what to descend and how.
        generator: a CPU generator; its state decides the order of the images.
        on_epoch: called with each log as it is made.

    Raises:
        FloatingPointError: the loss became infinite or NaN; the message names epoch and batch.
    """
    optimizer = make_optimizer(model, recipe)
    logs = []
    for epoch in range(1, recipe.epochs + 1):
        logs.append(train_epoch(model, x, y, loss, recipe, optimizer, epoch=epoch, generator=generator))
        if on_epoch is not None:
            on_epoch(logs[-1])
    return logs


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)


def train_epoch(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: TrainingLoss,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    *,
    epoch: int,
    generator: torch.Generator,
) -> EpochLog:
    """One pass over the images in an order drawn from the generator; see `train`."""
    model.train()
    start = perf_counter()
    results = []
    for batch_x, batch_y in _batches(x, y, recipe.batch_size, generator):
        result = loss(model(batch_x), batch_y)
        optimizer.zero_grad()
        result.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        results.append(result._replace(loss=result.loss.detach()))
    # Values are looked at once per epoch: looking at each batch would make a GPU wait each time.
    return _log(results, x, y, recipe, loss, epoch, start)


def _batches(x: Tensor, y: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(y), generator=generator).to(x.device)
    for rows in torch.split(order, batch_size):
        yield x[rows], y[rows]


def _log(
    results: list[BatchResult],
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    loss: TrainingLoss,
    epoch: int,
    start: float,
) -> EpochLog:
    losses = torch.stack([result.loss for result in results]).double().cpu()
    bad = (~losses.isfinite()).nonzero().flatten()
    if len(bad):
        batch = int(bad[0])
        raise FloatingPointError(
            f"training with {loss}: the loss is {losses[batch].item()} in epoch {epoch}, batch {batch + 1}; "
            f"a smaller learning rate (now {recipe.learning_rate:g}) or a smaller tau may help"
        )
    sizes = torch.tensor([len(rows) for rows in torch.split(y, recipe.batch_size)], dtype=torch.float64)
    distances = [result.distance for result in results if result.distance is not None]
    return EpochLog(
        epoch=epoch,
        loss=float((losses * sizes).sum()) / len(y),
        cross_entropy=_mean([result.cross_entropy for result in results], len(y)),
        distance=_mean(distances, len(y)) if distances else None,
        accuracy=_mean([result.correct for result in results], len(y)),
        seconds=perf_counter() - start,
    )


def _mean(sums: list[Tensor], count: int) -> float:
    return float(torch.stack(sums).double().sum()) / count
