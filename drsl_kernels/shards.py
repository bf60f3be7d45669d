"""Rows whose classes are spread over the processes of a group: what the processes tell each other about them.

Eight numbers per row, which merge as those of a row's parts do anywhere else, and the label's logit go to every process
in one gather. Relies on `backends`; `parallel` and `linear_chunks` rely on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import torch.distributed as dist
from torch import Tensor

from .backends import choose_pieces
from .backends.pieces import Losses, Pieces, Shard
from .checks import inside_function_transform
from .spec import LossSpec, integer

if TYPE_CHECKING:  # a build without processes lacks it
    from torch.distributed import ProcessGroup

__all__ = ["NO_SECOND_DERIVATIVES", "ClassShard", "Gathered", "class_shard", "shard_pieces"]

NO_SECOND_DERIVATIVES: Final = "classes that are spread over processes have no second derivatives"

_STATS: Final = 8  # numbers per row, see `Pieces.row_stats`


@dataclass(frozen=True)
class ClassShard:
    """Where the classes of this process begin among those of all processes of `group`.

    `even` says that all have equally many, so that nobody needs to ask.
    """

    group: ProcessGroup
    first: int
    even: bool = False

    def bytes_per_row(self, itemsize: int) -> int:
        """At the end of `gather`: what was given, what everybody gave, and their statistics on their own."""
        parts = dist.get_world_size(self.group)
        return itemsize * ((1 + parts) * (_STATS + 1) + parts * _STATS)

    def fewest(self, rows: int, device: torch.device) -> int:
        """The least of what the processes say, for whom a gather must be of the same rows.

        Even shards are asked on the CPU only, where a wrong word of the caller then meets the errors of `gather`.
        """
        if self.even and device.type != "cpu":
            return rows
        everybody = torch.tensor([rows], device=device)
        dist.all_reduce(everybody, dist.ReduceOp.MIN, group=self.group)
        return int(everybody)

    def gather(self, pieces: Pieces, logits: Tensor, y: Tensor, spec: LossSpec) -> Gathered:
        """Statistics of logits (N, C) of this process, and of everybody else's; y has labels among all classes.

        Raises:
            ValueError, IndexError: on the CPU, the processes' classes do not follow one another, or a label is none of
                them. Elsewhere the losses are NaN then.
        """
        assert pieces.row_stats is not None
        local = self._local(y, logits.shape[1], spec.ignore_index)
        is_here = (local >= 0) & (local < logits.shape[1]) & (local != spec.ignore_index)
        at = local.masked_fill(~is_here, 0).unsqueeze(1)
        some = _some_class(logits)
        stats = pieces.row_stats(some, local, spec)
        label_logits = some.gather(1, at).squeeze(1).to(stats.dtype).masked_fill(~is_here, 0.0)
        packed = stats.new_zeros(len(y) + 1, _STATS + 1)
        packed[:-1, :_STATS], packed[:-1, _STATS] = stats, label_logits
        packed[-1, 0].fill_(self.first)  # to assign a number would wait for a GPU
        packed[-1, 1].fill_(logits.shape[1])
        parts = dist.get_world_size(self.group)
        everywhere = packed.new_empty(parts * packed.shape[0], packed.shape[1])
        # Its name from torch 2.13 on, and before.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(everywhere, packed, group=self.group)
        everywhere = everywhere.reshape(parts, *packed.shape)
        label_logits = everywhere[:, :-1, _STATS].sum(0)
        unknown = self._unknown(everywhere[:, -1, :2], y, spec)
        all_stats = everywhere[:, :-1, :_STATS].transpose(0, 1).contiguous()
        return Gathered(local, Shard(label_logits.masked_fill(unknown, torch.nan), all_stats))

    def _local(self, y: Tensor, classes: int, ignore_index: int) -> Tensor:
        """Labels among the classes of this process; those of others are a number that is no class and not ignored."""
        elsewhere = -1 if ignore_index != -1 else -2
        local = y.to(torch.int64) - self.first
        local = local.masked_fill((local < 0) | (local >= classes), elsewhere)
        return local.masked_fill(y == ignore_index, ignore_index)

    def _unknown(self, ranges: Tensor, y: Tensor, spec: LossSpec) -> Tensor:
        """Rows whose label is no class of any process; all of them where the processes' classes have gaps."""
        first, count = ranges.unbind(1)
        ends = count.cumsum(0)
        gaps = ~((ends - count) == first).all()
        outside = (y != spec.ignore_index) & ((y < 0) | (y >= ends[-1]))
        if y.device.type == "cpu":
            if gaps:
                held = ", ".join(f"[{int(a)}, {int(a + c)})" for a, c in ranges.tolist())
                raise ValueError(f"first_class must make the classes of the processes follow one another, got {held}")
            if outside.any():
                row = int(outside.to(torch.int8).argmax())
                raise IndexError(f"y holds label {int(y[row])} at row {row}, outside [0, C) = [0, {int(ends[-1])})")
        return outside | gaps


@dataclass(frozen=True)
class Gathered:
    """What this process knows of rows after a gather."""

    local: Tensor
    shard: Shard

    def losses(
        self,
        pieces: Pieces,
        logits: Tensor,
        tau: Tensor | float,
        spec: LossSpec,
        *,
        upstream: Tensor | None,
        with_tau: bool,
        with_reports: bool,
    ) -> Losses:
        """As `OverLogits`, of the rows; their gradient by the classes of this process."""
        return pieces.over_logits(
            _some_class(logits),
            self.local,
            tau,
            None,
            None,
            spec,
            upstream=upstream,
            with_tau=with_tau,
            with_reports=with_reports,
            shard=self.shard,
        )


def _some_class(logits: Tensor) -> Tensor:
    """The logits (N, C), or of a process without classes one that is masked: it counts for nothing."""
    return logits if logits.shape[1] else logits.new_full((logits.shape[0], 1), -torch.inf)


def class_shard(group: ProcessGroup | None, first_class: int | None, classes: int) -> ClassShard:
    """The shard of a process that has so many classes.

    Raises:
        RuntimeError: there is no process group, or this process is not in it; under `torch.func`.
        ValueError: first_class is negative.
    """
    if inside_function_transform():
        raise RuntimeError("classes that are spread over processes cannot be transformed by torch.func")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("classes are spread over processes: call torch.distributed.init_process_group() first")
    chosen = group if group is not None else dist.group.WORLD
    rank = dist.get_rank(chosen)
    if rank < 0 or chosen is None:
        raise RuntimeError("group must be one that this process is a member of")
    if first_class is None:
        return ClassShard(chosen, rank * classes, even=True)
    if integer("first_class", first_class) < 0:
        raise ValueError(f"first_class must be 0 or more, got {first_class!r}")
    return ClassShard(chosen, first_class)


def shard_pieces(logits: Tensor, backend: str | None) -> Pieces:
    pieces = choose_pieces(logits, backend)
    if pieces.row_stats is None:
        raise RuntimeError(
            "classes that are spread over processes need a compiled backend, and none is usable for logits on "
            f"{logits.device}: see drsl_kernels.info()"
        )
    return pieces
