"""Output layer and loss in one, for the heads of language models: logits that are never stored whole.

Relies on `linear_ops`; `modules` relies on it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from . import linear_ops
from .backends import needs_transforms
from .checks import check_linear
from .linear_chunks import Layer, Target
from .shards import class_shard
from .spec import (
    Activation,
    BackendName,
    Distance,
    LossSpec,
    LossStats,
    Reduction,
    Truth,
    check_backend_name,
    integer,
    loss_spec,
    number,
)

if TYPE_CHECKING:  # a build without processes lacks it
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

__all__ = ["check_layer_numbers", "fused_linear_drsl_loss", "fused_linear_softmax_loss"]


class _Options(TypedDict, total=False):
    bias: Tensor | None
    class_weight: Tensor | None
    ignore_index: int
    reduction: Reduction
    label_smoothing: float
    logit_scale: float
    softcap: float | None
    memory_budget: int | None
    group: ProcessGroup | None
    first_class: int | None
    backend: BackendName | None


class _DRSLOptions(_Options, total=False):
    distance: Distance


class _MemberOptions(_Options, total=False):
    truth: Truth
    q: float
    threshold: float
    distance: Distance | None
    tau: Tensor | float
    margin: Tensor | float
    scale: float
    activation: Activation


@overload
def fused_linear_drsl_loss(
    hidden: Tensor,
    weight: Tensor,
    y: Tensor,
    tau: Tensor | float,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[_DRSLOptions],
) -> Tensor: ...
@overload
def fused_linear_drsl_loss(
    hidden: Tensor,
    weight: Tensor,
    y: Tensor,
    tau: Tensor | float,
    *,
    return_stats: Literal[True],
    **options: Unpack[_DRSLOptions],
) -> tuple[Tensor, LossStats]: ...
@overload
def fused_linear_drsl_loss(
    hidden: Tensor,
    weight: Tensor,
    y: Tensor,
    tau: Tensor | float,
    *,
    return_stats: bool = ...,
    **options: Unpack[_DRSLOptions],
) -> Tensor | tuple[Tensor, LossStats]: ...
def fused_linear_drsl_loss(
    hidden: Tensor,
    weight: Tensor,
    y: Tensor,
    tau: Tensor | float,
    *,
    bias: Tensor | None = None,
    distance: Distance = "uniform",
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_stats: bool = False,
    memory_budget: int | None = None,
    group: ProcessGroup | None = None,
    first_class: int | None = None,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""`fused_drsl_loss` of the logits of a linear layer, without ever storing them whole.

    .. math:: L = w_y \left( -\log p_y + \tau D \right), \qquad
              p = \mathrm{softmax}(z), \qquad z = a \left( W h + b \right)

    For language models: with 128,256 classes the logits of 2,048 tokens are 1.05 GB of float32, and their gradient
    another; here both are one chunk of a few rows. See `fused_linear_softmax_loss`, which has all other members of the
    family, for the arguments, the result and the errors.
    """
    if distance is None:  # what fused_linear_softmax_loss takes for "no penalty" is a mistake here
        raise ValueError("distance must be the name of a distance, got None")
    return fused_linear_softmax_loss(
        hidden,
        weight,
        y,
        bias=bias,
        distance=distance,
        tau=tau,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        logit_scale=logit_scale,
        softcap=softcap,
        return_stats=return_stats,
        memory_budget=memory_budget,
        group=group,
        first_class=first_class,
        backend=backend,
    )


