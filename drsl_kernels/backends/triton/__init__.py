"""The Triton backend: an autograd function over the kernels that launch.py runs.

Where the upstream gradient is likely 1 (a mean or a sum, not in float16), the gradient is computed together with the
loss; the backward pass then asks the device whether it really is 1, and only if not computes it again, without the host
ever waiting. Elsewhere it is computed in the backward pass. Second derivatives go through the reference.

Needs triton; with TRITON_INTERPRET=1 in the environment it runs on CPU tensors, slowly, for tests.
Relies on launch.py, `spec` and `reference`; `backends.choose` hands it out.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from ... import reference
from ...checks import check_tensors, class_dim, watches_operators
from ...spec import LossSpec, LossStats
from .launch import MAX_CLASSES, SAVED, Task, run, saved_slices
from .layouts import is_laid_out

INTERPRETED: bool = triton.knobs.runtime.interpret
VERSION: str = triton.__version__


def softmax_loss(
    logits: Tensor,
    y: Tensor,
    tau: Tensor | float,
    weight: Tensor | None,
    spec: LossSpec,
    return_stats: bool = False,
    margins: Tensor | None = None,
) -> tuple[Tensor, LossStats | None]:
    """The loss that `spec` names, and per-row statistics if asked for."""
    if not spec.soft and not (margins is None and _plainly_right(logits, y, tau, weight)):
        check_tensors(logits, y, tau, weight, spec, margins)
    classes = logits.shape[class_dim(logits)]
    if logits.numel() == 0:
        return reference.softmax_loss(logits, y, tau, weight, spec, return_stats, margins)
    if classes > MAX_CLASSES:
        raise NotImplementedError(f"logits have {classes} classes, backend='triton' takes at most {MAX_CLASSES}")
    logits = logits.resolve_neg()
    if not is_laid_out(logits):
        logits = logits.contiguous()
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    labels = y.resolve_neg().to(torch.int64).contiguous()
    if weight is not None:
        weight = weight.detach().resolve_neg().to(acc).contiguous()
    if margins is not None:
        margins = margins.detach().resolve_neg().to(acc).contiguous()
    tau_tensor, tau_value = (tau, 0.0) if isinstance(tau, Tensor) else (None, tau)
    if tau_tensor is not None and spec.distance is None:
        tau_tensor = None

    with on_device(logits):
        if torch.is_grad_enabled() and (logits.requires_grad or (tau_tensor is not None and tau_tensor.requires_grad)):
            loss, reports = _SoftmaxLoss.apply(  # type: ignore[no-untyped-call]
                logits, tau_tensor, labels, weight, margins, tau_value, spec, return_stats
            )
        else:
            call = _Call(logits, tau_tensor, labels, weight, margins, tau_value, spec)
            loss, reports = call.outputs(return_stats)
            run(call.task)
    # An unbatched row may come with a target of shape (1,): the loss is a scalar all the same.
    shape = y.shape if logits.dim() > 1 else ()
    if spec.reduction == "none":
        loss = loss.reshape(shape)
    if reports is None:
        return loss, None
    cross_entropy, distance, margin = reports.reshape(3, *y.shape).unbind(0)
    return loss, LossStats(cross_entropy, distance, margin, margin > 0)


def _plainly_right(logits: Tensor, y: Tensor, tau: Tensor | float, weight: Tensor | None) -> bool:
    """The usual arguments, known to be right by a few comparisons."""
    return (
        type(y) is Tensor
        and logits.is_cuda
        and logits.dim() == 2
        and logits.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        and logits.layout == torch.strided
        and y.shape == logits.shape[:1]
        and y.dtype == torch.int64
        and y.device == logits.device
        and weight is None
        and isinstance(tau, float)
        and tau - tau == 0.0
    )


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


class _Call:
    """A call's arguments in the form that the kernels take, and its outputs, which are also in `task`."""

    def __init__(
        self,
        logits: Tensor,
        tau: Tensor | None,
        labels: Tensor,
        weight: Tensor | None,
        margins: Tensor | None,
        tau_value: float,
        spec: LossSpec,
    ) -> None:
        self.acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
        tau_rows = None
        if tau is not None and tau.dim() == 0 and tau.is_cpu:
            tau_value = float(tau.detach())
        elif tau is not None:
            tau_rows = tau.detach().resolve_neg().to(device=logits.device, dtype=self.acc)
            tau_rows = tau_rows.reshape(-1).contiguous() if tau.dim() > 0 else tau_rows
        penalised = spec.distance is not None and (tau_rows is not None or tau_value != 0.0)
        self.task = Task(
            logits=logits.detach(),
            labels=labels,
            weight=weight,
            margins=margins,
            tau=tau_rows,
            tau_value=tau_value if penalised else 0.0,
            spec=spec,
            distance_code=spec.distance_code if penalised else 0,
        )

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.acc, device=self.task.logits.device)

    def outputs(self, return_stats: bool) -> tuple[Tensor, Tensor | None]:
        """Buffers for the loss and, if wanted, for the statistics to report."""
        task = self.task
        rows = task.labels.numel()
        if task.spec.reduction == "none":
            loss = task.row_losses = self.empty(rows)
        else:
            loss = task.loss = self.empty()
        if task.spec.reduction == "mean":
            task.denominator = torch.empty((), dtype=torch.float64, device=task.logits.device)
        if return_stats:
            task.reports = self.empty(3, rows)
            task.distance_code = task.spec.distance_code or 1  # `uniform` where the loss has none
        return loss, task.reports

    def save_stats(self) -> None:
        """Have the run keep its statistics for a later gradient, where that is cheaper than a second sweep."""
        slices = saved_slices(self.task)
        if slices > 0:
            self.task.saved = self.empty(self.task.labels.numel(), slices, SAVED)


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tau: Tensor | None,
        labels: Tensor,
        weight: Tensor | None,
        margins: Tensor | None,
        tau_value: float,
        spec: LossSpec,
        return_stats: bool,
    ) -> tuple[Tensor, Tensor | None]:
        call = _Call(logits, tau, labels, weight, margins, tau_value, spec)
        task = call.task
        loss, reports = call.outputs(return_stats)
        ctx.set_materialize_grads(False)
        # Half precision has too little range to hold a gradient before it is scaled (by a loss scale of 2^16, say).
        waits = spec.reduction == "none" or logits.dtype == torch.float16
        if ctx.needs_input_grad[0] and not waits:
            task.grad = torch.empty_like(logits)
        elif ctx.needs_input_grad[0]:
            call.save_stats()
        if ctx.needs_input_grad[1]:
            task.tau_grad = call.empty(labels.numel())
            task.distance_code = spec.distance_code
        run(task)
        ctx.save_for_backward(logits, tau, labels, weight, margins)
        ctx.tau_value, ctx.spec = tau_value, spec
        ctx.grad, ctx.saved, ctx.tau_grad, ctx.denominator = task.grad, task.saved, task.tau_grad, task.denominator
        ctx.distance_code = task.distance_code
        if reports is not None:
            ctx.mark_non_differentiable(reports)
        return loss, reports

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 6
        if upstream is None:
            return None, None, *nothing
        logits, tau, labels, weight, margins = ctx.saved_tensors
        if torch.is_grad_enabled() or watches_operators() or _is_batch(upstream):
            return *_differentiable(ctx, logits, tau, labels, weight, margins, upstream), *nothing
        upstream = _single_or_rows(upstream.resolve_neg())
        logits_grad = tau_grad = None
        with on_device(logits):
            if ctx.needs_input_grad[0]:
                logits_grad = _logits_gradient(ctx, logits, tau, labels, weight, margins, upstream)
            if ctx.needs_input_grad[1]:
                rows = ctx.tau_grad * upstream.to(ctx.tau_grad.dtype)
                if ctx.denominator is not None:
                    # Where no row counts the loss is NaN, but nothing depends on it.
                    ignored = labels.reshape(-1) == ctx.spec.ignore_index
                    rows = torch.where(ignored, 0.0, rows / ctx.denominator).to(rows.dtype)
                tau_grad = (rows.sum() if tau.dim() == 0 else rows.reshape(tau.shape)).to(tau)
        return logits_grad, tau_grad, *nothing


