"""The masking checks of a comparison's runs, and what they come to over the seeds of a loss.

Those that look at the model are kept beside its weights; those that rest on the attacks of judging are made from what
those found. Relies on `masking`, `cascade_checks`, `judging` and `storage`; `experiment` and the reports rely on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from . import masking
from .attack_table import attack_table
from .cascade_checks import black_box_after_gradients, last_attack, late_starts
from .evaluate import Attack
from .judging import Judging, RunResult
from .losses import TrainingLoss
from .masking import Check, Outcome
from .storage import read_json, write_json

__all__ = [
    "CHECKS",
    "Finding",
    "check_model",
    "checks_of_cascade",
    "count_checks",
    "findings",
    "load_checks",
    "save_checks",
]

CHECKS: Final = "checks.json"

# How bad a check's numbers are; of several sentences the worst is shown.
_HOW_BAD: Final[dict[str, Callable[[dict[str, Any]], float]]] = {
    "gradients": lambda numbers: max(numbers["zero_log_odds"], numbers["zero_cross_entropy"]),
    "saturation": lambda numbers: numbers["saturated"],
    "randomness": lambda numbers: numbers["difference"],
    "large eps": lambda numbers: numbers["left"],
    "growing eps": lambda numbers: len(numbers["rises"]),
    "black box": lambda numbers: numbers["broken_by_black_box_alone"],
    "convergence": lambda numbers: numbers["broken_by_last"],
    "restarts": lambda numbers: numbers["broken_by_later_half"],
    "steps": lambda numbers: numbers["mean_log_odds"][1] - numbers["mean_log_odds"][-1],
}


# Of several outcomes, with numbers or without, the one of the highest rank is shown: that a check could not tell what
# its numbers mean counts more than that it passed elsewhere, and that it had nothing to look at counts less.
_RANKS: Final[dict[tuple[Outcome, bool], int]] = {
    ("warning", True): 3,
    ("warning", False): 3,
    ("not run", True): 2,
    ("passed", True): 1,
    ("passed", False): 1,
    ("not run", False): 0,
}


@dataclass(frozen=True)
class Finding:
    """One check over all seeds and radii of a loss: how many seeds it warns for, and its worst sentence.

    `eps` is the radius that the sentence is about, None if it is about the model.
    """

    loss: TrainingLoss
    name: str
    outcome: Outcome
    warns: int
    seeds: int
    sentence: str
    eps: float | None

    def in_words(self) -> str:
        where = "" if self.eps is None else f", eps {self.eps:.4g}"
        seeds = f"{self.warns} of {self.seeds} seeds warn; " if self.outcome == "warning" and self.seeds > 1 else ""
        return f"{self.loss}, {self.name}{where}: {seeds}{self.sentence}"


def count_checks(judging: Judging) -> int:
    """How many checks `check_model` makes."""
    return 5 + len(judging.epsilons)


def check_model(model: nn.Module, x: Tensor, y: Tensor, judging: Judging, *, seed: int) -> Iterator[Check]:
    """The checks that look at a model, one by one; x, y are the images to look at, on its device."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    for make in masking.checks_of_model(model, x, y, generator=generator).values():
        yield make()
    pgd = Attack("log_odds", steps=10, restarts=1)
    yield masking.never_rises(attack_table(model, x, y, epsilons=judging.epsilons, attacks=[pgd], generator=generator))
    for eps in judging.epsilons:
        yield masking.rises_with_steps(model, x, y, eps)


def checks_of_cascade(result: RunResult, judging: Judging) -> list[Check]:
    """The checks that rest on what judging found, radius by radius."""
    makers = (black_box_after_gradients, last_attack, late_starts)
    return [make(result, judging, radius) for radius in range(len(judging.epsilons)) for make in makers]


def save_checks(path: Path, identity: dict[str, Any], checks: Sequence[Check]) -> None:
    write_json(path, {"identity": identity, "checks": [asdict(check) for check in checks]})


def load_checks(path: Path, identity: dict[str, Any]) -> tuple[Check, ...] | None:
    """What `save_checks` wrote under the same identity, None where there is nothing of the kind."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("identity") != identity:
        return None
    try:
        return tuple(Check(**check) for check in content["checks"])
    except (KeyError, TypeError):  # not what asdict(Check) gives
        return None


def findings(loss: TrainingLoss, checks: Sequence[Sequence[Check]]) -> list[Finding]:
    """One finding for each check, in their order; `checks` holds those of each seed."""
    names = dict.fromkeys(check.name for seed in checks for check in seed)
    return [_finding(loss, [[check for check in seed if check.name == name] for seed in checks]) for name in names]


def _finding(loss: TrainingLoss, checks: Sequence[Sequence[Check]]) -> Finding:
    """Of a single check, over seeds and radii."""
    everything = [check for seed in checks for check in seed]
    worst = max(everything, key=lambda check: (_RANKS[check.outcome, bool(check.numbers)], _how_bad(check)))
    warns = sum(any(check.outcome == "warning" for check in seed) for seed in checks)
    return Finding(loss, worst.name, worst.outcome, warns, len(checks), worst.sentence, worst.eps)


def _how_bad(check: Check) -> float:
    return _HOW_BAD[check.name](check.numbers) if check.numbers else 0.0
