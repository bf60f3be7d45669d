"""Projected gradient descent (PGD): small perturbations that make a classifier fail.

One loop serves every loss and norm: start at random, look at the model, ascend, project. Relies on
`drsl_kernels.softmax_loss`, whose gradient stays exact where the model is very sure of itself; `evaluate` and
`experiment` rely on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from drsl_kernels import softmax_loss
from drsl_kernels.spec import number

__all__ = ["ATTACK_LOSSES", "AttackLoss", "AttackLossName", "Model", "Norm", "evaluation_mode", "pgd"]

Model: TypeAlias = Callable[[Tensor], Tensor]
Norm: TypeAlias = Literal["linf", "l2"]
AttackLossName: TypeAlias = Literal["log_odds", "ce", "margin"]
AttackLoss: TypeAlias = AttackLossName | Callable[[Tensor, Tensor], Tensor]

# What the loop needs of a loss: (logits, y) -> (loss of each sample, is each sample classified correctly).
_Objective: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

NORMS: Final[tuple[str, ...]] = get_args(Norm)
ATTACK_LOSSES: Final[tuple[str, ...]] = get_args(AttackLossName)


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
    callable     (logits (N, C), y (N,)) -> losses (N,)       anything else to be made large
    ============ ============================================ ================================================

    Of every point visited, in all restarts, each sample keeps the best: a misclassified one wins over a
    correctly classified one, and among equals the higher loss wins. A tie for the largest logit counts as
    misclassified.

    The model is run in evaluation mode. Afterwards its modules are in the mode they were in, and the
    parameters' ``grad`` and ``requires_grad`` are untouched.

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

    Returns:
        The perturbed samples: shape, dtype and device of x, detached.

    Raises:
        ValueError: a number outside its range, x outside `bounds`, an unknown loss or norm, shapes that do
            not fit, or restarts > 1 without a random start (they would all be the same).
        TypeError: an argument of a wrong type or dtype, or a model or loss that returns no tensor.
        IndexError: a label in y that is not below C.
        RuntimeError: the gradient of the loss does not reach x.
        FloatingPointError: the model's logits, or the gradient of the loss, are not finite.

    Source: Madry et al., arXiv 1706.06083.
    """
    objective = _objective(loss)
    eps, alpha = number("eps", eps), number("alpha", alpha)
    steps, restarts = _integer("steps", steps), _integer("restarts", restarts)
    bounds = _pair("bounds", bounds)
    _check_numbers(eps, alpha, steps, norm, restarts, random_start, bounds)
    _check_samples(x, y, bounds)
    logits_of = partial(_logits, model, largest_label=int(y.max()) if y.numel() else 0)
    # Leaving inference mode and copying makes tensors that autograd can record, wherever the caller is.
    with evaluation_mode(model), torch.inference_mode(False), torch.enable_grad():
        x, y = x.detach().clone(), y.clone()
        best = _Best.at(x)
        for _ in range(restarts):
            start = _random_point(x, eps, norm, generator) if random_start else x
            point = _project(start, x, eps, norm, bounds)
            for _ in range(steps):
                losses, correct, gradient = _look_with_gradient(logits_of, objective, point, y)
                best = best.or_better(point, losses, correct)
                point = _project(point + alpha * _ascent_direction(gradient, norm), x, eps, norm, bounds)
            with torch.no_grad():
                losses, correct = objective(logits_of(point), y)
            best = best.or_better(point, losses, correct)
    if not torch.isfinite(best.points).all() or best.losses.isnan().any():
        raise FloatingPointError(
            "the attack met logits or gradients that are not finite; look at the model's weights and the loss"
        )
    return best.points


@contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Run a block with the model in evaluation mode, then put every module back into the mode it had."""
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
    """The best point found so far for each sample."""

    points: Tensor
    losses: Tensor
    correct: Tensor

    @staticmethod
    def at(x: Tensor) -> _Best:
        """Nothing found yet: any point is better than this."""
        rows = x.shape[0]
        losses = torch.full((rows,), -math.inf, dtype=torch.float64, device=x.device)
        return _Best(x, losses, torch.ones(rows, dtype=torch.bool, device=x.device))

    def or_better(self, points: Tensor, losses: Tensor, correct: Tensor) -> _Best:
        losses = losses.detach().to(self.losses.dtype)
        newly_wrong = self.correct & ~correct
        better = newly_wrong | ((self.correct == correct) & (losses > self.losses))
        return _Best(
            torch.where(_per_sample(better, points), points.detach(), self.points),
            torch.where(better, losses, self.losses),
            self.correct & correct,
        )


def _look_with_gradient(
    logits_of: Model, objective: _Objective, point: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    point = point.detach().requires_grad_()
    losses, correct = objective(logits_of(point), y)
    gradient = None
    if losses.requires_grad:
        # With respect to the input alone: the parameters accumulate nothing.
        (gradient,) = torch.autograd.grad(losses.sum(), point, allow_unused=True)
    if gradient is None:
        raise RuntimeError(
            "the gradient of the loss does not reach x: model and loss must be differentiable, "
            "without detach() or no_grad() between x and the losses"
        )
    return losses, correct, gradient


def _logits(model: Model, points: Tensor, *, largest_label: int) -> Tensor:
    logits = _tensor("model must return", model(points))
    if logits.dim() != 2 or logits.shape[0] != points.shape[0] or logits.shape[1] < 2:
        raise ValueError(
            f"model must return logits of shape (N, C) = ({points.shape[0]}, 2 or more), got {tuple(logits.shape)}"
        )
    if largest_label >= logits.shape[1]:
        raise IndexError(f"y holds label {largest_label}, outside [0, C) = [0, {logits.shape[1]})")
    return logits


def _objective(loss: AttackLoss) -> _Objective:
    if loss == "log_odds":
        return _log_odds
    if loss == "ce":
        return _cross_entropy
    if loss == "margin":
        return _margin
    if callable(loss):
        return _from_callable(loss)
    raise ValueError(f"loss must be one of {', '.join(map(repr, ATTACK_LOSSES))} or a callable, got {loss!r}")


def _log_odds(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    losses, stats = softmax_loss(logits, y, truth="log_odds", reduction="none", return_stats=True)
    return losses, stats.correct


def _cross_entropy(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    losses, stats = softmax_loss(logits, y, truth="ce", reduction="none", return_stats=True)
    return losses, stats.correct


def _margin(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    label = y.unsqueeze(1)
    wrong = logits.scatter(1, label, -math.inf).amax(1)
    losses = wrong - logits.gather(1, label).squeeze(1)
    return losses, losses.detach() < 0


def _from_callable(loss: Callable[[Tensor, Tensor], Tensor]) -> _Objective:
    def objective(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        losses = _tensor("loss must return", loss(logits, y))
        if losses.shape != y.shape:
            raise ValueError(
                f"loss must return one value per sample, shape (N,) = {tuple(y.shape)}, got {tuple(losses.shape)}"
            )
        return losses, _margin(logits.detach(), y)[1]

    return objective


def _random_point(x: Tensor, eps: float, norm: str, generator: torch.Generator | None) -> Tensor:
    """A point drawn uniformly from the ball around x."""
    if norm == "linf":
        return x + eps * (2 * _uniform(x.shape, x, generator) - 1)
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    # The volume within radius r grows as r^d: the d-th root of a uniform number spreads points evenly.
    radius = _uniform(x.shape[:1], x, generator) ** (1 / max(1, x[:1].numel()))
    return x + eps * _per_sample(radius, x) * _unit_length(direction)


def _uniform(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


def _ascent_direction(gradient: Tensor, norm: str) -> Tensor:
    return gradient.sign() if norm == "linf" else _unit_length(gradient)


def _unit_length(vectors: Tensor) -> Tensor:
    """Each sample's vector scaled to Euclidean length 1; zero vectors stay zero."""
    smallest = torch.finfo(vectors.dtype).tiny
    flat = vectors.flatten(1)
    # By the largest entry first, so that squares of gradients around 1e-30 do not vanish.
    flat = flat / flat.abs().amax(1, keepdim=True).clamp(min=smallest)
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return torch.div(flat, length.clamp(min=smallest)).view_as(vectors)


def _project(points: Tensor, x: Tensor, eps: float, norm: str, bounds: tuple[float, float]) -> Tensor:
    """The nearest point of the ball around x, then the nearest within the bounds.

    The second step cannot leave the ball, for x itself lies within the bounds.
    """
    change = points.detach() - x
    if norm == "linf":
        change = change.clamp(-eps, eps)
    else:
        length = torch.linalg.vector_norm(change.flatten(1), dim=1)
        shrink = (eps / length.clamp(min=torch.finfo(x.dtype).tiny)).clamp(max=1)
        change = change * _per_sample(shrink, x)
    return (x + change).clamp(*bounds)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values of shape (N,) made to broadcast against samples of shape (N, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _integer(argument: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    return int(value)


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


def _check_numbers(
    eps: float,
    alpha: float,
    steps: int,
    norm: str,
    restarts: int,
    random_start: bool,
    bounds: tuple[float, float],
) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be 0 or more and finite, got {eps!r}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be above 0 and finite, got {alpha!r}")
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps!r}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
    if restarts < 1:
        raise ValueError(f"restarts must be 1 or more, got {restarts!r}")
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts must be 1 without a random start (all would be equal), got {restarts!r}")
    if not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (smallest, largest) with smallest < largest, got {bounds!r}")


def _check_samples(x: Tensor, y: Tensor, bounds: tuple[float, float]) -> None:
    x, y = _tensor("x must be", x), _tensor("y must be", y)
    if not x.is_floating_point():
        raise TypeError(f"x must be of a floating dtype, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"x must have shape (N, ...) with at least two dimensions, got {tuple(x.shape)}")
    if y.dtype != torch.int64:
        raise TypeError(f"y must hold class indices of dtype int64, got {y.dtype}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y must have shape (N,) = ({x.shape[0]},), got {tuple(y.shape)}")
    if y.numel() and int(y.min()) < 0:
        raise ValueError(f"y must hold classes 0 or more, got {int(y.min())}")
    if x.numel() and not bool(((x >= bounds[0]) & (x <= bounds[1])).all()):
        raise ValueError(f"x must lie within bounds={bounds!r}, got values from {x.min().item()} to {x.max().item()}")
