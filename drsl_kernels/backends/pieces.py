"""What a backend offers besides the whole loss: the loss without autograd, for whoever composes it.

Gradients take the place of the logits, and a loss may be of logits whose other classes lie elsewhere. Relies on
`reference`; cpp.py and triton/pieces.py have such functions for their kernels, `linear_chunks` and `parallel` rely on
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import reference
from ..spec import LossSpec

__all__ = ["REFERENCE", "Losses", "Pieces", "Shard", "autograd_inside_an_operator"]


class Losses(NamedTuple):
    """Of every row: the loss, and if asked for its derivative by tau and (3, N) cross-entropy, distance and margin."""

    rows: Tensor
    tau_slopes: Tensor | None
    reports: Tensor | None


class Shard(NamedTuple):
    """What a loss of some of the classes needs of the others.

    Attributes:
        label_logits: (N,), the labels' logits, wherever they lie; float64 for float64 logits, else float32.
        stats: (N, P, 8), what `Pieces.row_stats` gives for each of P parts, this one included.
    """

    label_logits: Tensor
    stats: Tensor


class OverLogits(Protocol):
    """The losses of logits (N, C), and with `upstream` their gradient, each row's times upstream, over the logits.

    y (N,), tau, weight, margins and spec are as in `reference.softmax_loss`, but they are not checked, and reductions
    are the caller's. `upstream` has one value, or one per row. Of a shard labels outside of [0, C) lie elsewhere, and
    there are no weights, no margins of classes and no other activation than softmax.
    """

    def __call__(
        self,
        logits: Tensor,
        y: Tensor,
        tau: Tensor | float,
        weight: Tensor | None,
        margins: Tensor | None,
        spec: LossSpec,
        *,
        upstream: Tensor | None,
        with_tau: bool,
        with_reports: bool,
        shard: Shard | None = None,
    ) -> Losses: ...


class Pieces(NamedTuple):
    """A backend's functions.

    Attributes:
        over_logits: see `OverLogits`.
        row_stats: (N, 8) statistics of logits (N, C), of which labels outside of [0, C) are none: the numbers of
            RowStats in csrc/row_loss.h, the number of classes and the sum of their depths. None where there are no
            shards.
    """

    over_logits: OverLogits
    row_stats: Callable[[Tensor, Tensor, LossSpec], Tensor] | None


@contextmanager
def autograd_inside_an_operator() -> Iterator[None]:
    """Operators run below autograd: what they compute themselves is recorded only with its keys let in again."""
    C = torch._C
    excluded = C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(C.DispatchKey, name))
    with C._ForceDispatchKeyGuard(C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def _over_logits(
    logits: Tensor,
    y: Tensor,
    tau: Tensor | float,
    weight: Tensor | None,
    margins: Tensor | None,
    spec: LossSpec,
    *,
    upstream: Tensor | None,
    with_tau: bool,
    with_reports: bool,
    shard: Shard | None = None,
) -> Losses:
    """Through autograd: needs several times the memory of the logits."""
    assert shard is None
    with autograd_inside_an_operator():
        z = logits.detach().requires_grad_(upstream is not None)
        per_row = (tau if isinstance(tau, Tensor) else z.new_tensor(tau)).detach().expand(y.shape).clone()
        strength = per_row.requires_grad_() if with_tau else tau
        spec = replace(spec, reduction="none")
        rows, stats = reference.softmax_loss(z, y, strength, weight, spec, with_reports, margins)
        slopes = None
        if with_tau:
            (slopes,) = torch.autograd.grad(rows.sum(), per_row, retain_graph=True, materialize_grads=True)
        if upstream is not None:
            (gradient,) = torch.autograd.grad(rows, z, upstream.to(rows.dtype).expand(rows.shape))
            logits.copy_(gradient)
    return Losses(rows.detach(), slopes, None if stats is None else torch.stack(stats[:3]))


REFERENCE = Pieces(_over_logits, None)
