"""Training on attacked images: what one batch costs, and how its examples are made.

    Madry    L(f(x'), y)                           x' = argmax of A(f(x'), y)        within eps of x
    TRADES   L(f(x), y) + beta KL(p(x) || p(x'))   x' = argmax of KL(p(x) || p(x'))  within eps of x

L is any `TrainingLoss`, A the inner loss, p the softmax of f. The maximum is sought by the steps of `attacks.pgd` (sum
over samples, never the mean; sign or unit length; ball, then [0, 1]), but the last point is taken and not the best one:
training wants a gradient at every image, not a verdict. Sources: Madry et al., arXiv 1706.06083; Zhang et al.,
arXiv 1901.08573 and its code, from which the start (a Gaussian of deviation 0.001) and the mode of the model come.
Relies on `balls`, `attacks` and `attack_losses`; `train` relies on it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attack_losses import objective_of
from .attacks import evaluation_mode
from .balls import ascent_direction, project, random_point
from .losses import BatchLoss, BatchResult
from .recipe import Adversarial, Recipe

__all__ = ["adversarial_examples", "batch_result", "draw_starts"]

# logits -> what the inner attack ascends, summed over samples
_Inner: TypeAlias = Callable[[Tensor], Tensor]

_TRADES_START: Final = 0.001
_BOUNDS: Final = (0.0, 1.0)


def batch_result(
    model: nn.Module, x: Tensor, y: Tensor, starts: Tensor | None, loss: BatchLoss, recipe: Recipe
) -> BatchResult:
    """The loss of one batch, plain or adversarial, and the sums of its log.

    The sums are those of the images that L looks at: attacked ones for Madry, clean ones for TRADES.

    Args:
        x, y: the images (N, ...) in [0, 1] and their classes (N,).
        starts: from `draw_starts`, the rows of x; None where the recipe draws none.
        loss: of this step, from `TrainingLoss.at`.
    """
    adversarial = recipe.adversarial
    if adversarial is None:
        return loss(model(x), y, label_smoothing=recipe.label_smoothing)
    if adversarial.method == "madry":
        inner = _madry_inner(adversarial, y, loss, recipe)
        found = adversarial_examples(model, x, adversarial, inner, starts)
        return loss(model(found), y, label_smoothing=recipe.label_smoothing)
    found = adversarial_examples(model, x, adversarial, _trades_inner(model, x, adversarial), starts)
    logits = model(x)
    result = loss(logits, y, label_smoothing=recipe.label_smoothing)
    divergence = _divergence(logits, model(found)) / len(y)
    return result._replace(loss=result.loss + adversarial.beta * divergence)


def draw_starts(adversarial: Adversarial | None, x: Tensor, generator: torch.Generator) -> Tensor | None:
    """Where attacks on x begin, as differences from x; None where they begin at x itself.

    Args:
        x: gives shape, dtype and device.
        generator: on the device of x.
    """
    if adversarial is None or not adversarial.random_start:
        return None
    if adversarial.method == "trades":
        return _TRADES_START * torch.empty_like(x).normal_(generator=generator)
    return random_point(torch.zeros_like(x), adversarial.eps, adversarial.norm, generator)


def adversarial_examples(
    model: nn.Module, x: Tensor, adversarial: Adversarial, inner: _Inner, starts: Tensor | None
) -> Tensor:
    """Images near x at which `inner` of the model's logits is large; detached, in the ball and in [0, 1].

    The model is in the mode that the recipe names while it is looked at, and afterwards in that it had. Parameters
    accumulate no gradient. Under float16 autocast, where gradients of an input vanish, the model is looked at in full
    precision.
    """
    mode = evaluation_mode(model) if adversarial.mode == "eval" else nullcontext()
    point = x.detach() if starts is None else project(x + starts, x, adversarial.eps, adversarial.norm, _BOUNDS)
    with mode, _no_float16(x.device):
        for _ in range(adversarial.steps):
            point = point.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(inner(model(point)), point)
            step = adversarial.alpha * ascent_direction(gradient, adversarial.norm)
            point = project(point.detach() + step, x, adversarial.eps, adversarial.norm, _BOUNDS)
    return point.detach()


def _no_float16(device: torch.device) -> AbstractContextManager[object]:
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _madry_inner(adversarial: Adversarial, y: Tensor, loss: BatchLoss, recipe: Recipe) -> _Inner:
    def inner(logits: Tensor) -> Tensor:
        if adversarial.loss == "training":
            return loss(logits, y, label_smoothing=recipe.label_smoothing).loss * len(y)
        return objective_of(adversarial.loss)(logits, y, None)[0].sum()

    return inner


def _trades_inner(model: nn.Module, x: Tensor, adversarial: Adversarial) -> _Inner:
    mode = evaluation_mode(model) if adversarial.mode == "eval" else nullcontext()
    with torch.no_grad(), mode, _no_float16(x.device):
        clean = model(x)

    def inner(logits: Tensor) -> Tensor:
        return _divergence(clean, logits)

    return inner


def _divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(attacked)), summed over samples."""
    wide = torch.promote_types(clean.dtype, torch.float32)
    towards, around = attacked.to(wide).log_softmax(1), clean.to(wide).log_softmax(1)
    return F.kl_div(towards, around, reduction="sum", log_target=True)
