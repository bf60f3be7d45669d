"""Attacks by name, as the command line knows them: `pgd:margin`, `square`, `transfer:ce`.

Relies on the attacks themselves; `attack_run`, `judging` and the commands rely on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from torch import Tensor

from drsl_kernels.spec import integer

from .attack_kinds import AnyAttack, SingleStep, TargetedAttack, Transfer, loss_name
from .attack_losses import ATTACK_LOSSES, AttackLoss, AttackLossName
from .attacks import Model, Norm
from .autoattack import AUTOATTACK, STANDARD, AutoAttackMember
from .evaluate import Attack
from .fourier import FourierAttack

__all__ = [
    "FOURIER",
    "KINDS",
    "ONLY_LINF",
    "TRAINING",
    "AttackParameters",
    "attacks_in_words",
    "canonical_names",
    "describe",
    "eps_names",
    "least_classes",
    "make_attack",
]

# The loss that is meant where none is named.
_DEFAULT_LOSS: Final = {"fgsm": "log_odds", "pgd": "log_odds", "pgd-t": "margin", "transfer": "log_odds"}

TRAINING: Final = "training"  # the loss that the checkpoint was trained with
FOURIER: Final = "fourier"
KINDS: Final = (*_DEFAULT_LOSS, FOURIER, *AUTOATTACK, "autoattack")
ONLY_LINF: Final = ("fgsm", FOURIER)


@dataclass(frozen=True)
class AttackParameters:
    """The numbers of all attacks that one command runs.

    Attributes:
        norm: of the balls.
        steps, restarts: of PGD, targeted PGD and transferred PGD.
        targets: classes that targeted attacks try.
        iterations: of APGD and FAB.
        queries: of Square.

    Raises:
        ValueError: a number below 1, or an unknown norm.
        TypeError: a number that is no integer.
    """

    norm: Norm = "linf"
    steps: int = 20
    restarts: int = 5
    targets: int = 9
    iterations: int = 100
    queries: int = 5000

    def __post_init__(self) -> None:
        for argument in ("steps", "restarts", "targets", "iterations", "queries"):
            if integer(argument, getattr(self, argument)) < 1:
                raise ValueError(f"{argument} must be 1 or more, got {getattr(self, argument)!r}")
        AutoAttackMember("square", self.norm)


def canonical_names(names: Sequence[str]) -> tuple[str, ...]:
    """Every name with its loss, `autoattack` as its members, nothing twice.

    Raises:
        ValueError: an unknown attack or loss.
    """
    members = [member for name in names for member in (STANDARD if name == "autoattack" else (name,))]
    return tuple(dict.fromkeys(_canonical(name) for name in members))


def make_attack(
    name: str,
    parameters: AttackParameters,
    *,
    training_loss: Callable[[Tensor, Tensor], Tensor],
    source: Model | None = None,
    source_label: str = "",
) -> AnyAttack:
    """The attack of a canonical name; `training_loss` is what a name that ends in ``:training`` ascends."""
    kind, _, ending = name.partition(":")
    if kind in AUTOATTACK:
        return AutoAttackMember(
            kind,
            parameters.norm,
            steps=parameters.iterations,
            queries=parameters.queries,
            targets=parameters.targets,
        )
    if kind in ONLY_LINF and parameters.norm != "linf":
        raise ValueError(f"{kind} is an attack in the norm 'linf', got {parameters.norm!r}")
    if kind == FOURIER:
        return FourierAttack()
    loss: AttackLoss = training_loss if ending == TRAINING else cast(AttackLossName, ending)
    if kind == "fgsm":
        return SingleStep(loss)
    if kind == "pgd-t":
        return TargetedAttack(loss, parameters.steps, parameters.restarts, parameters.norm, parameters.targets)
    pgd = Attack(loss, parameters.steps, parameters.restarts, parameters.norm)
    if kind == "pgd":
        return pgd
    if source is None:
        raise ValueError(f"{name} needs a checkpoint to transfer from")
    return Transfer(source, pgd, source_label)


def least_classes(name: str) -> int:
    """How many classes a model must have for the attack of a canonical name."""
    return {"pgd-t:dlr": 4, "apgd-t": 4, "apgd-dlr": 3}.get(name, 3 if name.endswith(":dlr") else 2)


def attacks_in_words(names: Sequence[str], parameters: AttackParameters) -> str:
    """Which attacks these are, and how long they are tried."""
    said = {
        "fgsm": "fgsm with one step",
        "pgd:": f"PGD with {parameters.steps} steps and {_count(parameters.restarts, 'random start')}",
        "pgd-t": f"the same towards {_count(parameters.targets, 'wrong class', 'es')} (pgd-t)",
        "transfer": f"PGD-{parameters.steps} on another model, its points shown to this one (transfer)",
        "fourier": "the wave that fools most of the images attacked, the same for all of them (fourier)",
        "apgd": f"{_members(names, 'apgd', parameters)} with {parameters.iterations} steps",
        "fab": f"{_members(names, 'fab', parameters)} with {parameters.iterations} steps",
        "square": f"Square with {parameters.queries} queries",
    }
    found = []
    for begin, text in said.items():
        losses = [name.partition(":")[2] for name in names if name.startswith(begin)]
        if losses:
            found.append(text + (f" on {', '.join(losses)}" if all(losses) else ""))
    return ", ".join(found)


def eps_names(epsilons: Sequence[float]) -> list[str]:
    """The radii as short as four digits can tell them apart, or else as more can."""
    for digits in range(4, 18):  # 17 tell all numbers apart
        names = [f"{eps:.{digits}g}" for eps in epsilons]
        if len(set(names)) == len(set(epsilons)):
            break
    return names


def describe(attack: AnyAttack) -> dict[str, Any]:
    """All that decides what an attack does, but for the models and the radius, as names and numbers."""
    fields = {field: getattr(attack, field) for field in type(attack).__dataclass_fields__}  # type: ignore[attr-defined]
    fields.pop("source", None)
    if "base" in fields:
        fields["base"] = describe(fields["base"])
    if "loss" in fields:
        fields["loss"] = loss_name(fields["loss"])
    return {"kind": type(attack).__name__, **fields}


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else plural}"


def _members(names: Sequence[str], begin: str, parameters: AttackParameters) -> str:
    """Those of a family of AutoAttack."""
    targets = f" ({_count(parameters.targets, 'target')})"
    members = [name.upper() + targets * name.endswith("-t") for name in names if name.startswith(begin)]
    return " and ".join([", ".join(members[:-1]), members[-1]] if len(members) > 1 else members)


def _canonical(name: str) -> str:
    kind, colon, loss = name.partition(":")
    if kind not in KINDS:
        raise ValueError(f"unknown attack {name!r}; choose from {', '.join(KINDS)}")
    if kind not in _DEFAULT_LOSS:
        if colon:
            raise ValueError(f"attack {kind!r} has a loss of its own, got {name!r}")
        return kind
    losses = (*ATTACK_LOSSES, TRAINING)
    if colon and loss not in losses:
        raise ValueError(f"unknown loss in attack {name!r}; choose from {', '.join(losses)}")
    return f"{kind}:{loss or _DEFAULT_LOSS[kind]}"
