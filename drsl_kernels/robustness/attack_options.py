"""Options of attacks that several commands have, and what they say together.

Relies on `options` and `attack_names`; `attack_command` and `compare_command` rely on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import click
from click.core import ParameterSource

from .attack_losses import ATTACK_LOSSES
from .attack_names import KINDS, TRAINING, AttackParameters
from .attacks import Norm
from .autoattack import AUTOATTACK, require_package
from .options import Attacks, Decorator

__all__ = [
    "attack_parameters",
    "attacks_option",
    "check_package",
    "iterations_option",
    "queries_option",
    "refuse_unused",
    "restarts_option",
    "steps_option",
    "targets_option",
]

_NUMBERS: Final = AttackParameters()

_PGD: Final = ("pgd", "pgd-t", "transfer")
_USED_BY: Final = {
    "steps": _PGD,
    "restarts": _PGD,
    "targets": ("pgd-t", "apgd-t", "fab-t"),
    "iterations": tuple(name for name in AUTOATTACK if name != "square"),
    "queries": ("square",),
}


def attacks_option(default: Sequence[str], kinds: Sequence[str] = KINDS) -> Decorator:
    """--attacks, of so many kinds."""
    with_loss = [kind for kind in ("fgsm", "pgd", "pgd-t", "transfer") if kind in kinds]
    return click.option(
        "--attacks",
        type=Attacks(),
        default=",".join(default),
        show_default=True,
        help=f"What to attack with, names with commas between, of {', '.join(kinds)}. After "
        f"{', '.join(with_loss[:-1])} and {with_loss[-1]} a colon and what to make large may follow: "
        f"{', '.join((*ATTACK_LOSSES, TRAINING))}, the last being the loss that the model was trained with. pgd-t is "
        "PGD towards each of the likeliest wrong classes, fourier the one wave, of all, that fools most images. "
        f"{', '.join(AUTOATTACK)} need the extra 'autoattack'; the "
        "name autoattack stands for the standard four of them.",
    )


def _number(name: str, default: int, text: str) -> Decorator:
    return click.option(name, type=click.IntRange(min=1), default=default, show_default=True, help=text)


steps_option = _number("--steps", _NUMBERS.steps, "Gradient steps of PGD.")
restarts_option = _number(
    "--restarts",
    _NUMBERS.restarts,
    "Random starts of PGD. Those of AutoAttack have one, as in its standard version.",
)
targets_option = _number(
    "--targets",
    _NUMBERS.targets,
    "Classes that targeted attacks (pgd-t, apgd-t, fab-t) try, the likeliest wrong ones first.",
)
iterations_option = _number("--iterations", _NUMBERS.iterations, "Steps of APGD and FAB.")
queries_option = _number("--queries", _NUMBERS.queries, "Points that Square looks at.")


def attack_parameters(options: dict[str, Any], norm: Norm = "linf") -> AttackParameters:
    names = ("steps", "restarts", "targets", "iterations", "queries")
    return AttackParameters(norm, *(options[name] for name in names))


def refuse_unused(attacks: Sequence[str]) -> None:
    """Refuse a number that is given for attacks that are not run: whoever gives it believes that it does something."""
    context = click.get_current_context()
    for option, kinds in _USED_BY.items():
        given = context.get_parameter_source(option) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
        if given and not any(name.partition(":")[0] in kinds for name in attacks):
            raise click.UsageError(f"--{option} needs one of {', '.join(kinds)} among --attacks")


def check_package(attacks: Sequence[str]) -> None:
    """Find out before the work, not in its midst, that a package is missing."""
    if any(name in AUTOATTACK for name in attacks):
        try:
            require_package()
        except ModuleNotFoundError as error:
            raise click.ClickException(str(error)) from error