@overload
def fused_linear_softmax_loss(
    hidden: Tensor, weight: Tensor, y: Tensor, *, return_stats: Literal[False] = ..., **options: Unpack[_MemberOptions]
) -> Tensor: ...
@overload
def fused_linear_softmax_loss(
    hidden: Tensor, weight: Tensor, y: Tensor, *, return_stats: Literal[True], **options: Unpack[_MemberOptions]
) -> tuple[Tensor, LossStats]: ...
@overload
def fused_linear_softmax_loss(
    hidden: Tensor, weight: Tensor, y: Tensor, *, return_stats: bool = ..., **options: Unpack[_MemberOptions]
) -> Tensor | tuple[Tensor, LossStats]: ...
def fused_linear_softmax_loss(
    hidden: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    truth: Truth = "ce",
    q: float = 0.7,
    threshold: float = 0.0,
    distance: Distance | None = None,
    tau: Tensor | float = 0.0,
    margin: Tensor | float = 0.0,
    scale: float = 1.0,
    activation: Activation = "softmax",
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_stats: bool = False,
    memory_budget: int | None = None,
    group: ProcessGroup | None = None,
    first_class: int | None = None,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""`softmax_loss` of the logits of a linear layer, without ever storing them whole.

    .. math:: z = a \left( W h + b \right), \qquad \text{with a softcap } c: \quad z = c \tanh \frac{a (W h + b)}{c}

    Rows go through in chunks: the layer's matrix product, the loss's kernel, which puts the gradient in the place of
    the logits, and the products that give the gradients to hidden, weight and bias, summed in float32 (float64 for
    float64). For "mean" and "sum" this happens in the forward pass, so there are three products and none twice; with
    reduction="none" the logits are computed again in the backward pass. Peak memory is that of a chunk, and for 16-bit
    weights one float32 copy of the weight's gradient. Second derivatives, `torch.func` and forward-mode differentiation
    go through the whole logits.

    Under autocast hidden, weight and bias are cast as those of a linear layer.

    Args:
        hidden: h, shape (..., H); float32, float64, bfloat16 or float16.
        weight: W, shape (C, H), of the dtype of hidden. No gradient is computed for a frozen one.
        y: class indices in [0, C), int64 (or uint8), shape (...) of hidden without its last dimension.
        bias: b, shape (C,), of the dtype of hidden.
        logit_scale: a, finite.
        softcap: c > 0; None for none.
        class_weight: what `softmax_loss` calls weight: of each class, shape (C,). No gradient flows to it.
        memory_budget: bytes of logits at a time; None for 88 MiB on the CPU, or what 176 rows need if that is more, and
            512 MiB on a GPU. A chunk has one row at least. A softcap needs two buffers, which share the budget. Of a
            group, what it gathers counts as well: 36 bytes per row, and 68 for each process; in float64 twice that.
        group: processes that share the classes, each with its own rows of weight and bias, in the order of the classes,
            and all with the same hidden and y; None for classes that are all here. Every process gets the same loss and
            gradient to hidden, which is summed over the processes in the dtype of hidden. Class weights, margins of
            single classes, sigsoftmax, `torch.func` and second derivatives are for classes that are all here.
        first_class: with a group, the index of this process's first class; None where all have equally many.

    The other arguments are those of `softmax_loss`; tau and the statistics have the shape of y.

    Returns:
        The loss: a scalar, or of the shape of y for reduction="none". float64 for float64 hidden, else float32.
        With return_stats, a pair of it and `LossStats`.

    Raises:
        ValueError: shapes that do not fit, a number out of its range, an unknown name; with a group, also what does not
            go together with one.
        IndexError: a label outside [0, C) (on the CPU; the message names row and value).
        TypeError: something that should be a tensor or a number is not, dtypes differ, or y holds class probabilities.
        RuntimeError: tensors on different devices, class_weight of another shape (as in `softmax_loss`), or a forced
            backend that is not usable.
        NotImplementedError: hidden of another dtype.
    """
    margin, margins = (0.0, margin) if isinstance(margin, Tensor) else (margin, None)
    spec = loss_spec(
        truth, q, distance, scale, margin, ignore_index, reduction, label_smoothing, threshold, activation, False
    )
    tau = tau if isinstance(tau, Tensor) else number("tau", tau)
    logit_scale, softcap, budget = check_layer_numbers(logit_scale, softcap, memory_budget)
    check_backend_name("backend", backend)
    if not isinstance(return_stats, bool):
        raise TypeError(f"return_stats must be a bool, got {return_stats!r}")
    here = group is None
    _check_group(group, first_class, class_weight, margins, spec)
    check_linear(hidden, weight, bias, y, tau, class_weight, margins, spec, autocast=_is_autocast(hidden), labels=here)
    hidden, weight, bias = _cast(hidden, weight, bias)
    shard = None if group is None else class_shard(group, first_class, weight.shape[0])
    layer = Layer(hidden.reshape(y.numel(), hidden.shape[-1]), weight, bias, logit_scale, softcap, shard)
    rows = tau.reshape(-1) if isinstance(tau, Tensor) and tau.dim() else tau
    target = Target(y.reshape(-1), rows, class_weight, margins, spec)
    if _is_opaque(layer):
        loss, stats = linear_ops.linear_loss(layer, target, return_stats, budget, backend)
    else:
        loss, stats = linear_ops.through_logits(layer, target, return_stats, backend)
    if spec.reduction == "none":
        loss = loss.reshape(y.shape)
    return loss if stats is None else (loss, LossStats(*(field.reshape(y.shape) for field in stats)))


def check_layer_numbers(
    logit_scale: object, softcap: object, memory_budget: object
) -> tuple[float, float | None, int | None]:
    """The numbers of a layer, if they are usable; `fused_linear_softmax_loss` describes the errors."""
    logit_scale = number("logit_scale", logit_scale)
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be finite, got {logit_scale!r}")
    if softcap is not None:
        softcap = number("softcap", softcap)
        if not 0.0 < softcap < math.inf:
            raise ValueError(f"softcap must be positive and finite, or None, got {softcap!r}")
    if memory_budget is not None:
        memory_budget = integer("memory_budget", memory_budget)
        if memory_budget < 1:
            raise ValueError(f"memory_budget must be 1 byte or more, or None, got {memory_budget!r}")
    return logit_scale, softcap, memory_budget


def _check_group(
    group: ProcessGroup | None,
    first_class: int | None,
    class_weight: Tensor | None,
    margins: Tensor | None,
    spec: LossSpec,
) -> None:
    if group is None:
        if first_class is not None:
            raise ValueError(f"first_class must be None without a group, got {first_class!r}")
        return
    refused = {"class_weight": class_weight, "margin": margins}
    for argument, value in refused.items():
        if value is not None:
            raise ValueError(f"{argument} must not be of single classes with a group, got a tensor")
    if spec.activation != "softmax":
        raise ValueError(f"activation must be 'softmax' with a group, got {spec.activation!r}")
    if spec.ignore_index >= 0:
        raise ValueError(f"ignore_index must be negative with a group, got {spec.ignore_index}")


def _is_autocast(hidden: object) -> bool:
    if not isinstance(hidden, Tensor) or not torch.amp.is_autocast_available(hidden.device.type):
        return False
    return torch.is_autocast_enabled(hidden.device.type)


def _cast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast does for a linear layer: float64 is left alone."""
    if not _is_autocast(hidden) or torch.float64 in (hidden.dtype, weight.dtype):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _is_opaque(layer: Layer) -> bool:
    """False where only PyTorch's own operators work; `torch.compile` alone plans around an operator of ours."""
    if layer.shard is not None:
        return True
    if layer.weight.shape[0] == 0:
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return not needs_transforms()
