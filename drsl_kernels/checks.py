"""Checks of the tensors of a call, in one place: what is wrong with them, in words that name argument and value.

Relies on `spec`; the backends and the public functions rely on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .spec import LOGITS_DTYPES, LossSpec, number

P = ParamSpec("P")
R = TypeVar("R")


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


def check_linear(
    hidden: object,
    weight: object,
    bias: object,
    y: object,
    tau: object,
    class_weight: object,
    margins: object,
    spec: LossSpec,
    *,
    autocast: bool,
    labels: bool,
) -> None:
    """`check_tensors` for a linear layer in place of logits: the errors of `linear.fused_linear_softmax_loss`."""
    hidden, weight, y = _check_tensor("hidden", hidden), _check_tensor("weight", weight), _check_tensor("y", y)
    if hidden.dtype not in LOGITS_DTYPES:
        raise NotImplementedError(f"hidden must be float32, float64, bfloat16 or float16, got {hidden.dtype}")
    if hidden.dim() == 0:
        raise ValueError("hidden must have shape (..., H), got ()")
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"weight must have shape (C, H) = (C, {width}), got {tuple(weight.shape)}")
    layer = {"weight": weight} if bias is None else {"weight": weight, "bias": _check_tensor("bias", bias)}
    if bias is not None and layer["bias"].shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape (C,) = ({weight.shape[0]},), got {tuple(layer['bias'].shape)}")
    for argument, tensor in layer.items():
        if tensor.dtype != hidden.dtype and not (autocast and tensor.is_floating_point()):
            raise TypeError(f"{argument} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}")
    if y.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"y must hold class indices of dtype int64, got {y.dtype}")
    if y.shape != hidden.shape[:-1]:
        wanted = f"{tuple(hidden.shape[:-1])} for hidden of shape {tuple(hidden.shape)}"
        raise ValueError(f"y must have shape {wanted}, got {tuple(y.shape)}")
    for argument, tensor in (layer | {"y": y}).items():
        if tensor.device != hidden.device:
            raise RuntimeError(f"{argument} must be on the device of hidden, {hidden.device}, got {tensor.device}")
    classes = weight.shape[0]
    if class_weight is not None:
        _check_weight(class_weight, classes, hidden.device, "class_weight")
    if margins is not None:
        _check_margins(margins, classes, hidden.device, spec)
    _check_tau(tau, y.shape, hidden.device)
    if hidden.device.type == "cpu" and labels:
        _check_labels(y, classes, spec.ignore_index)


def check_parallel(logits: Tensor, y: object, tau: object, spec: LossSpec) -> None:
    """`check_tensors` for logits (N, C) of some of the classes: labels may be elsewhere, and are not looked at."""
    y = _check_tensor("y", y)
    if logits.dtype not in LOGITS_DTYPES:
        raise NotImplementedError(f"logits must be float32, float64, bfloat16 or float16, got {logits.dtype}")
    if y.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"y must hold class indices of dtype int64, got {y.dtype}")
    if y.shape != logits.shape[:1]:
        raise ValueError(f"y must have shape (N,) = ({logits.shape[0]},), got {tuple(y.shape)}")
    if y.device != logits.device:
        raise RuntimeError(f"y must be on the device of logits, {logits.device}, got {y.device}")
    if spec.ignore_index >= 0:
        raise ValueError(f"ignore_index must be negative for classes of several processes, got {spec.ignore_index}")
    _check_tau(tau, y.shape, logits.device)


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


def check_weight_alone(weight: object, argument: str = "weight") -> None:
    """What can be said about class weights without logits."""
    weight = _check_tensor(argument, weight)
    if weight.dim() != 1:
        raise RuntimeError(f"{argument} must have shape (C,), got {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise RuntimeError(f"{argument} must be of a floating dtype, got {weight.dtype}")


def _check_weight(weight: object, classes: int, device: torch.device, argument: str = "weight") -> None:
    check_weight_alone(weight, argument)
    assert isinstance(weight, Tensor)
    if tuple(weight.shape) != (classes,):
        raise RuntimeError(f"{argument} must have shape (C,) = ({classes},), got {tuple(weight.shape)}")
    if weight.device != device:
        raise RuntimeError(f"{argument} must be on the device of logits, {device}, got {weight.device}")


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


def constant_when_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Let `torch.compile` call a function while it traces, and keep the result.

    `torch.compiler.assume_constant_result` sets the same attribute, but imports the compiler first, and with it more
    than torch itself is: to import this package would take twice as long.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def inside_function_transform() -> bool:
    """True inside `torch.func`; decided while `torch.compile` traces."""
    return torch._C._are_functorch_transforms_active()


def watches_operators() -> bool:
    """True inside `torch.compile`, `torch.func` and dispatch modes such as those of fake tensors and tracing."""
    return torch.compiler.is_compiling() or inside_function_transform() or torch._C._len_torch_dispatch_stack() > 0
