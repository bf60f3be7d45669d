"""Attacks of several kinds in one form, so that they can stand beside each other in a table.

`AnyAttack` is the form, `UniversalAttack` that of an attack with one perturbation for all samples. Relies on `attacks`;
`evaluate`, `attack_table` and `attack_command` rely on it. PGD for any radius is `evaluate.Attack`, the members of
AutoAttack are in `autoattack`, the single Fourier attack is in `fourier`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from drsl_kernels.spec import integer, number

from .attack_losses import AttackLoss, margins_of, objective_of
from .attack_objects import REACH
from .attacks import Model, Norm, evaluation_mode, fgsm, pgd
from .balls import check_norm

__all__ = [
    "AnyAttack",
    "SettledAttack",
    "SingleStep",
    "TargetedAttack",
    "Transfer",
    "UniversalAttack",
    "check_attack",
    "check_attacks",
    "check_radii",
    "loss_name",
]


@runtime_checkable
class AnyAttack(Protocol):
    """An attack for any radius.

    Attributes:
        name: what it is called in tables.
        norm: of the ball that it stays in.
        restarts: how many starts it takes; 1 or more.
        black_box: it does not use the gradient of the model under attack.
    """

    @property
    def name(self) -> str: ...
    @property
    def norm(self) -> Norm: ...
    @property
    def restarts(self) -> int: ...
    @property
    def black_box(self) -> bool: ...

    def start(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        eps: float,
        bounds: tuple[float, float],
        generator: torch.Generator | None,
    ) -> Tensor:
        """One start: points within eps of x and within the bounds, in the shape of x; eps is above 0."""


class SettledAttack(AnyAttack, Protocol):
    """An attack that has chosen its perturbation."""

    def found(self) -> dict[str, Any]:
        """What it has chosen, in numbers and lists, as JSON gives them back."""


@runtime_checkable
class UniversalAttack(Protocol):
    """An attack that has one perturbation for all samples, and looks at all of them before it attacks a part."""

    def settle(
        self, model: Model, x: Tensor, y: Tensor, *, eps: float, bounds: tuple[float, float], batch_size: int
    ) -> SettledAttack:
        """The attack with the perturbation that is the worst for all of x."""


@dataclass(frozen=True)
class SingleStep:
    """`fgsm` for any radius. It is the weakest of attacks: a figure to compare with, not one to believe."""

    loss: AttackLoss = "log_odds"

    norm: ClassVar[Norm] = "linf"
    restarts: ClassVar[int] = 1
    black_box: ClassVar[bool] = False

    def __post_init__(self) -> None:
        objective_of(self.loss)

    @property
    def name(self) -> str:
        return f"fgsm:{loss_name(self.loss)}"

    def start(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        eps: float,
        bounds: tuple[float, float],
        generator: torch.Generator | None,
    ) -> Tensor:
        return fgsm(model, x, y, eps=eps, loss=self.loss, bounds=bounds)


@dataclass(frozen=True)
class TargetedAttack:
    """PGD towards each of a sample's likeliest wrong classes in turn, until one of them breaks it.

    Attributes:
        loss, steps, restarts, norm: as in `pgd`.
        targets: how many classes to try, the likeliest before the attack first; all wrong ones if there are fewer.
        reach: how far all steps together could go, in units of eps; above 0.

    Raises:
        ValueError, TypeError: one of them is out of its range, or of a wrong type.
    """

    loss: AttackLoss = "margin"
    steps: int = 20
    restarts: int = 1
    norm: Norm = "linf"
    targets: int = 9
    reach: float = REACH

    black_box: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_attack(self.loss, self.norm, self.reach, steps=self.steps, restarts=self.restarts, targets=self.targets)

    @property
    def name(self) -> str:
        return f"pgd-t:{loss_name(self.loss)}"

    def start(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        eps: float,
        bounds: tuple[float, float],
        generator: torch.Generator | None,
    ) -> Tensor:
        points = x.detach().clone()
        logits = _logits(model, points)
        wrong = logits.scatter(1, y.unsqueeze(1), -torch.inf)
        targets = wrong.topk(min(self.targets, logits.shape[1] - 1), dim=1).indices
        margins = margins_of(logits, y)
        for column in targets.unbind(1):
            rows = (margins > 0).nonzero().squeeze(1)
            if not len(rows):
                break
            found = pgd(
                model,
                x[rows],
                y[rows],
                eps=eps,
                alpha=self.reach * eps / self.steps,
                steps=self.steps,
                loss=self.loss,
                norm=self.norm,
                bounds=bounds,
                generator=generator,
                targeted=column[rows],
            )
            found_margins = margins_of(_logits(model, found), y[rows])
            better = found_margins < margins[rows]
            points[rows[better]] = found[better]
            margins[rows[better]] = found_margins[better]
        return points


@dataclass(frozen=True)
class Transfer:
    """An attack on another model, whose points are then shown to the one under attack.

    Attributes:
        source: the other model, for the same samples and classes, on the same device.
        base: the attack on it.
        label: what the source is called in tables; "" where there is but one.
    """

    source: Model
    base: AnyAttack
    label: str = ""

    black_box: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"transfer:{self.base.name.removeprefix('pgd:')}" + (f" from {self.label}" if self.label else "")

    @property
    def norm(self) -> Norm:
        return self.base.norm

    @property
    def restarts(self) -> int:
        return self.base.restarts

    def start(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        eps: float,
        bounds: tuple[float, float],
        generator: torch.Generator | None,
    ) -> Tensor:
        return self.base.start(self.source, x, y, eps=eps, bounds=bounds, generator=generator)


def check_attack(loss: AttackLoss, norm: str, reach: float, **counts: int) -> None:
    """Raise for settings that a PGD for any radius cannot have; `counts` must be 1 or more."""
    objective_of(loss)
    check_norm(norm)
    if not 0 < number("reach", reach) < math.inf:
        raise ValueError(f"reach must be above 0 and finite, got {reach!r}")
    for argument, count in counts.items():
        if integer(argument, count) < 1:
            raise ValueError(f"{argument} must be 1 or more, got {count!r}")


def check_radii(epsilons: Sequence[float] | Tensor) -> tuple[float, ...]:
    """Radii as plain numbers, ascending, each once; of a list, a tuple, a tensor or an array.

    Raises:
        TypeError: no sequence of numbers.
        ValueError: there is none, or one is negative or not finite.
    """
    try:
        given = list(epsilons.tolist() if isinstance(epsilons, Tensor) else epsilons)
    except TypeError:
        raise TypeError(f"epsilons must be a sequence of numbers, got {epsilons!r}") from None
    if not given:
        raise ValueError(f"epsilons must not be empty, got {epsilons!r}")
    radii = [number(f"epsilons[{index}]", eps) for index, eps in enumerate(given)]
    if not all(0 <= eps < math.inf for eps in radii):
        raise ValueError(f"epsilons must be 0 or more and finite, got {tuple(radii)!r}")
    return tuple(sorted(set(radii)))


def check_attacks(attacks: Sequence[AnyAttack]) -> None:
    """Raise for attacks that cannot stand beside each other.

    Raises:
        TypeError: no sequence of attacks for any radius.
        ValueError: there is none, or they are in several norms.
    """
    form = "for any radius, such as Attack()"
    if not isinstance(attacks, Collection):
        raise TypeError(f"attacks must be a sequence of attacks {form}, got {attacks!r}")
    if not attacks:
        raise ValueError(f"attacks must not be empty, got {attacks!r}")
    for index, attack in enumerate(attacks):
        if isinstance(attack, type) or not isinstance(attack, AnyAttack):
            raise TypeError(f"attacks[{index}] must be an attack {form}, got {attack!r}")
    norms = {attack.norm for attack in attacks}
    if len(norms) > 1:
        raise ValueError(f"attacks must be in one norm, got {', '.join(sorted(norms))}")


def loss_name(loss: AttackLoss) -> str:
    return loss if isinstance(loss, str) else str(getattr(loss, "__name__", type(loss).__name__))


def _logits(model: Model, points: Tensor) -> Tensor:
    with evaluation_mode(model), torch.no_grad():
        return model(points)
