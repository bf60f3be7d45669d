"""Losses of logits whose classes are spread over the processes of a group: vocabulary-parallel heads.

Relies on `shards`. A head that is spread as well, and never stores its logits, is in `linear`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from .backends.pieces import Pieces, Shard
from .checks import check_parallel, watches_operators
from .reference import sigsoftmax_logits
from .shards import NO_SECOND_DERIVATIVES, ClassShard, Gathered, class_shard, shard_pieces
from .spec import (
    Activation,
    BackendName,
    Distance,
    LossSpec,
    LossStats,
    Reduction,
    Truth,
    check_backend_name,
    loss_spec,
    number,
    spec_of_codes,
)

if TYPE_CHECKING:  # a build without processes lacks it
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

__all__ = ["parallel_drsl_loss", "parallel_softmax_loss"]


class _Options(TypedDict, total=False):
    ignore_index: int
    reduction: Reduction
    label_smoothing: float
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
    margin: float
    scale: float
    activation: Activation


@overload
def parallel_drsl_loss(
    logits: Tensor,
    y: Tensor,
    tau: Tensor | float,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[_DRSLOptions],
) -> Tensor: ...
@overload
def parallel_drsl_loss(
    logits: Tensor, y: Tensor, tau: Tensor | float, *, return_stats: Literal[True], **options: Unpack[_DRSLOptions]
) -> tuple[Tensor, LossStats]: ...
@overload
def parallel_drsl_loss(
    logits: Tensor, y: Tensor, tau: Tensor | float, *, return_stats: bool = ..., **options: Unpack[_DRSLOptions]
) -> Tensor | tuple[Tensor, LossStats]: ...
def parallel_drsl_loss(
    logits: Tensor,
    y: Tensor,
    tau: Tensor | float,
    *,
    group: ProcessGroup | None = None,
    first_class: int | None = None,
    distance: Distance = "uniform",
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    return_stats: bool = False,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""`fused_drsl_loss` of logits whose classes are spread over the processes of a group.

    .. math:: L = -\log p_y + \tau D, \qquad p = \mathrm{softmax}(z_1, \ldots, z_P)

    with the classes z_1 of the first process, and so on. See `parallel_softmax_loss`, which has all other members of
    the family, for the arguments, the result and the errors.
    """
    if distance is None:  # what parallel_softmax_loss takes for "no penalty" is a mistake here
        raise ValueError("distance must be the name of a distance, got None")
    return parallel_softmax_loss(
        logits,
        y,
        group=group,
        first_class=first_class,
        distance=distance,
        tau=tau,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        return_stats=return_stats,
        backend=backend,
    )


