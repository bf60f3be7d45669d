"""Projected gradient descent (PGD) and its single step (FGSM): small perturbations that make a classifier fail.

One loop serves every loss and norm: start at random, look at the model, ascend, project. Relies on `attack_losses` and
`balls`; `attack_objects`, `evaluate` and `experiment` rely on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from drsl_kernels.spec import integer, number

from .attack_losses import ATTACK_LOSSES, AttackLoss, AttackLossName, Objective, objective_of
from .balls import NORMS, Norm, ascent_direction, check_norm, per_sample_view, project, random_point

__all__ = [
    "ATTACK_LOSSES",
    "NORMS",
    "AttackLoss",
    "AttackLossName",
    "Keep",
    "Model",
    "Norm",
    "check_generator",
    "check_numbers",
    "check_samples",
    "checked_logits",
    "evaluation_mode",
    "fgsm",
    "largest_label",
    "pgd",
]

Model: TypeAlias = Callable[[Tensor], Tensor]
Keep: TypeAlias = Literal["best", "last"]

KEEPS: Final[tuple[str, ...]] = get_args(Keep)


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    loss: AttackLoss = "log_odds",
    norm: Norm = "linf",
    restarts: int = 1,
    random_start: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    targeted: Tensor | None = None,
    keep: Keep = "best",
) -> Tensor:
    r"""Perturb each sample within a ball of radius eps to make the model's loss on it as large as possible.

    .. math:: x_{t+1} = \Pi\left(x_t + \alpha\, u(\nabla_x L(f(x_t), y))\right)

    u is the sign for ``linf`` and the direction of unit length for ``l2``; Pi projects onto the ball around
    x, then onto the bounds. L is summed over samples, never averaged, so a sample's attack does not depend on
    the batch it is in. With z the logits,

    ============ ============================================ ================================================
    ``log_odds`` log((1 - p_y) / p_y)                         same direction as ``ce``; never saturates
    ``ce``       -log p_y                                     exact down to losses of 1e-38
    ``margin``   max over k != y of z_k, minus z_y            looks at the strongest wrong class alone
    ``dlr``      margin / (largest minus third largest z)     unchanged by scale; C >= 3
    callable     (logits (N, C), y (N,)) -> losses (N,)       anything else to be made large
    ============ ============================================ ================================================

    Of every point visited, in all restarts, each sample keeps the best: a misclassified one wins over a
    correctly classified one, and among equals the higher loss wins. A tie for the largest logit counts as
    misclassified.

    With classes in `targeted` the attack wants these and no others: the loss of the target t is descended, and a
    point is a success where t has the largest logit, alone. ``dlr`` then ascends
    (z_t - z_y) / (largest minus the mean of third and fourth largest z), for which C >= 4.

    A model that is an ``nn.Module`` is run in evaluation mode, and its modules are afterwards in the mode they were
    in. Of any other callable the modules inside keep theirs: a BatchNorm in training mode would learn from the attack.
    The parameters' ``grad`` and ``requires_grad`` are untouched.

    Args:
        model: maps x to logits of shape (N, C), C >= 2. Usually an ``nn.Module``; any callable will do.
        x: samples, shape (N, ...), floating point, inside `bounds`. Never written.
        y: true classes, shape (N,), int64.
        eps: radius of the ball, in the units of x; 0 or more.
        alpha: step size, in the units of x; above 0.
        steps: gradient steps from each start; 0 means random search.
        loss: what to ascend, see above.
        norm: "linf" bounds the change of every value, "l2" the Euclidean length of a sample's change.
        restarts: how many starts; 1 or more.
        random_start: start at a point drawn uniformly from the ball, then clamped to `bounds`, not at x.
        bounds: smallest and largest value that x may take; infinite ones are allowed.
        generator: source of the random starts, on the device of x. The same state gives the same result.
        targeted: target classes, shape (N,), int64, each other than y; None for any wrong class.
        keep: "best" of all points visited, as above, or only of the "last" point of each restart. Other libraries
            return the last point; started at the same point, the two agree.

    Returns:
        The perturbed samples: shape, dtype and device of x, detached.

    Raises:
        ValueError: a number outside its range, x outside `bounds`, an unknown loss or norm, shapes that do
            not fit, or restarts > 1 without a random start (they would all be the same).
        TypeError: an argument of a wrong type or dtype, or a model or loss that returns no tensor.
        IndexError: a class in y or `targeted` that is not below C.
        RuntimeError: the gradient of the loss does not reach x.
        FloatingPointError: the model's logits, or the gradient of the loss, are not finite, or the loss of a sample
            that no point broke was NaN somewhere.

    Sources: Madry et al., arXiv 1706.06083; dlr: Croce & Hein, arXiv 2003.01690, equations (6) and (7).
    """
    objective = objective_of(loss)
    eps, alpha, steps, restarts, bounds = check_numbers(eps, alpha, steps, norm, restarts, random_start, bounds, keep)
    check_samples(x, y, bounds)
    check_generator(generator)
    if targeted is not None:
        _check_targets(targeted, y)
    logits_of = partial(checked_logits, model, largest={"y": largest_label(y), "targeted": largest_label(targeted)})
    # Leaving inference mode and copying makes tensors that autograd can record, wherever the caller is.
    with evaluation_mode(model), torch.inference_mode(False), torch.enable_grad():
        x, y = x.detach().clone(), y.clone()
        targeted = None if targeted is None else targeted.clone()
        best = _Best.at(x)
        for _ in range(restarts):
            start = random_point(x, eps, norm, generator) if random_start else x
            point = project(start, x, eps, norm, bounds)
            for _ in range(steps):
                losses, standing, gradient = _look_with_gradient(logits_of, objective, point, y, targeted)
                if keep == "best":
                    best = best.or_better(point, losses, standing)
                point = project(point + alpha * ascent_direction(gradient, norm), x, eps, norm, bounds)
            with torch.no_grad():
                losses, standing = objective(logits_of(point), y, targeted)
            best = best.or_better(point, losses, standing)
    # Where the loss is NaN the attack goes nowhere: that such a sample stands says nothing.
    unknown = best.losses.isnan() | (best.standing & best.nan) | ~torch.isfinite(best.points).flatten(1).all(1)
    if unknown.any():
        raise FloatingPointError(
            "the attack met logits, a loss or gradients that are not finite, the first of them at sample "
            f"{int(unknown.nonzero()[0])} of {len(y)}; look at the model's weights and the loss"
        )
    return best.points


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    loss: AttackLoss = "log_odds",
    bounds: tuple[float, float] = (0.0, 1.0),
    targeted: Tensor | None = None,
) -> Tensor:
    """The fast gradient sign method: one step of length eps along the sign of the gradient, from x itself.

    The point is returned whether or not it is worse for the model than x. Arguments, result and errors are those of
    `pgd`, whose single step it is, in the L-infinity norm.

    Source: Goodfellow et al., arXiv 1412.6572.
    """
    # At eps = 0 any step leads back to x.
    alpha = eps if number("eps", eps) else 1.0
    return pgd(
        model,
        x,
        y,
        eps=eps,
        alpha=alpha,
        steps=1,
        loss=loss,
        random_start=False,
        bounds=bounds,
        targeted=targeted,
        keep="last",
    )


@contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Run a block with the model in evaluation mode, then put every module back into the mode it had.

    A callable that is no ``nn.Module`` is left alone, with the modules inside it.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    if isinstance(model, nn.Module):
        model.eval()
    try:
        yield
    finally:
        # Module by module: model.train(mode) would also wake parts that were frozen in evaluation mode.
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@dataclass(frozen=True)
class _Best:
    """The best point found so far for each sample, and whether the loss was NaN at any."""

    points: Tensor
    losses: Tensor
    standing: Tensor
    nan: Tensor

    @staticmethod
    def at(x: Tensor) -> _Best:
        """Nothing found yet: any point is better than this."""
        rows = x.shape[0]
        losses = torch.full((rows,), -math.inf, dtype=torch.float64, device=x.device)
        standing = torch.ones(rows, dtype=torch.bool, device=x.device)
        return _Best(x, losses, standing, ~standing)

    def or_better(self, points: Tensor, losses: Tensor, standing: Tensor) -> _Best:
        losses = losses.detach().to(self.losses.dtype)
        newly_fallen = self.standing & ~standing
        better = newly_fallen | ((self.standing == standing) & (losses > self.losses))
        return _Best(
            torch.where(per_sample_view(better, points), points.detach(), self.points),
            torch.where(better, losses, self.losses),
            self.standing & standing,
            self.nan | losses.isnan(),
        )


def _look_with_gradient(
    logits_of: Model, objective: Objective, point: Tensor, y: Tensor, targeted: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    point = point.detach().requires_grad_()
    losses, standing = objective(logits_of(point), y, targeted)
    gradient = None
    if losses.requires_grad:
        # With respect to the input alone: the parameters accumulate nothing.
        (gradient,) = torch.autograd.grad(losses.sum(), point, allow_unused=True)
    if gradient is None:
        raise RuntimeError(
            "the gradient of the loss does not reach x: model and loss must be differentiable, "
            "without detach() or no_grad() between x and the losses"
        )
    return losses, standing, gradient


def checked_logits(model: Model, points: Tensor, *, largest: dict[str, int]) -> Tensor:
    """What the model returns, if it is logits with a class for the largest label of each argument."""
    if not callable(model):
        raise TypeError(f"model must be callable, got {model!r}")
    logits = _tensor("model must return", model(points))
    if logits.dim() != 2 or logits.shape[0] != points.shape[0] or logits.shape[1] < 2:
        raise ValueError(
            f"model must return logits of shape (N, C) = ({points.shape[0]}, 2 or more), got {tuple(logits.shape)}"
        )
    for argument, label in largest.items():
        if label >= logits.shape[1]:
            raise IndexError(f"{argument} holds label {label}, outside [0, C) = [0, {logits.shape[1]})")
    return logits


def largest_label(labels: Tensor | None) -> int:
    return 0 if labels is None or not labels.numel() else int(labels.max())


def _pair(argument: str, values: tuple[float, float]) -> tuple[float, float]:
    try:
        first, second = values
    except (TypeError, ValueError):
        raise TypeError(f"{argument} must be two numbers, (smallest, largest), got {values!r}") from None
    return number(f"{argument}[0]", first), number(f"{argument}[1]", second)


def _tensor(what: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} a Tensor, got {type(value).__name__}")
    return value


def check_numbers(
    eps: float,
    alpha: float,
    steps: int,
    norm: str,
    restarts: int,
    random_start: bool,
    bounds: tuple[float, float],
    keep: str,
) -> tuple[float, float, int, int, tuple[float, float]]:
    """eps, alpha, steps, restarts and bounds as plain numbers, if `pgd` takes all of it; it describes the errors."""
    eps, alpha = number("eps", eps), number("alpha", alpha)
    steps, restarts = integer("steps", steps), integer("restarts", restarts)
    if not isinstance(random_start, bool):
        raise TypeError(f"random_start must be a bool, got {random_start!r}")
    bounds = _pair("bounds", bounds)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be 0 or more and finite, got {eps!r}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be above 0 and finite, got {alpha!r}")
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps!r}")
    check_norm(norm)
    if restarts < 1:
        raise ValueError(f"restarts must be 1 or more, got {restarts!r}")
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts must be 1 without a random start (all would be equal), got {restarts!r}")
    if not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (smallest, largest) with smallest < largest, got {bounds!r}")
    if keep not in KEEPS:
        raise ValueError(f"keep must be one of {', '.join(map(repr, KEEPS))}, got {keep!r}")
    return eps, alpha, steps, restarts, bounds


def check_generator(generator: torch.Generator | None) -> None:
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")


def check_samples(x: Tensor, y: Tensor, bounds: tuple[float, float]) -> None:
    """Raise for samples and classes that `pgd` does not take; it describes the errors."""
    x, y = _tensor("x must be", x), _tensor("y must be", y)
    if not x.is_floating_point():
        raise TypeError(f"x must be of a floating dtype, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"x must have shape (N, ...) with at least two dimensions, got {tuple(x.shape)}")
    _check_classes("y", y, x.shape[:1])
    if x.numel() and not bool(((x >= bounds[0]) & (x <= bounds[1])).all()):
        raise ValueError(f"x must lie within bounds={bounds!r}, got values from {x.min().item()} to {x.max().item()}")


def _check_classes(argument: str, labels: Tensor, shape: torch.Size) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"{argument} must hold class indices of dtype int64, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(f"{argument} must have shape (N,) = ({shape[0]},), got {tuple(labels.shape)}")
    if labels.numel() and int(labels.min()) < 0:
        raise ValueError(f"{argument} must hold classes 0 or more, got {int(labels.min())}")


def _check_targets(targeted: Tensor, y: Tensor) -> None:
    _check_classes("targeted", _tensor("targeted must be", targeted), y.shape)
    same = (targeted == y).nonzero().flatten()
    if len(same):
        row = int(same[0])
        raise ValueError(f"targeted must name other classes than y, got {int(y[row])} for both in row {row}")
