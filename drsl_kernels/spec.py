"""Names and values of a loss, and every check of an argument that is no tensor, in one place.

`LossSpec` is what a backend receives instead of a dozen loose arguments. It is validated once, when it is
made, and `cached_loss_spec` remembers it. Relies on torch alone; everything else relies on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, Final, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

Truth: TypeAlias = Literal["ce", "gce", "mae", "log_odds"]
Activation: TypeAlias = Literal["softmax", "sigsoftmax"]
Distance: TypeAlias = Literal["uniform", "non_target", "non_target_logits", "conditional", "kl"]
Reduction: TypeAlias = Literal["none", "mean", "sum"]
SpecCodes: TypeAlias = tuple[int, float, int, float, float, int, int, float, bool, float, int]
BackendName: TypeAlias = Literal["cpp", "reference", "triton", "cuda"]

# The position of a name is its code in csrc/row_loss.h (there, code 0 of the distances means none).
TRUTHS: Final[tuple[str, ...]] = get_args(Truth)
DISTANCES: Final[tuple[str, ...]] = get_args(Distance)
ACTIVATIONS: Final[tuple[str, ...]] = get_args(Activation)
SOFT_DISTANCES: Final = ("uniform", "kl")  # those that make sense without a label
SOFT_KL_CODE: Final = 1 + len(DISTANCES)  # "kl" of class probabilities: to uniform over all classes
REDUCTIONS: Final[tuple[str, ...]] = get_args(Reduction)
BACKENDS: Final[tuple[str, ...]] = get_args(BackendName)

LOGITS_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class LossStats(NamedTuple):
    """What the row statistics tell besides the loss, one value per row, in the shape of the target.

    Detached; float32 for float32, bfloat16 and float16 logits, float64 for float64 ones. Rows whose target is
    `ignore_index` hold zeros and False.

    Attributes:
        cross_entropy: -log p_y, p the activation of the logits, without class weights and label smoothing. With class
            probabilities the whole loss but for tau times the distance.
        distance: the distance D of the row (the default `uniform` where the loss has none).
        margin: logit of the label (the likeliest class, with probabilities) minus the largest other logit; of another
            activation than softmax, the difference of the logits that it takes the softmax of.
        correct: True where the margin is positive. A tie for the largest logit is not correct.
    """

    cross_entropy: Tensor
    distance: Tensor
    margin: Tensor
    correct: Tensor


@dataclass(frozen=True)
class LossSpec:
    """One member of the family: truth term + tau * distance, and how rows are reduced.

    Use `loss_spec` to make one. Fields have the meaning of `drsl_kernels.softmax_loss`'s arguments; `soft` says that
    the target holds class probabilities. `truth_code`, `distance_code`, `activation_code` and `reduction_code` are the
    integers that csrc/row_loss.h uses, and `codes` is the whole in the form that operators take: see `spec_of_codes`.
    `margin` is that of all classes where they have none of their own.
    """

    truth: str
    q: float
    distance: str | None
    scale: float
    margin: float
    ignore_index: int
    reduction: str
    label_smoothing: float
    soft: bool
    threshold: float
    activation: str
    truth_code: int
    distance_code: int
    reduction_code: int
    activation_code: int
    codes: SpecCodes


def spec_of_codes(
    truth: int,
    q: float,
    distance: int,
    scale: float,
    margin: float,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    soft: bool,
    threshold: float,
    activation: int,
) -> LossSpec:
    """The inverse of `LossSpec.codes`."""
    name = None if distance == 0 else "kl" if distance == SOFT_KL_CODE else DISTANCES[distance - 1]
    return cached_loss_spec(
        TRUTHS[truth],
        q,
        name,
        scale,
        margin,
        ignore_index,
        REDUCTIONS[reduction],
        label_smoothing,
        threshold,
        ACTIVATIONS[activation],
        soft,
    )


def loss_spec(
    truth: str,
    q: float,
    distance: str | None,
    scale: float,
    margin: float,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    threshold: float = 0.0,
    activation: str = "softmax",
    soft: bool = False,
) -> LossSpec:
    """Validate the arguments that are not tensors and return them as a `LossSpec`.

    Raises:
        ValueError: an unknown name, or a number outside its range.
        TypeError: a number that is none, or `ignore_index` is not an int.
        RuntimeError: `label_smoothing` outside [0, 1], or an `ignore_index` that could be a class beside class
            probabilities (the type that `F.cross_entropy` raises).
    """
    _check_name("truth", truth, TRUTHS)
    if distance is not None:
        _check_name("distance", distance, DISTANCES)
    _check_name("reduction", reduction, REDUCTIONS)
    _check_name("activation", activation, ACTIVATIONS)
    q, scale, margin = check_q("q", q), number("scale", scale), number("margin", margin)
    label_smoothing = number("label_smoothing", label_smoothing)
    # Comparisons, and not math.isfinite: torch.compile may trace with a symbol in place of a number.
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale!r}")
    if not -math.inf < margin < math.inf:
        raise ValueError(f"margin must be finite, got {margin!r}")
    threshold = number("threshold", threshold)
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"threshold must be in [0, 1), got {threshold!r}")
    if threshold > 0.0 and truth != "gce":
        raise ValueError(f"threshold must be 0 with truth={truth!r} (it is defined for 'gce'), got {threshold!r}")
    ignore_index = integer("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits, got {ignore_index!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing!r}")
    if label_smoothing > 0.0 and truth != "ce":
        raise ValueError(
            f"label_smoothing must be 0 with truth={truth!r} (it is defined for 'ce'), got {label_smoothing!r}"
        )
    if soft:
        _check_soft(truth, distance, scale, margin, ignore_index)
    truth_code, reduction_code = TRUTHS.index(truth), REDUCTIONS.index(reduction)
    distance_code, activation_code = _distance_code(distance, soft), ACTIVATIONS.index(activation)
    codes = (
        truth_code,
        q,
        distance_code,
        scale,
        margin,
        ignore_index,
        reduction_code,
        label_smoothing,
        soft,
        threshold,
        activation_code,
    )
    return LossSpec(
        truth,
        q,
        distance,
        scale,
        margin,
        ignore_index,
        reduction,
        label_smoothing,
        soft,
        threshold,
        activation,
        truth_code,
        distance_code,
        reduction_code,
        activation_code,
        codes,
    )


def _check_soft(truth: str, distance: str | None, scale: float, margin: float, ignore_index: int) -> None:
    """What is defined for a label alone."""
    why = "where y holds class probabilities"
    if truth != "ce":
        raise ValueError(f"truth must be 'ce' {why}, got {truth!r}")
    if distance not in (None, *SOFT_DISTANCES):
        raise ValueError(f"distance must be one of {', '.join(map(repr, SOFT_DISTANCES))} {why}, got {distance!r}")
    if scale != 1.0 or margin != 0.0:
        raise ValueError(f"scale and margin must be 1 and 0 {why}, got {scale!r} and {margin!r}")
    if ignore_index >= 0:
        raise RuntimeError(f"ignore_index must be negative {why}, got {ignore_index!r}")


def _distance_code(distance: str | None, soft: bool) -> int:
    if distance is None:
        return 0
    if soft and distance == "kl":
        return SOFT_KL_CODE
    return 1 + DISTANCES.index(distance)


_remembered_loss_spec = lru_cache(maxsize=256, typed=True)(loss_spec)


def cached_loss_spec(*arguments: Any) -> LossSpec:
    """`loss_spec`, remembered: a training loop pays for the checks in its first step only. Not for `torch.compile`."""
    try:
        return _remembered_loss_spec(*arguments)
    except TypeError:  # an argument that cannot be remembered, such as a list: the checks say what is wrong with it
        return loss_spec(*arguments)


def check_backend_name(argument: str, name: object) -> None:
    """Raise ValueError unless `name` is None or the name of a backend."""
    if name is not None:
        _check_name(argument, name, BACKENDS)


def number(argument: str, value: object) -> float:
    """`value` as a float, if it is a real number (of Python or NumPy, not a bool)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{argument} must fit in a float, got {value!r}") from None


def check_q(argument: str, value: object) -> float:
    """`value` as a float, if it is an exponent of the generalized cross-entropy."""
    q = number(argument, value)
    # Below, q times a loss has no place in float32; q = 1e-30 is cross-entropy to the last digit.
    if not 1e-30 <= q <= 1.0:
        raise ValueError(f"{argument} must be in [1e-30, 1], got {q!r}")
    return q


def integer(argument: str, value: object) -> int:
    """`value` as an int, if it is one (of Python or NumPy, not a bool)."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    return int(value)


def _check_name(argument: str, value: object, names: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, names))}, got {value!r}")
