"""The losses to train with: what a name and a weight tau stand for, over training and in its log.

Relies on `loss_names`, `drsl_kernels.softmax_loss` and `gaussian_mixture_loss`; whatever trains with a loss, or tells
which one it was, relies on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from drsl_kernels import gaussian_mixture_loss, softmax_loss
from drsl_kernels.spec import number

from .loss_names import BASELINE, GAUSSIAN, MARGIN, SIGSOFTMAX, SMOOTHED, TRUNCATED, LossName, short_number

__all__ = ["LARGEST_MARGIN", "BatchLoss", "BatchResult", "TrainingLoss"]

# "truncated_gce" is not truncated in so many of the steps, as in 40 of 120 epochs of the authors' training.
_UNTRUNCATED_SHARE: Final = 1 / 3

# How the margin of "gm" grows, as in the authors' example for CIFAR-100 (WeitaoVan/L-GM-loss): 0.1, doubled every 5000
# of 120000 steps, up to 0.3.
_FIRST_MARGIN: Final = 0.1
LARGEST_MARGIN: Final = 0.3
_DOUBLINGS: Final = 24  # that all steps would have


class BatchResult(NamedTuple):
    """One batch: the loss to descend, and detached sums over its rows for the log.

    `distance` is None for losses without a penalty.
    """

    loss: Tensor
    cross_entropy: Tensor
    distance: Tensor | None
    correct: Tensor


# What one step of training calls: (logits, y, label_smoothing=...) -> its loss and the sums of its log.
BatchLoss: TypeAlias = Callable[..., BatchResult]


@dataclass(frozen=True)
class TrainingLoss:
    """A loss to train with, averaged over the batch: "ce" is `torch.nn.functional.cross_entropy`; the name of a
    distance of `drsl_kernels.fused_drsl_loss` is cross-entropy plus tau times that distance; "label_smoothing" is
    cross-entropy with labels smoothed by tau; "gce" (q = 0.7), "mae" and "log_odds" are those of
    `drsl_kernels.softmax_loss`, "truncated_gce" is "gce" with threshold tau from a third of the training on; "isce" is
    `drsl_kernels.isce_loss` with margin tau; "sigsoftmax" is cross-entropy with that activation; "gm" is
    `drsl_kernels.gaussian_mixture_loss` with likelihood tau, on the logits of a `drsl_kernels.GaussianMixtureHead`,
    with a margin that grows from 0.1 to 0.3 in training. "gce:0.5" and "truncated_gce:0.5" have another q; "gce+kl"
    adds tau times a distance, to "gce", "mae", "log_odds" or "sigsoftmax". The name is kept in its shortest form.

    Raises:
        ValueError: an unknown name, tau not finite or negative, a tau of 1 or more for label smoothing, or a tau other
            than 0 for a loss that takes none.
        TypeError: tau is no number.
    """

    name: str
    tau: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", str(self.parts))
        if not 0 <= number(f"tau of {self.name}", self.tau) < math.inf:
            raise ValueError(f"tau of {self.name} must be 0 or more and finite, got {self.tau!r}")
        if not self.parts.takes_tau and self.tau != 0:
            raise ValueError(f"tau of {self.name} must be 0: it has no penalty; got {self.tau!r}")
        if self.parts.base in (SMOOTHED, TRUNCATED) and self.tau >= 1:
            raise ValueError(f"tau of {self.name} must be below 1, got {self.tau!r}")

    @property
    def parts(self) -> LossName:
        return LossName.parse(self.name)

    @property
    def has_distance(self) -> bool:
        return self.parts.distance is not None

    @property
    def head(self) -> str:
        """Which of `models.HEADS` the model needs."""
        return "gaussian" if self.name == GAUSSIAN else "linear"

    def at(self, step: int, steps: int) -> BatchLoss:
        """The loss of one step of training, counted from 0, of so many.

        The margin of "gm" grows with them, and "truncated_gce" has no threshold in the first of them.
        """
        if self.parts.base == TRUNCATED and step < _UNTRUNCATED_SHARE * steps:
            return TrainingLoss(str(LossName("gce", self.parts.q)))
        if self.name != GAUSSIAN:
            return self
        doublings = min(_DOUBLINGS * step // steps, 2)
        return partial(self, alpha=min(_FIRST_MARGIN * 2**doublings, LARGEST_MARGIN))

    def smoothing(self, label_smoothing: float) -> float:
        """How much labels are smoothed, where training asks for `label_smoothing`: that, or what the loss is named for.

        ValueError where it is not 0 and the loss smooths labels itself.
        """
        if self.name != SMOOTHED:
            return label_smoothing
        if label_smoothing:
            raise ValueError(f"label_smoothing must be 0 with loss {self}, got {label_smoothing!r}")
        return self.tau

    def tau_text(self) -> str:
        """tau as short as it can be written without becoming another number."""
        return short_number(self.tau)

    def __str__(self) -> str:
        return f"{self.name} tau={self.tau_text()}" if self.parts.takes_tau else self.name

    def arguments(self) -> dict[str, Any]:
        """Those of `drsl_kernels.softmax_loss`; not for "ce", "label_smoothing" and "gm"."""
        base, q, distance = self.parts
        arguments: dict[str, Any] = {} if q is None else {"q": q}
        if distance is not None:
            arguments |= {"distance": distance, "tau": self.tau}
        if base == TRUNCATED:
            return arguments | {"truth": "gce", "threshold": self.tau}
        if base == MARGIN:
            return arguments | {"margin": self.tau}
        return arguments | ({"activation": SIGSOFTMAX} if base == SIGSOFTMAX else {"truth": base})

    def __call__(self, logits: Tensor, y: Tensor, *, label_smoothing: float = 0.0, alpha: float = 0.0) -> BatchResult:
        """logits (N, C), y (N,) -> the mean loss and the sums of the log; alpha is the margin of "gm".

        `label_smoothing`, as in `F.cross_entropy`, changes the loss and not the cross-entropy of the log, which is of
        the loss's own activation and margin. ValueError where it is not 0 and it is not defined with smoothed labels.
        """
        label_smoothing = self.smoothing(label_smoothing)
        if self.name == GAUSSIAN:
            loss = gaussian_mixture_loss(logits, y, alpha=alpha, likelihood=self.tau, label_smoothing=label_smoothing)
            detached = logits.detach()
            plain = F.cross_entropy(detached, y, reduction="sum")
            return BatchResult(loss, plain, None, (detached.argmax(1) == y).sum())
        if self.name in (BASELINE, SMOOTHED):
            loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
            detached = logits.detach()
            correct = (detached.argmax(1) == y).sum()
            plain = F.cross_entropy(detached, y) if label_smoothing else loss.detach()
            return BatchResult(loss, plain * len(y), None, correct)
        loss, stats = softmax_loss(logits, y, label_smoothing=label_smoothing, return_stats=True, **self.arguments())
        distances = stats.distance.sum() if self.has_distance else None
        return BatchResult(loss, stats.cross_entropy.sum(), distances, stats.correct.sum())
