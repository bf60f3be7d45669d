"""Names and values of a loss, and every check of an argument, in one place.

`LossSpec` is what a backend receives instead of a dozen loose arguments. It is validated once, when it is
made, and `cached_loss_spec` remembers it.
`check_tensors` explains what is wrong with tensors. Relies on torch alone; everything else relies on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, Final, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

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
        soft,
        threshold,
        ACTIVATIONS[activation],
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
    soft: bool = False,
    threshold: float = 0.0,
    activation: str = "softmax",
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
    q, scale, margin = number("q", q), number("scale", scale), number("margin", margin)
    label_smoothing = number("label_smoothing", label_smoothing)
    # Below, q times a loss has no place in float32; q = 1e-30 is cross-entropy to the last digit.
    if not 1e-30 <= q <= 1.0:
        raise ValueError(f"q must be in [1e-30, 1], got {q!r}")
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


def integer(argument: str, value: object) -> int:
    """`value` as an int, if it is one (of Python or NumPy, not a bool)."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    return int(value)


def _check_name(argument: str, value: object, names: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, names))}, got {value!r}")


def check_tensors(
    logits: object, y: object, tau: object, weight: object, spec: LossSpec, margins: object = None
) -> None:
    """Raise the error that names the argument and its value, if any of the tensors is unusable.

    Error types are those of `F.cross_entropy` wherever it has the same condition. Values (a label out of
    range, a NaN tau) are looked at on the CPU only: elsewhere that would stop the device.
    """
    logits = _check_tensor("logits", logits)
    y = _check_tensor("y", y)
    if logits.dtype not in LOGITS_DTYPES:
        raise NotImplementedError(f"logits must be float32, float64, bfloat16 or float16, got {logits.dtype}")
    if spec.soft:
        _check_soft_target(logits, y)
    else:
        if not y.is_complex():
            _check_target_shape(logits, y)
        if y.dtype not in (torch.int64, torch.uint8):
            raise RuntimeError(f"y must hold class indices of dtype int64, or class probabilities, got {y.dtype}")
    if y.device != logits.device:
        raise RuntimeError(f"y must be on the device of logits, {logits.device}, got {y.device}")
    classes = logits.shape[class_dim(logits)]
    if weight is not None:
        _check_weight(weight, classes, logits.device)
    if margins is not None:
        _check_margins(margins, classes, logits.device, spec)
    at = class_dim(logits)
    _check_tau(tau, logits.shape[:at] + logits.shape[at + 1 :] if spec.soft else y.shape, logits.device)
    if logits.device.type == "cpu" and not spec.soft:
        _check_labels(y, classes, spec.ignore_index)


def class_dim(logits: Tensor) -> int:
    """0 for one unbatched row of shape (C,), else 1: (N, C) or (N, C, d1, ...)."""
    return 0 if logits.dim() == 1 else 1


