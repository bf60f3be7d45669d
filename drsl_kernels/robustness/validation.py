"""How good a model is on images held out of training, after each epoch: what the best checkpoint is chosen by.

Relies on `attacks` and `attack_objects`; `engine` relies on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attack_objects import REACH
from .attacks import evaluation_mode, pgd
from .distributed import World
from .random_streams import generator_for
from .recipe import Adversarial

__all__ = ["Validation", "validate"]

_BATCH: Final = 256
_STEPS: Final = 10


@dataclass(frozen=True)
class Validation:
    """Means over held-out images: cross-entropy, accuracy, and with adversarial training robust accuracy.

    `robust_accuracy` is that of the first images alone, under one quick PGD on the log-odds with the recipe's radius:
    enough to choose an epoch, too little to believe in.
    """

    cross_entropy: float
    accuracy: float
    robust_accuracy: float | None

    @property
    def score(self) -> float:
        """What the best epoch has most of."""
        return self.accuracy if self.robust_accuracy is None else self.robust_accuracy


def validate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    adversarial: Adversarial | None,
    robust_images: int,
    seed: int,
    world: World,
) -> Validation:
    """Judge a model, in evaluation mode and full precision; each process has some of the batches.

    Args:
        x, y: held-out images and their classes.
        adversarial: its radius and norm bound the attack; None for no attack.
        robust_images: so many images, the first, are attacked.
        seed: decides where attacks start, the same after every epoch.

    Raises:
        FloatingPointError: a logit is not finite.
    """
    world.share_buffers(model)
    sums = torch.zeros(2, dtype=torch.float64, device=x.device)
    with evaluation_mode(model), torch.no_grad():
        for batch_x, batch_y in list(_batches(x, y))[world.rank :: world.size]:
            logits = model(batch_x)
            sums[0] += F.cross_entropy(logits, batch_y, reduction="sum").double()
            sums[1] += (logits.argmax(1) == batch_y).sum()
    cross_entropy, correct = (world.sum(sums) / len(y)).tolist()
    if not math.isfinite(cross_entropy):
        raise FloatingPointError(f"the cross-entropy of the validation images is {cross_entropy}")
    robust = None
    if adversarial is not None:
        x, y = x[:robust_images], y[:robust_images]
        robust = _robust_accuracy(model, x, y, adversarial, seed, world)
    return Validation(cross_entropy, correct, robust)


def _robust_accuracy(
    model: nn.Module, x: Tensor, y: Tensor, adversarial: Adversarial, seed: int, world: World
) -> float:
    standing = torch.zeros(1, dtype=torch.float64, device=x.device)
    for batch, (batch_x, batch_y) in list(enumerate(_batches(x, y)))[world.rank :: world.size]:
        found = pgd(
            model,
            batch_x,
            batch_y,
            eps=adversarial.eps,
            alpha=REACH * adversarial.eps / _STEPS,
            steps=_STEPS,
            norm=adversarial.norm,
            generator=generator_for(seed, "validation", batch, device=x.device),
        )
        with evaluation_mode(model), torch.no_grad():
            standing += (model(found).argmax(1) == batch_y).sum()
    return world.sum(standing).item() / len(y)


def _batches(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(x, _BATCH), torch.split(y, _BATCH), strict=True)