def _is_batch(upstream: Tensor) -> bool:
    """True for a batch of upstream gradients under vmap, which has no memory of its own."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(upstream) or functorch.is_legacy_batchedtensor(upstream)


def _single_or_rows(upstream: Tensor) -> Tensor:
    """Of shape () where all its values are one and the same by construction, as after a later sum; else one per row."""
    if upstream.numel() == 1 or all(n == 1 or s == 0 for n, s in zip(upstream.shape, upstream.stride(), strict=True)):
        return upstream.as_strided((), ())
    return upstream.reshape(-1).contiguous()


def _logits_gradient(
    ctx: Any,
    logits: Tensor,
    tau: Tensor | None,
    labels: Tensor,
    weight: Tensor | None,
    margins: Tensor | None,
    upstream: Tensor,
) -> Tensor:
    task = _Call(logits, tau, labels, weight, margins, ctx.tau_value, ctx.spec).task
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    task.upstream = upstream.to(acc)
    task.distance_code = ctx.distance_code  # as in the pass that saved the statistics
    task.denominator, task.denominator_known = ctx.denominator, True
    task.saved, task.saved_known = ctx.saved, ctx.saved is not None
    # The buffer itself is handed over where nobody needs it again; a pass that keeps the graph gets its own.
    if ctx.grad is not None and not torch._C._autograd._get_current_graph_task_keep_graph():
        task.grad, ctx.grad = ctx.grad, None
        task.skip_unit_upstream = task.upstream.dim() == 0
    else:
        task.grad = torch.empty_like(logits)
    run(task)
    return task.grad


def _differentiable(
    ctx: Any,
    logits: Tensor,
    tau: Tensor | None,
    labels: Tensor,
    weight: Tensor | None,
    margins: Tensor | None,
    upstream: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients that can be differentiated again, or under transforms, through the reference."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        y = labels if logits.dim() == 1 else labels.reshape(logits.shape[0], *logits.shape[2:])
        loss, _ = reference.softmax_loss(
            logits, y, ctx.tau_value if tau is None else tau, weight, ctx.spec, margins=margins
        )
        pairs = zip((logits, tau), ctx.needs_input_grad[:2], strict=True)
        inputs = [t for t, needed in pairs if needed and t is not None]
        found = iter(
            torch.autograd.grad(
                loss,
                inputs,
                upstream.reshape(loss.shape),
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        )
    needs_logits, needs_tau = ctx.needs_input_grad[:2]
    return next(found) if needs_logits else None, next(found) if needs_tau else None
