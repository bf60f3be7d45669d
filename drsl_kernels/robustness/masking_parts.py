"""What masking checks have in common: what one says, and the verdicts that tables and cascades share.

Relies on nothing else; `masking` and `cascade_checks` rely on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

__all__ = [
    "FEW",
    "Check",
    "Outcome",
    "black_box_verdict",
    "convergence_not_told",
    "convergence_verdict",
    "goes_on",
    "percent",
]

Outcome: TypeAlias = Literal["passed", "warning", "not run"]

# Shares above these are warnings.
FEW: Final = 0.01  # of the samples: gradients that vanish, softmax values of 1, what late restarts still break
_BLACK_BOX_GAIN: Final = 0.002  # AutoAttack's own check of Square; one sample alone is not enough

# Attacks that go as far as they may and overshoot, and do so honestly.
_AT_ONCE: Final = ("fgsm", "fourier")


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: of the check, in words.
        outcome: "passed", "warning" or "not run".
        sentence: what was found, and on a warning what it means for the figures.
        numbers: what the sentence rests on; shares are fractions of the samples.
        eps: the radius that it is about; None if it is about the model.
    """

    name: str
    outcome: Outcome
    sentence: str
    numbers: dict[str, Any] = field(default_factory=dict)
    eps: float | None = None


def black_box_verdict(more: int, images: int, numbers: dict[str, Any], eps: float) -> Check:
    """What it means that attacks without gradients alone broke so `more` of the images."""
    name, share = "black box", more / images
    found = (
        f"attacks without gradients break {percent(share)} of all images after attacks with gradients failed on them"
    )
    if more > 1 and share > _BLACK_BOX_GAIN:
        means = "attacks with gradients should win: the gradients mislead, and the true figure may be lower still"
        return Check(name, "warning", f"{found}; {means}", numbers, eps)
    return Check(name, "passed", found, numbers, eps)


def convergence_verdict(more: int, images: int, found: str, numbers: dict[str, Any], eps: float | None) -> Check:
    """What it means that single attacks with gradients broke so `more` of the images where others had failed."""
    if more > 1 and more / images > FEW:
        means = "unless those are blind here, stronger attacks will break more: raise steps, targets and restarts"
        return Check("convergence", "warning", f"{found}; {means}", numbers, eps)
    return Check("convergence", "passed", found, numbers, eps)


def convergence_not_told(eps: float | None) -> Check:
    """Of fewer than two attacks."""
    found = "there are not two attacks that follow gradients over many steps: one alone tells nothing"
    return Check("convergence", "not run", found, eps=eps)


def goes_on(attack: str) -> bool:
    """Whether an attack of this name goes on searching, rather than to go as far as it may at once."""
    return attack.partition(":")[0] not in _AT_ONCE


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