@overload
def parallel_softmax_loss(
    logits: Tensor, y: Tensor, *, return_stats: Literal[False] = ..., **options: Unpack[_MemberOptions]
) -> Tensor: ...
@overload
def parallel_softmax_loss(
    logits: Tensor, y: Tensor, *, return_stats: Literal[True], **options: Unpack[_MemberOptions]
) -> tuple[Tensor, LossStats]: ...
@overload
def parallel_softmax_loss(
    logits: Tensor, y: Tensor, *, return_stats: bool = ..., **options: Unpack[_MemberOptions]
) -> Tensor | tuple[Tensor, LossStats]: ...
def parallel_softmax_loss(
    logits: Tensor,
    y: Tensor,
    *,
    group: ProcessGroup | None = None,
    first_class: int | None = None,
    truth: Truth = "ce",
    q: float = 0.7,
    threshold: float = 0.0,
    distance: Distance | None = None,
    tau: Tensor | float = 0.0,
    margin: float = 0.0,
    scale: float = 1.0,
    activation: Activation = "softmax",
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    return_stats: bool = False,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """`softmax_loss` of logits whose classes are spread over the processes of a group.

    Every process of the group calls this with its own classes of the same rows, and gets the same loss. One gather
    brings nine numbers per row to every process; the backward pass has nothing to exchange, and writes the gradient of
    the process's own classes. The gradient to what the logits come from is the sum over the processes, as tensor
    parallel layers take it.

    Args:
        logits: this process's classes, shape (N, C_own), or a DTensor of shape (N, C) with placement ``Shard(-1)`` (of
            a mesh with one dimension), which also says the group and the first class; float32, float64, bfloat16 or
            float16. Processes may have different numbers of classes, some of them none.
        y: class indices among the classes of all processes, int64 (or uint8), shape (N,), the same on every process.
        group: the processes that share the classes, in the order of the classes; None for all.
        first_class: index of this process's first class; None where all processes have equally many.
        ignore_index: a negative number.

    The other arguments, the result and the errors are those of `softmax_loss`, without weights and margins of single
    classes, class probabilities and second derivatives.

    Raises:
        ValueError: also where the processes' classes do not follow one another (on the CPU; else the loss is NaN).
        RuntimeError: also without a process group, or with a backend that has no such kernels; under `torch.func`, and
            where a graph of the backward pass is asked for.
    """
    spec = loss_spec(
        truth, q, distance, scale, margin, ignore_index, reduction, label_smoothing, threshold, activation, False
    )
    tau = tau if isinstance(tau, Tensor) else number("tau", tau)
    check_backend_name("backend", backend)
    if not isinstance(return_stats, bool):
        raise TypeError(f"return_stats must be a bool, got {return_stats!r}")
    own, y, shard = _own_classes(logits, y, group, first_class)
    check_parallel(own, y, tau, spec)
    if spec.activation == "sigsoftmax":
        own, spec = sigsoftmax_logits(own), spec_of_codes(*spec.codes[:-1], 0)
    pieces = shard_pieces(own, backend)
    tau_tensor, tau_value = (tau, 0.0) if isinstance(tau, Tensor) else (None, tau)
    loss, reports = _ParallelLoss.apply(  # type: ignore[no-untyped-call]
        own, tau_tensor, y, tau_value, spec, shard, pieces, return_stats
    )
    assert isinstance(loss, Tensor)
    if reports is None:
        return loss
    cross_entropy, distances, margins = reports.unbind(0)
    return loss, LossStats(cross_entropy, distances, margins, margins > 0)


def _own_classes(
    logits: Tensor, y: Tensor, group: ProcessGroup | None, first_class: int | None
) -> tuple[Tensor, Tensor, ClassShard]:
    """Plain tensors, and where the classes of this process begin."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there are no such tensors
    if module is None or not isinstance(logits, module.DTensor):
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"logits must have shape (N, C_own), got {shape}")
        return logits, y, class_shard(group, first_class, logits.shape[1])
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if group is not None or first_class is not None:
        raise ValueError("group and first_class must be None for a DTensor, which has them itself")
    mesh, placements = logits.device_mesh, logits.placements
    if logits.dim() != 2 or mesh.ndim != 1 or not placements[0].is_shard(1):
        raise ValueError(
            "logits must be of shape (N, C) with placement Shard(-1) on a mesh of one dimension, got "
            f"{tuple(logits.shape)} with {placements} on {mesh}"
        )
    _, (_, first) = compute_local_shape_and_global_offset(logits.shape, mesh, placements)
    if isinstance(y, module.DTensor):
        y = y.full_tensor()
    return logits.to_local(), y, ClassShard(mesh.get_group(), first)


class _ParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tau: Tensor | None,
        y: Tensor,
        tau_value: float,
        spec: LossSpec,
        shard: ClassShard,
        pieces: Pieces,
        return_stats: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logits = logits.contiguous()
        strength = tau_value if tau is None else tau
        gathered = shard.gather(pieces, logits, y, spec)
        with_tau = ctx.needs_input_grad[1]
        losses = gathered.losses(
            pieces, logits, strength, spec, upstream=None, with_tau=with_tau, with_reports=return_stats
        )
        ctx.save_for_backward(logits, tau, gathered.local, *gathered.shard)
        ctx.tau_slopes, ctx.tau_value, ctx.spec, ctx.pieces = losses.tau_slopes, tau_value, spec, pieces
        ctx.set_materialize_grads(False)
        if losses.reports is not None:
            ctx.mark_non_differentiable(losses.reports)
        if spec.reduction == "none":
            return losses.rows, losses.reports
        total = losses.rows.sum(dtype=torch.float64)
        ctx.share = losses.rows.new_ones(())
        if spec.reduction == "mean":
            count = (y != spec.ignore_index).sum().double()
            ctx.share = torch.where(count == 0.0, 0.0, 1.0 / count).to(losses.rows.dtype)
            total = total / count
        return total.to(losses.rows.dtype), losses.reports

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 6
        if torch.is_grad_enabled() and not watches_operators():
            raise RuntimeError(NO_SECOND_DERIVATIVES)
        if upstream is None:
            return None, None, *nothing
        logits, tau, local, label_logits, stats = ctx.saved_tensors
        if ctx.spec.reduction != "none":
            upstream = upstream * ctx.share
        logits_grad = tau_grad = None
        if ctx.needs_input_grad[0]:
            logits_grad = logits.clone()
            gathered = Gathered(local, Shard(label_logits, stats))
            strength = ctx.tau_value if tau is None else tau
            gathered.losses(
                ctx.pieces, logits_grad, strength, ctx.spec, upstream=upstream, with_tau=False, with_reports=False
            )
        if ctx.needs_input_grad[1]:
            rows = ctx.tau_slopes * upstream
            tau_grad = (rows.sum() if tau.dim() == 0 else rows).to(dtype=tau.dtype, device=tau.device)
        return logits_grad, tau_grad, *nothing
