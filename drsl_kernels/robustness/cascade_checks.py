"""Masking checks that rest on a cascade of attacks alone: what the last, late starts and Square broke.

In a cascade each image falls once, at the smallest radius and to the first attack that breaks it, and is not attacked
again; what another attack would have done to it cannot be told, and is not guessed. Relies on `masking_parts` and
`judging`; `run_checks` relies on it.
"""

from __future__ import annotations

from .attack_kinds import AnyAttack
from .judging import Judging, RunResult
from .masking_parts import (
    FEW,
    Check,
    black_box_verdict,
    convergence_not_told,
    convergence_verdict,
    goes_on,
    percent,
)

__all__ = ["black_box_after_gradients", "last_attack", "late_starts"]


def black_box_after_gradients(result: RunResult, judging: Judging, radius: int) -> Check:
    """Whether attacks without gradients broke images on which all others had just failed, at one radius."""
    eps, name = judging.epsilons[radius], "black box"
    attacks = judging.made()
    kinds = {attack.black_box for attack in attacks}
    if kinds != {True, False}:
        missing = "Square" if True not in kinds else "attack that uses gradients"
        return Check(name, "not run", f"no {missing} was run, so there is nothing to compare", eps=eps)
    broken = sum(at == radius and attacks[attack].black_box for at, attack, _ in result.fell)
    return black_box_verdict(broken, result.images, {"broken_by_black_box_alone": broken / result.images}, eps)


def late_starts(result: RunResult, judging: Judging, radius: int) -> Check:
    """Whether more random starts would break more.

    Of what the later half of an attack's starts broke, attacks that come after it might have broken some at their
    first: only of the last attack with gradients it is certain that nothing else would have.
    """
    eps, name = judging.epsilons[radius], "restarts"
    white = _with_gradients(judging)
    if not any(attack.restarts > 1 for _, attack in white):
        return Check(name, "not run", "no attack had more than one start: more than one is needed to tell", eps=eps)
    late = {number: _late(result, radius, number, attack) for number, attack in white}
    certain, most = late[white[-1][0]], sum(late.values())
    numbers = {"broken_by_later_half": most, "of_the_last_attack": certain}
    if certain > FEW:
        found = f"the later half of the random starts of the last attack broke {percent(certain)} of the images"
        return Check(name, "warning", f"{found}; more starts would break more: raise the restarts", numbers, eps)
    found = f"the later half of the random starts broke {percent(most)} of the images"
    if most > FEW:
        means = "whether the first starts of the attacks after them would have, cannot be told: drsl attack can tell"
        return Check(name, "not run", f"{found}; {means}", numbers, eps)
    return Check(name, "passed", found, numbers, eps)


def last_attack(result: RunResult, judging: Judging, radius: int) -> Check:
    """Whether the last attack with gradients still broke more than a few images on which the others had failed.

    That it broke few says something only where those between it and the first broke few as well: else it may be the
    weaker. Single steps and waves are left out.
    """
    eps = judging.epsilons[radius]
    made = [(number, attack) for number, attack in _with_gradients(judging) if goes_on(attack.name)]
    if len(made) < 2:
        return convergence_not_told(eps)
    broken = [sum(at == radius and by == number for at, by, _ in result.fell) for number, _ in made]
    last, after_the_first = broken[-1] / result.images, sum(broken[1:]) / result.images
    name = made[-1][1].name
    found = f"{name}, the last attack with gradients, still broke {percent(last)} of the images"
    numbers = {"broken_by_last": last, "after_the_first": after_the_first, "attack": name}
    verdict = convergence_verdict(broken[-1], result.images, found, numbers, eps)
    if verdict.outcome == "passed" and sum(broken[1:]) > 1 and after_the_first > FEW:
        means = f"all after the first {percent(after_the_first)}; whether it is the strongest drsl attack can tell"
        return Check("convergence", "not run", f"{found}, {means}", numbers, eps)
    return verdict


def _with_gradients(judging: Judging) -> list[tuple[int, AnyAttack]]:
    return [(number, attack) for number, attack in enumerate(judging.made()) if not attack.black_box]


def _late(result: RunResult, radius: int, number: int, attack: AnyAttack) -> float:
    """The share of images that the later half of this attack's starts broke at this radius."""
    half = (attack.restarts + 1) // 2
    return sum(at == radius and by == number and start > half for at, by, start in result.fell) / result.images