def _check_tensor(argument: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else value.layout
        raise TypeError(f"{argument} must be a dense tensor, got a {kind} one")
    return value


def _check_target_shape(logits: Tensor, y: Tensor) -> None:
    got = tuple(y.shape)
    if logits.dim() == 0:
        raise RuntimeError("logits must have shape (C,), (N, C) or (N, C, d1, ...), got ()")
    if logits.dim() == 1:
        if got not in ((), (1,)):
            raise (ValueError if len(got) == 1 else RuntimeError)(
                f"y must have shape () for logits of shape {tuple(logits.shape)}, got {got}"
            )
        return
    want = (logits.shape[0], *logits.shape[2:])
    if got == want:
        return
    message = f"y must have shape {want} for logits of shape {tuple(logits.shape)}, got {got}"
    raise (RuntimeError if got[:1] == want[:1] else ValueError)(message)


def _check_soft_target(logits: Tensor, y: Tensor) -> None:
    if logits.dim() == 0:
        raise RuntimeError("logits must have shape (C,), (N, C) or (N, C, d1, ...), got ()")
    if y.shape != logits.shape:
        raise RuntimeError(
            f"y must have the shape of logits, {tuple(logits.shape)}, if it holds class probabilities, "
            f"got {tuple(y.shape)}"
        )


def check_weight_alone(weight: object) -> None:
    """What can be said about class weights without logits."""
    weight = _check_tensor("weight", weight)
    if weight.dim() != 1:
        raise RuntimeError(f"weight must have shape (C,), got {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise RuntimeError(f"weight must be of a floating dtype, got {weight.dtype}")


def _check_weight(weight: object, classes: int, device: torch.device) -> None:
    check_weight_alone(weight)
    assert isinstance(weight, Tensor)
    if tuple(weight.shape) != (classes,):
        raise RuntimeError(f"weight must have shape (C,) = ({classes},), got {tuple(weight.shape)}")
    if weight.device != device:
        raise RuntimeError(f"weight must be on the device of logits, {device}, got {weight.device}")


def check_margin_alone(margins: object) -> None:
    """What can be said about margins of classes without logits (values are looked at on the CPU only)."""
    margins = _check_tensor("margin", margins)
    if margins.dim() != 1:
        raise ValueError(f"margin must be a number or have shape (C,), got {tuple(margins.shape)}")
    if not margins.is_floating_point():
        raise TypeError(f"margin must be of a floating dtype, got {margins.dtype}")
    if margins.device.type == "cpu" and _is_concrete(margins) and not torch.isfinite(margins).all():
        first = margins.detach()[~torch.isfinite(margins.detach())][0].item()
        raise ValueError(f"margin must be finite, got {first!r}")


def _check_margins(margins: object, classes: int, device: torch.device, spec: LossSpec) -> None:
    check_margin_alone(margins)
    assert isinstance(margins, Tensor)
    if spec.soft:
        raise ValueError("margin must be 0 where y holds class probabilities, got a tensor")
    if tuple(margins.shape) != (classes,):
        raise ValueError(f"margin must be a number or have shape (C,) = ({classes},), got {tuple(margins.shape)}")
    if margins.device != device:
        raise RuntimeError(f"margin must be on the device of logits, {device}, got {margins.device}")


def _check_tau(tau: object, rows: torch.Size, device: torch.device) -> None:
    check_tau_value(tau)
    if not isinstance(tau, Tensor):
        return
    if tau.dim() != 0 and tau.shape != rows:
        raise ValueError(f"tau must have shape () or that of y, {tuple(rows)}, got {tuple(tau.shape)}")
    if tau.device != device and not (tau.dim() == 0 and tau.device.type == "cpu"):
        raise RuntimeError(f"tau must be on the device of logits, {device}, got {tau.device}")


def check_tau_value(tau: object) -> None:
    """Raise unless tau is a finite number or a floating tensor of them (values are looked at on the CPU only)."""
    if not isinstance(tau, Tensor):
        if not -math.inf < number("tau", tau) < math.inf:
            raise ValueError(f"tau must be finite, got {tau!r}")
        return
    if not tau.is_floating_point():
        raise TypeError(f"tau must be of a floating dtype, got {tau.dtype}")
    _check_tensor("tau", tau)
    if tau.device.type == "cpu" and _is_concrete(tau) and not torch.isfinite(tau).all():
        first = tau.detach()[~torch.isfinite(tau.detach())].flatten()[0].item()
        raise ValueError(f"tau must be finite, got {first!r}")


def _check_labels(y: Tensor, classes: int, ignore_index: int) -> None:
    if not _is_concrete(y):
        return
    flat = y.flatten().to(torch.int64)
    wrong = (flat != ignore_index) & ((flat < 0) | (flat >= classes))
    if wrong.any():
        row = int(wrong.to(torch.int8).argmax())
        raise IndexError(f"y holds label {int(flat[row])} at row {row}, outside [0, C) = [0, {classes})")


def _is_concrete(tensor: Tensor) -> bool:
    """False while something traces the call (see `watches_operators`): values cannot be looked at then."""
    return not (watches_operators() or tensor.is_meta or isinstance(tensor, FakeTensor))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def inside_function_transform() -> bool:
    """True inside `torch.func`; decided while `torch.compile` traces."""
    return torch._C._are_functorch_transforms_active()


def watches_operators() -> bool:
    """True inside `torch.compile`, `torch.func` and dispatch modes such as those of fake tensors and tracing."""
    return torch.compiler.is_compiling() or inside_function_transform() or torch._C._len_torch_dispatch_stack() > 0
