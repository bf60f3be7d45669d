"""What `detection` found in a comparison, over the seeds: as a table, in words, and for results.json.

Relies on `experiment`; `report`, `page` and `compare_command` rely on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from .detection import MOST_IMAGES, WEIGHTS
from .experiment import Comparison
from .loss_names import GAUSSIAN
from .losses import TrainingLoss
from .mean_std import MeanStd

__all__ = ["DetectionMeans", "detection_means", "detection_rows", "detection_words"]

# Of each score, on the logits of a linear layer and on those of a Gaussian-mixture head.
_NAMES: Final = {
    "softmax": ("largest softmax value", "largest softmax value"),
    "logsumexp": ("logsumexp (energy)", "log-likelihood, mixture"),
    "logit": ("largest logit", "log-likelihood, class"),
}

_NOTICEABLE: Final = 0.02


@dataclass(frozen=True)
class DetectionMeans:
    """The figures of `Detection`, over the seeds of a loss; None where no seed has one."""

    score: str
    plain: MeanStd | None
    joint: MeanStd | None
    broken_by_plain: MeanStd
    broken_by_joint: MeanStd
    strangers: dict[str, MeanStd]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def detection_means(comparison: Comparison, loss: TrainingLoss) -> list[DetectionMeans]:
    """One entry per score; none where detection was not asked for."""
    pairs = zip(comparison.runs, comparison.detections, strict=False)
    by_score = zip(*(found for run, found in pairs if run.loss == loss), strict=True)
    return [
        DetectionMeans(
            score=of_seeds[0].score,
            plain=_mean([one.plain for one in of_seeds]),
            joint=_mean([one.joint for one in of_seeds]),
            broken_by_plain=MeanStd.of([one.broken_by_plain for one in of_seeds]),
            broken_by_joint=MeanStd.of([one.broken_by_joint for one in of_seeds]),
            strangers={name: MeanStd.of([one.strangers[name] for one in of_seeds]) for name in of_seeds[0].strangers},
        )
        for of_seeds in by_score
    ]


def detection_rows(comparison: Comparison) -> list[list[str]]:
    """A head, then a row per loss and score; empty where detection was not asked for."""
    rows = []
    strangers: list[str] = []
    for loss in comparison.losses:
        for means in detection_means(comparison, loss):
            strangers = list(means.strangers)
            figures = [means.plain, means.joint, *means.strangers.values()]
            rows.append([str(loss), _in_words(means.score, loss), *map(_figure, figures)])
    if not rows:
        return []
    eps = comparison.settings.judging.histogram_eps()
    return [["trained with", "score", f"attacked, eps {eps:.4g}", "attacked, score too", *strangers], *rows]


def detection_words(comparison: Comparison) -> list[str]:
    """How to read the table, and what it shows; empty where detection was not asked for."""
    return list(_words(comparison)) if comparison.detections else []


def _words(comparison: Comparison) -> Iterator[str]:
    judging = comparison.settings.judging
    images = min(comparison.runs[0].images, MOST_IMAGES)
    yield (
        f"Figures are ROC-AUC, over {images} {judging.held_out} images: how often a normal image has more of the score "
        "than an abnormal one. 1 finds all, 0.5 is chance; below 0.5 the abnormal images look the more normal ones."
    )
    yield (
        f"attacked: images that PGD with {judging.parameters.steps} steps on the log-odds broke, an attack that knows "
        "nothing of the score. attacked, score too: PGD on the log-odds, until the image is misclassified, plus "
        "the score that the wrong classes give, times "
        f"{', '.join(f'{weight:g}' for weight in WEIGHTS)}, and of all broken twins of an image the one with the "
        "highest score. That is the figure to go by: an attacker who knows of the detector does this."
    )
    yield (
        "noise: uniform pixels. shuffled: the pixels of each image in another order. A data set's name: its test "
        "images, brought to the same size. Seeds in which no image was broken are left out of the mean."
    )
    for loss in comparison.losses:
        for means in detection_means(comparison, loss):
            yield from _verdict(loss, means)


def _verdict(loss: TrainingLoss, means: DetectionMeans) -> Iterator[str]:
    score = f"{loss}, {_in_words(means.score, loss)}"
    if means.joint is None:
        yield f"{score}: no attack broke an image, so nothing can be said of attacked ones."
        return
    if means.plain is None:  # the joint attack alone broke images: there is nothing to compare it with
        return
    plain, joint = means.plain.mean, means.joint.mean
    if plain < 0.5 + _NOTICEABLE:
        yield f"{score}: does not find attacked images ({plain:.2f}); they look as normal as the others, or more so."
    elif plain - joint > _NOTICEABLE:
        how = "it finds none" if joint < 0.5 + _NOTICEABLE else f"with {joint:.2f}"
        yield f"{score}: finds attacked images with {plain:.2f}, and {how} once the attack goes for the score, too."


def _in_words(score: str, loss: TrainingLoss) -> str:
    return _NAMES[score][loss.name == GAUSSIAN]


def _mean(values: Sequence[float | None]) -> MeanStd | None:
    known = [value for value in values if value is not None]
    return MeanStd.of(known) if known else None


def _figure(value: MeanStd | None) -> str:
    if value is None:
        return "none broken"
    return f"{value.mean:.3f}" + ("" if value.std is None else f" ± {value.std:.3f}")
