"""Is a robust accuracy to be believed? Checks for models that look robust because attacks cannot see.

Each check is a function that returns a `Check`: an outcome, a sentence for the reader, and the numbers behind it. None
of them proves a figure; each that warns is a reason to doubt it. Samples and labels that `pgd` does not take, or none,
are errors, and so are logits that are NaN. Relies on `evaluate`, `attack_table` and `masking_parts`; `attack_run` and
`run_checks` rely on it.

Sources: Athalye et al., arXiv 1802.00420, section 3.1; Carlini et al., arXiv 1902.06705, sections 4 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from drsl_kernels import softmax_loss
from drsl_kernels.spec import integer

from .attack_losses import AttackLossName, margins_of
from .attack_objects import REACH
from .attack_table import AttackOutcome, AttackTable, run_attack
from .attacks import Model, Norm, check_samples, checked_logits, evaluation_mode, largest_label, pgd
from .evaluate import Attack, all_logits, check_batch_size, refuse_nan
from .masking_parts import (
    FEW,
    Check,
    Outcome,
    black_box_verdict,
    convergence_not_told,
    convergence_verdict,
    goes_on,
    percent,
)

__all__ = [
    "Check",
    "Outcome",
    "attacks_agree",
    "black_box_beats_white_box",
    "checks_of_model",
    "falls_with_eps",
    "gradients_vanish",
    "never_rises",
    "outputs_vary",
    "restarts_saturate",
    "rises_with_steps",
    "softmax_saturates",
]

# A larger share than this that stands, although the ball holds an image on which the model is wrong, is a warning.
_LEFT: Final = 0.01

_LOSSES_THAT_SEE: Final[tuple[AttackLossName, ...]] = ("log_odds", "margin")  # where the softmax is saturated, too

_SHARE_OF_RISE: Final = 0.05  # how much less than one step many steps may gain, relative to the gain of one

# AutoAttack's own check of randomized models: how far apart logits of unit length may be, in two passes.
_VARIATION: Final = 1e-4


def checks_of_model(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> dict[str, Callable[[], Check]]:
    """The checks that need neither a radius nor the outcome of attacks, by name, to be made one by one."""
    look: dict[str, Any] = {"batch_size": batch_size}
    return {
        "gradients": partial(gradients_vanish, model, x, y, **look),
        "saturation": partial(softmax_saturates, model, x, y, **look),
        "randomness": partial(outputs_vary, model, x, **look),
        "large eps": partial(falls_with_eps, model, x, y, norm=norm, generator=generator, **look),
    }


def gradients_vanish(model: Model, x: Tensor, y: Tensor, *, batch_size: int = 256) -> Check:
    """The share of samples whose input gradient is exactly 0, of `F.cross_entropy` in float32 and of the log-odds.

    The first is how float32 rounds, and blinds attacks on cross-entropy alone. The second is the model's own doing
    (rounded inputs, a detach, dead units) and blinds every attack that uses gradients.
    """
    name = "gradients"
    of_cross_entropy = _zero_gradients(model, x, y, _cross_entropy, batch_size)
    of_log_odds = _zero_gradients(model, x, y, _log_odds, batch_size)
    numbers = {"zero_cross_entropy": of_cross_entropy, "zero_log_odds": of_log_odds, "samples": len(y)}
    found = (
        f"the gradient with respect to the image is exactly zero on {percent(of_cross_entropy)} of {len(y)} images "
        f"with F.cross_entropy in float32, on {percent(of_log_odds)} with the log-odds"
    )
    if of_log_odds > FEW:
        means = "attacks that follow gradients are blind there: believe Square and transfer attacks alone"
        return Check(name, "warning", f"{found}; {means}", numbers)
    if of_cross_entropy > FEW:
        means = "attacks on cross-entropy (FGSM, PGD, APGD-CE) are blind there: believe those on log_odds, margin, dlr"
        return Check(name, "warning", f"{found}; {means}", numbers)
    return Check(name, "passed", found, numbers)


def softmax_saturates(model: Model, x: Tensor, y: Tensor, *, batch_size: int = 256) -> Check:
    """The share of samples whose softmax is exactly 1 for the label, in float32: their loss is 0, and says nothing."""
    logits = _logits_of(model, x, y, batch_size).float()
    share = (logits.softmax(1).gather(1, y.unsqueeze(1)) == 1).double().mean().item()
    median = margins_of(logits, y).median().item()
    numbers = {"saturated": share, "median_margin": median, "samples": len(y)}
    found = f"the softmax of the label is exactly 1 in float32 on {percent(share)} of {len(y)} images"
    if share > FEW:
        found += f" (median lead of its logit: {median:.3g}); losses that are computed from it are rounded away there"
        return Check("saturation", "warning", found, numbers)
    return Check("saturation", "passed", found, numbers)


def outputs_vary(model: Model, x: Tensor, *, batch_size: int = 256) -> Check:
    """Whether two passes over the same samples, in evaluation mode, give different logits."""
    classes = torch.zeros(len(x), dtype=torch.int64, device=x.device)  # any will do
    first, second = (F.normalize(_logits_of(model, x, classes, batch_size).double(), dim=1) for _ in range(2))
    difference = torch.linalg.vector_norm(first - second, dim=1).max().item()
    numbers = {"difference": difference, "samples": len(x)}
    if difference > _VARIATION:
        means = "it is random, so attacks must average over its noise, which these do not, and a figure is one draw"
        return Check("randomness", "warning", f"the model answers differently when asked twice; {means}", numbers)
    return Check("randomness", "passed", "the model answers the same when asked twice", numbers)


def black_box_beats_white_box(table: AttackTable, eps: float) -> Check:
    """Whether Square or a transferred attack breaks samples that no attack with gradients broke."""
    name = "black box"
    if eps not in table.epsilons:
        raise ValueError(f"eps must be one of the table's, {', '.join(map(repr, table.epsilons))}; got {eps!r}")
    kinds = {outcome.black_box for outcome in table.outcomes}
    if kinds != {True, False}:
        missing = "Square and no transfer attack" if True not in kinds else "attack that uses gradients"
        return Check(name, "not run", f"no {missing} was run, so there is nothing to compare", eps=eps)
    white, all_together = table.robust(eps, black_box=False), table.robust(eps)
    more = int((white & ~all_together).sum())
    best = {
        kind: min(o.accuracy() for o in table.outcomes if o.eps == eps and o.black_box == kind)
        for kind in (True, False)
    }
    numbers = {"broken_by_black_box_alone": more / len(white), "black_box": best[True], "white_box": best[False]}
    return black_box_verdict(more, len(white), numbers, eps)


def attacks_agree(outcomes: Sequence[AttackOutcome]) -> Check:
    """Whether, of several attacks with gradients at one radius, single ones broke more than a few samples that none of
    the others broke.

    Where they did, the others are blind, or a further attack would break more, and the worst case is too high. Single
    steps and waves are left out.
    """
    outcomes = [outcome for outcome in outcomes if goes_on(outcome.attack) and not outcome.black_box]
    eps = _one_radius(outcomes)
    if len(outcomes) < 2:
        return convergence_not_told(eps)
    fell = torch.stack([outcome.fell > 0 for outcome in outcomes])
    alone = (fell & (fell.sum(0) == 1)).sum(1)
    more, images, attack = int(alone.sum()), fell.shape[1], outcomes[int(alone.argmax())].attack
    share = more / images
    found = f"{percent(share)} of all images are broken by a single one of the attacks with gradients"
    if share:
        found += f", most of them by {attack}"
    return convergence_verdict(more, images, found, {"broken_by_one": share, "attack": attack}, eps)


def falls_with_eps(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    steps: int = 20,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Check:
    """Whether attacks find what breaks an image where the ball holds, for all images alike, one that is plain grey.

    Within 0.5 of every image (in the L2 norm sqrt(d) / 2, for d values in an image) lies the one that is 0.5 all over.
    The model is right there for one class alone. An image of another class that survives does so because the attack
    fails; of those of that class nothing can be told. In `numbers`, "left" is the share of the former that survive,
    and "chance" the share of the latter, surviving or not.
    """
    name = "large eps"
    _check(x, y, batch_size)
    with evaluation_mode(model), torch.no_grad():
        grey = checked_logits(model, torch.full_like(x[:1], 0.5), largest={"y": largest_label(y)})
    right_at_grey = (margins_of(grey.expand(len(y), -1), y) > 0).cpu()
    if right_at_grey.all():
        return Check(
            name,
            "not run",
            "all images are of the class that the model sees in plain grey, and none of them must break",
        )
    eps = 0.5 if norm == "linf" else 0.5 * x[:1].numel() ** 0.5
    robust = torch.ones(len(y), dtype=torch.bool)
    for loss in _LOSSES_THAT_SEE:
        attack = Attack(loss, steps=steps, restarts=1, norm=norm)
        robust &= run_attack(model, x, y, attack, eps, batch_size=batch_size, generator=generator).robust
    left = (robust & ~right_at_grey).double().mean().item()
    class_of_grey, chance = int(grey.argmax()), right_at_grey.double().mean().item()
    numbers = {"eps": eps, "left": left, "chance": chance, "class_of_grey": class_of_grey, "samples": len(y)}
    found = (
        f"at eps {eps:.3g}, where every image can be made plain grey, {percent(left)} of {len(y)} images survive "
        f"although the model sees another class in grey (class {class_of_grey})"
    )
    if left > _LEFT:
        means = "none should: the attack fails, and so it may at smaller eps"
        return Check(name, "warning", f"{found}; {means}", numbers)
    return Check(name, "passed", found, numbers)


def never_rises(table: AttackTable) -> Check:
    """Whether an attack, on its own, leaves more samples standing at a larger radius than at a smaller one.

    Single steps and waves are left out.
    """
    name = "growing eps"
    if len(table.epsilons) < 2:
        return Check(name, "not run", "at a single eps nothing can be seen to fall")
    found = []
    for attack in table.attacks:
        accuracies = {eps: table.of(attack, eps).accuracy() for eps in table.epsilons}
        pairs = zip(table.epsilons, table.epsilons[1:], strict=False)
        if goes_on(attack):
            found += [(attack, *pair) for pair in pairs if accuracies[pair[1]] > accuracies[pair[0]] + FEW]
    if found:
        attack, small, large = found[0]
        says = f"{attack} leaves more images standing at eps {large:.4g} than at eps {small:.4g}: it is too weak there"
        return Check(name, "warning", says, {"rises": [list(rise) for rise in found]})
    return Check(name, "passed", "no attack leaves more images standing at a larger eps", {"rises": []})


def rises_with_steps(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    norm: Norm = "linf",
    steps: Sequence[int] = (1, 5, 20),
    batch_size: int = 256,
) -> Check:
    """Whether more steps of PGD, from the sample itself, make the mean log-odds larger, or the model right less often.

    Many steps include what one step can do, but for the length of steps. Where they gain less, the gradient at a point
    says nothing about the points around it.
    """
    name = "steps"
    steps = [integer(f"steps[{index}]", count) for index, count in enumerate(steps)]
    if len(steps) < 2 or steps[0] < 1 or steps != sorted(set(steps)):
        raise ValueError(f"steps must be two numbers or more, 1 or larger and ascending, got {steps!r}")
    _check(x, y, batch_size)
    if eps == 0:
        return Check(name, "not run", "there is no step to take at eps 0", eps=eps)
    losses, accuracies = [], []
    for count in (0, *steps):
        loss, accuracy = _after_steps(model, x, y, eps, norm, count, batch_size)
        losses.append(loss)
        accuracies.append(accuracy)
    numbers = {"steps": [0, *steps], "mean_log_odds": losses, "accuracy": accuracies, "samples": len(y)}
    clean, one, many = losses[0], losses[1], losses[-1]
    few = "1 step" if steps[0] == 1 else f"{steps[0]} steps"
    found = f"the mean log-odds of an error go from {clean:.3g} to {one:.3g} in {few} and {many:.3g} in {steps[-1]}"
    if many <= clean:
        return Check(name, "warning", f"{found}; steps along the gradient gain nothing", numbers, eps)
    means = f"{steps[-1]} steps must not do worse than {steps[0]}: the gradients mislead"
    if many < one - _SHARE_OF_RISE * abs(one - clean):
        return Check(name, "warning", f"{found}; {means}", numbers, eps)
    # One image more that is right is chance, however few there are.
    if accuracies[-1] > accuracies[1] + max(FEW, 1.5 / max(1, len(y))):
        rates = f"{percent(accuracies[1])} are right after {few} and {percent(accuracies[-1])} after {steps[-1]}"
        return Check(name, "warning", f"{rates}; {means}", numbers, eps)
    return Check(name, "passed", found, numbers, eps)


def restarts_saturate(outcomes: Sequence[AttackOutcome]) -> Check:
    """Whether, of several attacks at one radius, the second half of their random starts broke more than a few samples
    that no attack had broken in the first half.

    Where it did, further starts would break more, and the worst case over these attacks is too high.
    """
    name = "restarts"
    eps = _one_radius(outcomes)
    if not any(outcome.restarts > 1 for outcome in outcomes):
        return Check(name, "not run", "no attack had more than one start: more than one is needed to tell", eps=eps)
    fell_early, fell = torch.zeros_like(outcomes[0].robust), torch.zeros_like(outcomes[0].robust)
    for outcome in outcomes:
        half = (outcome.restarts + 1) // 2
        fell_early |= (outcome.fell >= 0) & (outcome.fell <= half)
        fell |= outcome.fell >= 0
    late = (fell & ~fell_early).double().mean().item()
    numbers = {"broken_by_later_half": late, "standing": {o.attack: o.standing() for o in outcomes}}
    found = f"the later half of the random starts broke {percent(late)} of the images beyond what the first half did"
    if late > FEW:
        return Check(name, "warning", f"{found}; more starts would break more: raise the restarts", numbers, eps)
    return Check(name, "passed", found, numbers, eps)


def _after_steps(
    model: Model, x: Tensor, y: Tensor, eps: float, norm: Norm, steps: int, batch_size: int
) -> tuple[float, float]:
    """Mean log-odds of an error, and accuracy, at the last point of so many steps from the samples."""
    losses, correct = [], []
    for rows in torch.split(torch.arange(len(y), device=y.device), batch_size):
        points = pgd(
            model,
            x[rows],
            y[rows],
            eps=eps,
            alpha=eps if steps <= 1 else REACH * eps / steps,
            steps=steps,
            norm=norm,
            random_start=False,
            keep="last",
        )
        logits = _logits_of(model, points, y[rows], batch_size)
        losses.append(_log_odds(logits, y[rows]))
        correct.append(margins_of(logits, y[rows]) > 0)
    return torch.cat(losses).double().mean().item(), torch.cat(correct).double().mean().item()


def _zero_gradients(
    model: Model, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor], batch_size: int
) -> float:
    """The share of samples for which no value of the gradient with respect to x differs from 0."""
    _check(x, y, batch_size)
    largest = {"y": largest_label(y)}
    zero = []
    with evaluation_mode(model), torch.inference_mode(False), torch.enable_grad():
        for points, labels in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
            inputs = points.detach().clone().requires_grad_()
            losses = loss(checked_logits(model, inputs, largest=largest), labels.clone())
            refuse_nan(losses)
            gradient = None
            if losses.requires_grad:
                (gradient,) = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
            # Where no gradient arrives at all, as behind a detach(), it is as good as zero.
            zero.append(torch.ones(len(labels)) if gradient is None else (gradient == 0).flatten(1).all(1).cpu())
    return torch.cat(zero).double().mean().item()


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), y, reduction="none")


def _log_odds(logits: Tensor, y: Tensor) -> Tensor:
    return softmax_loss(logits, y, truth="log_odds", reduction="none")


def _logits_of(model: Model, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    _check(x, y, batch_size)
    return all_logits(model, x, batch_size, largest={"y": largest_label(y)})


def _check(x: Tensor, y: Tensor, batch_size: int) -> None:
    check_batch_size(batch_size)
    check_samples(x, y, (-math.inf, math.inf))
    if not len(x):
        raise ValueError("x must hold one image or more, got none: there is nothing to check")


def _one_radius(outcomes: Sequence[AttackOutcome]) -> float | None:
    """The radius of all outcomes, None where there are none."""
    radii, counts = {outcome.eps for outcome in outcomes}, {len(outcome.fell) for outcome in outcomes}
    if len(radii) > 1:
        raise ValueError(f"outcomes must be at one eps, got {', '.join(f'{eps:g}' for eps in sorted(radii))}")
    if len(counts) > 1:
        raise ValueError(f"outcomes must be of the same images, got {', '.join(map(str, sorted(counts)))} of them")
    return next(iter(radii), None)
