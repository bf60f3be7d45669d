"""What a loss costs: seconds of a training step, measured side by side with `F.cross_entropy` of the same logits.

Relies on `engine` and `model`; `experiment` relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Final

import torch
import torch.nn.functional as F

from ..random_streams import deterministic
from .corpus import Corpus, drawn_windows
from .engine import make_optimizer
from .losses import LanguageLoss
from .model import GPT
from .settings import LanguageSettings

__all__ = ["ROUNDS", "StepTime", "time_steps"]

ROUNDS: Final = 12


@dataclass(frozen=True)
class StepTime:
    """Median seconds per step, and the median of its ratio to `F.cross_entropy` in the same round."""

    seconds: float
    ratio: float


def time_steps(
    losses: Sequence[LanguageLoss], corpus: Corpus, settings: LanguageSettings, *, rounds: int = ROUNDS
) -> dict[LanguageLoss, StepTime]:
    """Time whole training steps (windows, model, loss, optimizer), one of every loss per round.

    Turns are taken, and the first turn moves on from round to round. The baseline is the model with a linear head and
    `F.cross_entropy`. One round before the first is not counted.
    """
    with deterministic(settings.threads):
        steps = [_stepper(None, corpus, settings), *(_stepper(loss, corpus, settings) for loss in losses)]
        seconds: list[list[float]] = [[] for _ in steps]
        for turn in range(rounds + 1):
            first = turn % len(steps)
            for i in (*range(first, len(steps)), *range(first)):
                seconds[i].append(steps[i](turn))
    baseline, *others = (taken[1:] for taken in seconds)
    return {
        loss: StepTime(median(taken), median(a / b for a, b in zip(taken, baseline, strict=True)))
        for loss, taken in zip(losses, others, strict=True)
    }


def _stepper(loss: LanguageLoss | None, corpus: Corpus, settings: LanguageSettings) -> Callable[[int], float]:
    """What takes one step and tells how long that took; None for `F.cross_entropy`."""
    device = torch.device(settings.device)
    shape = settings.shape(corpus.tokens.vocabulary)
    plain = loss is None
    named = LanguageLoss("ce") if loss is None else loss
    model = GPT(type(shape)(**shape.as_json() | {"head": named.head}), seed=settings.seed).to(device)
    optimizer = make_optimizer(model, settings)

    def step(turn: int) -> float:
        _wait(device)
        begin = perf_counter()
        batch = drawn_windows(corpus.train, settings.context, settings.batch_size, "timing", turn).to(device)
        x, y = batch[:, :-1], batch[:, 1:]
        value = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) if plain else model(x, y, named)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        _wait(device)
        return perf_counter() - begin

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
