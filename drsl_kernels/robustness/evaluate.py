"""Robust accuracy: which samples survive every attack of a list, at several sizes of perturbation.

Relies on `attacks` and `attack_kinds`; `judging` and `attack_table` rely on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from drsl_kernels.spec import integer

from .attack_kinds import AnyAttack, UniversalAttack, check_attack, check_attacks, check_radii, loss_name
from .attack_losses import margins_of
from .attack_objects import REACH
from .attacks import (
    AttackLoss,
    Model,
    Norm,
    check_samples,
    checked_logits,
    evaluation_mode,
    largest_label,
    pgd,
)
from .balls import lengths

__all__ = [
    "Attack",
    "Search",
    "WorstCase",
    "all_logits",
    "check_batch_size",
    "refuse_nan",
    "second_largest_softmax",
    "worst_case",
]

# Rounding may carry a point so far out of its ball, in units of eps: a few bits of float32.
_SLACK: Final = 1e-4


@dataclass(frozen=True)
class Attack:
    """One PGD attack, for any radius eps.

    Attributes:
        loss, steps, restarts, norm: as in `pgd`; steps is 1 or more.
        reach: how far all steps together could go, in units of eps; the step size is reach * eps / steps.
            2.5, the value of Madry et al., is enough to cross the ball from one side to the other.

    Raises:
        ValueError, TypeError: one of them is out of its range, or of a wrong type.
    """

    loss: AttackLoss = "log_odds"
    steps: int = 20
    restarts: int = 5
    norm: Norm = "linf"
    reach: float = REACH

    black_box: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_attack(self.loss, self.norm, self.reach, steps=self.steps, restarts=self.restarts)

    @property
    def name(self) -> str:
        return f"pgd:{loss_name(self.loss)}"

    def step_size(self, eps: float) -> float:
        return self.reach * eps / self.steps

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
        """`pgd` from one random start within eps of x."""
        return pgd(
            model,
            x,
            y,
            eps=eps,
            alpha=self.step_size(eps),
            steps=self.steps,
            loss=self.loss,
            norm=self.norm,
            bounds=bounds,
            generator=generator,
        )


@dataclass(frozen=True)
class WorstCase:
    """What is left of a classifier after every attack, sample by sample.

    Attributes:
        epsilons: the E radii, ascending.
        clean_correct: bool (N,), classified correctly without an attack.
        robust: bool (E, N), classified correctly at every point that any attack tried within that radius.
        points: (E, N, ...), for each sample the point of lowest margin found within that radius; it may come
            from a smaller radius, or be the sample itself.
        fell: int64 (N, 3), on the CPU: at which radius, to which attack and at which of its starts the sample fell, as
            indices into `epsilons` and the attacks, and the start counted from 1. (-1, -1, 0) where it was
            misclassified without an attack; (E, -1, 0) where it survived them all.
    """

    epsilons: tuple[float, ...]
    clean_correct: Tensor
    robust: Tensor
    points: Tensor
    fell: Tensor

    def clean_accuracy(self) -> float:
        return self.clean_correct.double().mean().item()

    def robust_accuracy(self) -> tuple[float, ...]:
        """Fraction of samples that survive, one value per radius."""
        return tuple(self.robust.double().mean(1).tolist())


def worst_case(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilons: Sequence[float] | Tensor,
    attacks: Sequence[AnyAttack],
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    on_restart: Callable[[float, AnyAttack], None] | None = None,
) -> WorstCase:
    """Attack every sample with every attack and count a sample as robust only if all of them fail.

    A sample that is misclassified without an attack is never robust. One that is broken, by any restart of
    any attack, is not attacked again; it counts as broken at every larger radius too, for the smaller ball
    lies inside the larger. So robust accuracy never rises with eps. An attack with one perturbation for all samples
    (`FourierAttack`) chooses it on those that still stand when its turn comes.

    Args:
        model, x, y, bounds, generator: as in `pgd`.
        epsilons: the radii, each 0 or more; order does not matter. At 0 the answer is the clean one.
        attacks: tried in this order; at least one, all in the same norm.
        batch_size: how many samples the model sees at a time.
        on_restart: called with (eps, attack) after each restart, len(epsilons) * (sum of restarts) times.

    Raises:
        ValueError: no radius or no attack, a negative radius, attacks in several norms, batch_size below 1, no samples,
            an attack that left its ball, and all that `pgd` raises.
        TypeError: `epsilons` holds no numbers, or `attacks` what is no attack for any radius.
        FloatingPointError: the model's logits are NaN, or what `pgd` raises.
    """
    epsilons = check_radii(epsilons)
    check_attacks(attacks)
    search = Search(model, x, y, bounds, batch_size, generator)
    clean_correct = search.robust()
    robust, points = [], []
    fell = torch.tensor([[-1, -1, 0]]).repeat(len(y), 1)
    fell[clean_correct.cpu(), 0] = len(epsilons)
    for radius, eps in enumerate(epsilons):
        for number, attack in enumerate(attacks):
            for start in range(1, attack.restarts + 1):
                if eps > 0:
                    search.restart(attack, eps)
                    fell[(fell[:, 0] == len(epsilons)) & ~search.robust().cpu()] = torch.tensor([radius, number, start])
                if on_restart is not None:
                    on_restart(eps, attack)
        robust.append(search.robust())
        points.append(search.points.clone())
    return WorstCase(epsilons, clean_correct, torch.stack(robust), torch.stack(points), fell)


def second_largest_softmax(model: Model, x: Tensor, *, batch_size: int = 256) -> Tensor:
    """The second largest softmax value of each sample, shape (N,).

    It is near 0 where the model is sure of one class, and at most 1/2, where two classes tie.
    """
    return all_logits(model, x, batch_size, largest={}).softmax(1).topk(2, dim=1).values[:, 1]


def check_batch_size(batch_size: int) -> int:
    checked = integer("batch_size", batch_size)
    if checked < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size!r}")
    return checked


def all_logits(model: Model, x: Tensor, batch_size: int, *, largest: dict[str, int]) -> Tensor:
    """The logits of all samples, checked as by `checked_logits`, in evaluation mode and without a gradient."""
    batch_size = check_batch_size(batch_size)
    with evaluation_mode(model), torch.no_grad():
        logits = torch.cat([checked_logits(model, part, largest=largest) for part in torch.split(x, batch_size)])
    refuse_nan(logits)
    return logits


def refuse_nan(values: Tensor) -> None:
    """FloatingPointError where logits, or what was computed from them, are NaN."""
    if values.isnan().any():
        raise FloatingPointError("the model's logits are NaN; look at its weights")


class Search:
    """The point of lowest margin found so far for each sample; at first the sample itself."""

    def __init__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        bounds: tuple[float, float],
        batch_size: int,
        generator: torch.Generator | None,
    ) -> None:
        batch_size = check_batch_size(batch_size)
        check_samples(x, y, bounds)
        if not len(y):
            raise ValueError("x must hold one sample or more, got none")
        self.model, self.x, self.y = model, x.detach(), y
        self.bounds, self.batch_size, self.generator = bounds, batch_size, generator
        self.largest = {"y": largest_label(y)}
        self.points = x.detach().clone()
        self.margins = self._margins(self.points, y)

    def robust(self) -> Tensor:
        return self.margins > 0

    def restart(self, attack: AnyAttack, eps: float) -> dict[str, Any] | None:
        """Attack, from one start, the samples that are still classified correctly.

        Returns what an attack with one perturbation for all of them has chosen; None of others.
        """
        standing = self.robust().nonzero().squeeze(1)
        chosen = None
        if isinstance(attack, UniversalAttack) and len(standing):
            x, y = self.x[standing], self.y[standing]
            settled = attack.settle(self.model, x, y, eps=eps, bounds=self.bounds, batch_size=self.batch_size)
            attack, chosen = settled, settled.found()
        for start in range(0, len(standing), self.batch_size):
            rows = standing[start : start + self.batch_size]
            x, y = self.x[rows], self.y[rows]
            try:
                found = attack.start(self.model, x, y, eps=eps, bounds=self.bounds, generator=self.generator).detach()
                margins = self._margins(found, y)
            except FloatingPointError as error:
                where = f"{attack.name}, eps {eps:.4g}, a batch of samples {int(rows[0])} to {int(rows[-1])}"
                raise FloatingPointError(f"{where}: {error}") from error
            self._check_inside(found, x, attack, eps)
            better = margins < self.margins[rows]
            self.points[rows[better]] = found[better]
            self.margins[rows[better]] = margins[better]
        return chosen

    def _margins(self, x: Tensor, y: Tensor) -> Tensor:
        margins = margins_of(all_logits(self.model, x, self.batch_size, largest=self.largest), y)
        refuse_nan(margins)  # of infinite logits
        return margins

    def _check_inside(self, found: Tensor, x: Tensor, attack: AnyAttack, eps: float) -> None:
        """An attack that takes more than it was given would make the model look weaker than it is."""
        farthest = float(lengths(found - x, attack.norm).amax())
        inside = bool(((found >= self.bounds[0]) & (found <= self.bounds[1])).all())
        if not farthest <= eps * (1 + _SLACK) + torch.finfo(x.dtype).eps or not inside:
            raise ValueError(
                f"attack {attack.name} must stay within eps={eps!r} and bounds={self.bounds!r}, got a change of "
                f"{farthest!r} and values from {found.min().item()} to {found.max().item()}"
            )
