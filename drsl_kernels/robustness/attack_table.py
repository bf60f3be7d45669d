"""Attacks beside each other: what each leaves on its own, and what all together leave, radius by radius.

Relies on `evaluate`; `masking`, `attack_run` and `attack_report` rely on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from drsl_kernels.spec import number

from .attack_kinds import AnyAttack, check_attacks, check_radii
from .attacks import Model
from .evaluate import Search

__all__ = ["AttackOutcome", "AttackTable", "attack_table", "run_attack"]


@dataclass(frozen=True)
class AttackOutcome:
    """One attack at one radius, alone.

    Attributes:
        attack, black_box: of which attack this is, and whether it does without gradients of the model.
        eps: the radius.
        restarts: how many starts it had.
        fell: int64 (N,), on the CPU: the start that broke the sample, counted from 1; 0 where it was misclassified
            without an attack, and -1 where it survived them all.
        seconds: wall time.
        found: what an attack with one perturbation for all samples chose; None of others, and where none stood.
    """

    attack: str
    black_box: bool
    eps: float
    restarts: int
    fell: Tensor
    seconds: float
    found: dict[str, Any] | None = None

    @property
    def robust(self) -> Tensor:
        """bool (N,): classified correctly without an attack and after every start of this one."""
        return self.fell < 0

    def standing(self) -> list[int]:
        """How many samples were robust after each start."""
        return [int(((self.fell < 0) | (self.fell > start)).sum()) for start in range(1, self.restarts + 1)]

    def accuracy(self) -> float:
        return self.robust.double().mean().item()


@dataclass(frozen=True)
class AttackTable:
    """Every outcome of several attacks at several radii, on the same samples in the same order.

    Attributes:
        clean_correct: bool (N,), on the CPU: classified correctly without an attack.
        outcomes: one for each attack and radius.
    """

    clean_correct: Tensor
    outcomes: tuple[AttackOutcome, ...]

    @property
    def attacks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(outcome.attack for outcome in self.outcomes))

    @property
    def epsilons(self) -> tuple[float, ...]:
        """Ascending."""
        return tuple(sorted({outcome.eps for outcome in self.outcomes}))

    def clean_accuracy(self) -> float:
        return self.clean_correct.double().mean().item()

    def of(self, attack: str, eps: float) -> AttackOutcome:
        """That of one attack at one radius. ValueError where there is none."""
        for outcome in self.outcomes:
            if (outcome.attack, outcome.eps) == (attack, eps):
                return outcome
        held = f"{', '.join(self.attacks)} at {', '.join(map(repr, self.epsilons))}"
        raise ValueError(f"no outcome of attack {attack!r} at eps {eps!r}; there are {held}")

    def robust(self, eps: float, *, black_box: bool | None = None) -> Tensor:
        """bool (N,): survives every attack at every radius up to eps; only black-box attacks or only others, if said.

        The smaller ball lies inside the larger, so a sample that falls at one radius falls at every larger one.
        """
        robust = self.clean_correct.clone()
        for outcome in self.outcomes:
            if outcome.eps <= eps and black_box in (None, outcome.black_box):
                robust &= outcome.robust
        return robust

    def worst_case(self) -> dict[float, float]:
        """Robust accuracy over all attacks, sample by sample, for each radius; it never rises with the radius."""
        return {eps: self.robust(eps).double().mean().item() for eps in self.epsilons}


def attack_table(
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
) -> AttackTable:
    """Run every attack at every radius on every sample that is classified correctly.

    `worst_case` gives the last line of this table for less time, for it attacks no sample that has fallen already.

    Args:
        model, x, y, epsilons, attacks, bounds, batch_size, generator, on_restart: as in `worst_case`; the attacks
            have names of their own, by which the table knows them.

    Raises:
        ValueError, TypeError: as `worst_case`, or two attacks of one name.
    """
    radii = check_radii(epsilons)
    check_attacks(attacks)
    names = [attack.name for attack in attacks]
    if len(set(names)) < len(names):
        raise ValueError(f"attacks must have names of their own, got {', '.join(names)}")
    clean = Search(model, x, y, bounds, batch_size, None).robust().cpu()
    outcomes = [
        run_attack(
            model,
            x,
            y,
            attack,
            eps,
            bounds=bounds,
            batch_size=batch_size,
            generator=generator,
            on_restart=on_restart,
        )
        for eps in radii
        for attack in attacks
    ]
    return AttackTable(clean, tuple(outcomes))


def run_attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    attack: AnyAttack,
    eps: float,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    on_restart: Callable[[float, AnyAttack], None] | None = None,
) -> AttackOutcome:
    """One attack at one radius; a sample that one start breaks is not attacked by the next.

    Args, errors: as in `attack_table`.
    """
    eps = number("eps", eps)
    if not 0 <= eps < torch.inf:
        raise ValueError(f"eps must be 0 or more and finite, got {eps!r}")
    begin = perf_counter()
    search = Search(model, x, y, bounds, batch_size, generator)
    fell = search.robust().long().cpu().neg()  # -1 for those that stand, 0 for the others
    found = None
    for start in range(1, attack.restarts + 1):
        if eps > 0:
            found = search.restart(attack, eps)
        fell[(fell < 0) & ~search.robust().cpu()] = start
        if on_restart is not None:
            on_restart(eps, attack)
    return AttackOutcome(
        attack=attack.name,
        black_box=attack.black_box,
        eps=eps,
        restarts=attack.restarts,
        fell=fell,
        seconds=perf_counter() - begin,
        found=found,
    )
