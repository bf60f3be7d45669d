"""The optimizer and the learning rate that a `Recipe` asks for.

The learning rate is a function of the step alone, so that a run that goes on after an interruption has no schedule to
restore; proximal steps have no state either. Relies on `drsl_kernels.regularizers`; `train` relies on it.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import nn

from drsl_kernels.regularizers import L1, Absum

from .recipe import Recipe

__all__ = ["learning_rate_at", "make_optimizer", "set_learning_rate"]

# The shape of torch.optim.lr_scheduler.OneCycleLR: the share of the steps on the way up, and how far below the top
# the rate begins and ends.
_RISE: Final = 0.3
_BEGIN: Final = 1 / 25
_END: Final = _BEGIN / 1e4


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, Adam or AdamW over all parameters, with the recipe's proximal step behind each step.

    A step that is skipped, as a gradient scaler does where gradients are not finite, has no proximal step.

    Raises:
        ValueError: absum or l1 for a model without convolutions.
    """
    optimizer = _optimizer(model, recipe)
    regularizer: Absum | L1
    if recipe.absum:
        regularizer = Absum(model, recipe.absum)
    elif recipe.l1:
        regularizer = L1(model, recipe.l1)
    else:
        return optimizer
    optimizer.register_step_post_hook(lambda stepped, *_: regularizer.step(stepped.param_groups[0]["lr"]))
    return optimizer


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters, rate, decay = model.parameters(), recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "sgd":
        momentum = recipe.momentum
        return torch.optim.SGD(parameters, lr=rate, momentum=momentum, nesterov=momentum > 0, weight_decay=decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    return torch.optim.Adam(parameters, lr=rate, weight_decay=decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate_at(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0 over all epochs."""
    steps = recipe.epochs * steps_per_epoch
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / (warmup + 1)
    if recipe.schedule == "cosine":
        return _cosine(recipe.learning_rate, 0.0, (step - warmup) / (steps - warmup))
    if recipe.schedule == "multistep":
        epochs = step // steps_per_epoch
        return recipe.learning_rate * 0.1 ** sum(epochs >= milestone for milestone in recipe.milestones)
    if recipe.schedule == "onecycle":
        return _one_cycle(recipe.learning_rate, step, steps)
    return recipe.learning_rate


def _one_cycle(top: float, step: int, steps: int) -> float:
    peak = _RISE * steps - 1
    if step <= peak:
        return _cosine(top * _BEGIN, top, step / peak if peak > 0 else 1.0)
    return _cosine(top, top * _END, (step - peak) / (steps - 1 - peak) if steps > 1 else 0.0)


def _cosine(start: float, end: float, share: float) -> float:
    """Half a cosine wave from start (share 0) to end (share 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
