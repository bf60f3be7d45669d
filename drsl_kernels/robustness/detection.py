"""Does a score of the model tell abnormal inputs from normal ones: attacked images, and images of another kind?

A score is read off the logits z; normal images should have more of it than abnormal ones. `SCORES` has three, for any
model, so that models with and without a Gaussian-mixture head are compared alike:

    softmax     how sure the model is: the log-odds of the largest softmax value, in the order of that value itself and
                exact where it is 1 (Hendrycks & Gimpel, arXiv 1610.02136)
    logsumexp   log sum_k exp(z_k): minus the energy of Liu et al., arXiv 2010.03759; with a `GaussianMixtureHead` the
                log-likelihood of the features under the mixture, but for a constant
    logit       max z_k: Hendrycks et al., arXiv 1911.11132; with that head the log-likelihood under the Gaussian of the
                predicted class, as in the code of Wan et al. (WeitaoVan/L-GM-loss, of arXiv 1803.02988)

An attack that knows nothing of the score is easily found; one that goes for the score, too, is the test (Carlini &
Wagner, arXiv 1705.07263). `detect` makes both. Relies on `attack_objects`, `data` and scikit-learn; `detection_run`
and `detection_report` rely on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from drsl_kernels import softmax_loss

from .attack_losses import AttackLoss
from .attack_objects import PGD
from .attacks import evaluation_mode
from .data import load
from .random_streams import generator_for

__all__ = [
    "ATTACKS",
    "MOST_IMAGES",
    "SCORES",
    "WEIGHTS",
    "Detection",
    "detect",
    "strangers_to",
]

MOST_IMAGES: Final = 1000  # of each kind, the first

# The joint attack ascends the log-odds of the wrong classes as far as _ENOUGH, in nats, by where the image is
# misclassified, plus each of WEIGHTS, in turn, times the score that the wrong classes give. With the score of all
# classes and log-odds without end it is weaker: that score first draws it back to the label, and then the odds draw it
# past the highest score. (On the digits, gm at tau 1, eps 0.2: ROC-AUC of the largest logit 0.44, and 0.70 with those.)
WEIGHTS: Final = (0.1, 1.0, 10.0)
_ENOUGH: Final = 0.5

# (logits (N, C), classes (N,) that do not count as predicted, or None) -> score (N,)
Score: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]

_BATCH: Final = 256

# Data sets whose images are strange to another's, the first that is installed; the digits come with scikit-learn.
_OTHERS: Final[dict[str, tuple[str, ...]]] = {
    "digits": ("fashion_mnist", "mnist"),
    "mnist": ("fashion_mnist", "digits"),
    "fashion_mnist": ("mnist", "digits"),
    "cifar10": ("cifar100",),
    "cifar100": ("cifar10",),
}


def _sureness(logits: Tensor, without: Tensor | None) -> Tensor:
    predicted = _others(logits.detach(), without).argmax(1)
    return -softmax_loss(logits, predicted, truth="log_odds", reduction="none")


def _logsumexp(logits: Tensor, without: Tensor | None) -> Tensor:
    return _others(logits, without).logsumexp(1)


def _largest_logit(logits: Tensor, without: Tensor | None) -> Tensor:
    return _others(logits, without).amax(1)


def _others(logits: Tensor, without: Tensor | None) -> Tensor:
    return logits if without is None else logits.scatter(1, without.unsqueeze(1), -torch.inf)


SCORES: Final[dict[str, Score]] = {"softmax": _sureness, "logsumexp": _logsumexp, "logit": _largest_logit}

ATTACKS: Final = 1 + len(SCORES) * len(WEIGHTS)  # that `detect` makes


@dataclass(frozen=True)
class Detection:
    """How well one score tells abnormal images from the normal ones.

    Each figure is a ROC-AUC: the probability that a normal image has more of the score than an abnormal one, ties
    counting half. 1 finds all, 0.5 is chance, and below it abnormal images look the more normal ones.

    Attributes:
        score: one of `SCORES`.
        plain: of images that an attack on the classifier alone broke; None where it broke none.
        joint: of images that this attack or one on classifier and score together broke, each as the broken one with
            the highest score; None where none is broken.
        broken_by_plain, broken_by_joint: how many images these are.
        strangers: by the name of another kind of image.
    """

    score: str
    plain: float | None
    joint: float | None
    broken_by_plain: int
    broken_by_joint: int
    strangers: dict[str, float]


def detect(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    strangers: Mapping[str, Tensor],
    *,
    eps: float,
    steps: int,
    seed: int,
    on_attack: Callable[[str], None] | None = None,
) -> tuple[Detection, ...]:
    """Each score, of one model: against attacked images and against strangers.

    The attacks are PGD of so many steps within eps in the L-infinity norm, each from one random start: on the log-odds
    alone, and for each score and each of `WEIGHTS` on the log-odds, up to where the image is misclassified, plus the
    weight times the score that the wrong classes give.

    Args:
        x, y: normal images and their classes, on the device of the model.
        strangers: other images of the same shape, by name; see `strangers_to`.
        on_attack: called with the name of a score, or "", before each of `ATTACKS`.

    Raises:
        FloatingPointError: the model gives NaN.
    """

    def attacked(loss: AttackLoss, score: str, weight: float) -> Tensor:
        if on_attack is not None:
            on_attack(score)
        attack = PGD(eps=eps, steps=steps, loss=loss)
        generator = generator_for(seed, "detection", score, weight, device=x.device)
        parts = zip(torch.split(x, _BATCH), torch.split(y, _BATCH), strict=True)
        return torch.cat([attack(model, some, labels, generator=generator) for some, labels in parts])

    normal = _logits(model, x)
    right = normal.argmax(1) == y
    plain = _logits(model, attacked("log_odds", "", 0.0))
    foreign = {name: _logits(model, images) for name, images in strangers.items()}
    found = []
    for name, score in SCORES.items():
        joint = [_logits(model, attacked(_Joint(score, weight), name, weight)) for weight in WEIGHTS]
        values = torch.stack([score(logits, None) for logits in (plain, *joint)])
        # Of images that were wrong before, no attack can tell anything.
        broken = torch.stack([right & (logits.argmax(1) != y) for logits in (plain, *joint)])
        highest = values.masked_fill(~broken, -torch.inf).amax(0)[broken.any(0)]
        mine = score(normal, None)
        found.append(
            Detection(
                score=name,
                plain=_auc(mine, values[0][broken[0]]) if broken[0].any() else None,
                joint=_auc(mine, highest) if len(highest) else None,
                broken_by_plain=int(broken[0].sum()),
                broken_by_joint=len(highest),
                strangers={other: _auc(mine, score(logits, None)) for other, logits in foreign.items()},
            )
        )
    return tuple(found)


def strangers_to(dataset: str, x: Tensor, *, data_dir: Path | None, seed: int) -> dict[str, Tensor]:
    """Images that are not of a data set, by name, at most as many as of its images x (N, channels, height, width).

    "noise" has uniform pixels, "shuffled" the pixels of each image in another order, and what is named like a data set
    are its test images, brought to the same size. That one is left out where no suitable data set is installed.

    Args:
        data_dir: where its files may lie, besides their usual places.
    """
    generator = generator_for(seed, "strangers")
    orders = torch.rand(len(x), 1, x[0, 0].numel(), generator=generator).argsort(2)
    shuffled = x.flatten(2).gather(2, orders.expand(-1, x.shape[1], -1)).view_as(x)
    found = {"noise": torch.rand(x.shape, generator=generator), "shuffled": shuffled}
    for name in _OTHERS[dataset]:
        images = _images_of(name, data_dir)
        if images is not None:
            few, size = images[: len(x)], x.shape[2:]
            resized = F.interpolate(few, tuple(size), mode="bilinear", antialias=True).clamp(0, 1)
            found[name] = few if few.shape[2:] == size else resized
            break
    return found


@dataclass(frozen=True)
class _Joint:
    """What the joint attack ascends: being wrong, and the score of the wrong classes with it."""

    score: Score
    weight: float

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        log_odds = softmax_loss(logits, y, truth="log_odds", reduction="none")
        return log_odds.clamp(max=_ENOUGH) + self.weight * self.score(logits, y)


def _auc(normal: Tensor, abnormal: Tensor) -> float:
    kinds = [0] * len(normal) + [1] * len(abnormal)
    return float(roc_auc_score(kinds, -torch.cat([normal, abnormal]).double().cpu().numpy()))


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with evaluation_mode(model), torch.no_grad():
        logits = torch.cat([model(some) for some in torch.split(x, _BATCH)])
    if not bool(logits.isfinite().all()):
        raise FloatingPointError("the model's logits are NaN or infinite; look at its weights")
    return logits


def _images_of(dataset: str, data_dir: Path | None) -> Tensor | None:
    for folder in dict.fromkeys((data_dir, None)):
        try:
            return load(dataset, data_dir=folder, held_out="test").held_out_x
        except (FileNotFoundError, ValueError):  # a folder may hold another data set in files of the same names
            continue
    return None
