"""What language models are trained with, by name, and the one function through which a head's loss goes.

Relies on `drsl_kernels.fused_linear_softmax_loss` and the names of `..losses`; `model` and the reports rely on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from torch import Tensor

from drsl_kernels import fused_linear_softmax_loss
from drsl_kernels.spec import DISTANCES

from ..loss_names import ALIASES, BASELINE, LOSS_NAMES, SIGSOFTMAX, SMOOTHED
from ..losses import TrainingLoss

__all__ = ["DEFAULT_TAUS", "LANGUAGE_LOSSES", "MIXTURES", "HeadName", "LanguageLoss", "linear_head_loss"]

HeadName: TypeAlias = Literal["linear", "sigsoftmax", "mixture_of_softmax", "mixture_of_sigsoftmax"]

MIXTURES: Final = ("mixture_of_softmax", "mixture_of_sigsoftmax")
LANGUAGE_LOSSES: Final = (*LOSS_NAMES, SMOOTHED, SIGSOFTMAX, *MIXTURES)

# Tried once each on the validation part of the standard library's text, with a seed that the default does not use, 400
# steps and batches of 8: perplexity, and under PGD within 0.1 and 0.2 of the mean length of the vectors.
#
#   ce                                7.3   37  164      non_target_logits  0.001    8.5   18   38
#   uniform            0.3            7.5   35  170      non_target_logits  0.01    13.0   19   33
#   uniform            1              7.8   37  233      conditional        0.3      7.4   35  198
#   uniform            3              9.4   33  207      conditional        1        7.6   31  123
#
# The sums of non_target_logits have a term for each wrong token, of which there are hundreds: hence weights so much
# smaller than those for ten classes. The others have no such sums.
DEFAULT_TAUS: Final[dict[str, float]] = {
    **dict.fromkeys((BASELINE, SIGSOFTMAX, *MIXTURES), 0.0),
    **dict.fromkeys(DISTANCES, 1.0),
    "non_target_logits": 0.001,
    "kl": 0.1,
    SMOOTHED: 0.1,
}


@dataclass(frozen=True)
class LanguageLoss:
    """A loss of next-token prediction, averaged over tokens.

    "ce" is cross-entropy; the name of a distance of `drsl_kernels.fused_drsl_loss` is cross-entropy plus tau times that
    distance; "label_smoothing" is cross-entropy with labels smoothed by tau. The others are cross-entropy of another
    output layer: "sigsoftmax", "mixture_of_softmax" and "mixture_of_sigsoftmax".

    Raises:
        ValueError: an unknown name, or a tau that the loss does not take, as in
            `drsl_kernels.robustness.TrainingLoss`.
    """

    name: str
    tau: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in LANGUAGE_LOSSES:
            raise ValueError(
                f"unknown loss {self.name!r} of language models; the losses are {', '.join(LANGUAGE_LOSSES)}"
            )
        if self.name not in MIXTURES:
            TrainingLoss(self.name, self.tau)
        elif self.tau != 0:
            raise ValueError(f"tau of {self.name} must be 0: it has no penalty; got {self.tau!r}")

    @staticmethod
    def named(name: str, tau: float | None = None) -> LanguageLoss:
        """A loss by its name or an alias of it, with its default tau unless one is given."""
        name = ALIASES.get(name, name)
        return LanguageLoss(name, DEFAULT_TAUS.get(name, 0.0) if tau is None else tau)

    @property
    def head(self) -> HeadName:
        """The output layer that the model needs."""
        return self.name if self.name in (SIGSOFTMAX, *MIXTURES) else "linear"  # type: ignore[return-value]

    def tau_text(self) -> str:
        """tau as short as it can be written without becoming another number."""
        return self._plain().tau_text()

    def __str__(self) -> str:
        return self.name if self.name in MIXTURES else str(self._plain())

    def arguments(self) -> dict[str, Any]:
        """Those of `drsl_kernels.softmax_loss`; for mixtures those of their log-probabilities."""
        if self.name == SMOOTHED:
            return {"label_smoothing": self.tau}
        return {} if self.name in (BASELINE, *MIXTURES) else self._plain().arguments()

    def _plain(self) -> TrainingLoss:
        return TrainingLoss(BASELINE) if self.name in MIXTURES else TrainingLoss(self.name, self.tau)


def linear_head_loss(hidden: Tensor, weight: Tensor, y: Tensor, loss: LanguageLoss) -> Tensor:
    """The mean loss of the logits hidden @ weight^T, a scalar: the only place where a linear head meets its loss.

    Args:
        hidden: shape (..., H).
        weight: shape (V, H).
        y: shape (...), int64.
        loss: one without a mixture.
    """
    value: Tensor = fused_linear_softmax_loss(hidden, weight, y, return_stats=False, **loss.arguments())
    return value
