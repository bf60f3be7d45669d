"""Several processes that train one model together, as `torchrun` starts them; also the one process that is alone.

Each process has its part of every batch. Gradients are summed over the processes in one piece after the backward pass,
each divided by the size of the joint batch, and not averaged by DistributedDataParallel's hooks: the parts of a batch
need not be equal, a part may be empty, and the sum is taken in the same order in a run that was resumed. `train` and
`engine` rely on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["World", "joined_world"]


@dataclass(frozen=True)
class World:
    """This process among `size` that work together; alone by default. `rank` 0 writes the files."""

    rank: int = 0
    size: int = 1

    def part(self, batch: Tensor) -> Tensor:
        """The rows of a joint batch that are this process's; none where there are fewer rows than processes."""
        return batch if self.size == 1 else batch.tensor_split(self.size)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """The values of all processes, added; a new tensor."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def sum_gradients(self, model: nn.Module) -> None:
        if self.size == 1:
            return
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of rank 0: the running averages of batch normalisation."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined_world(device: str) -> Iterator[World]:
    """Join the processes of `torchrun`, if it started this one.

    NCCL connects GPUs, and "cuda" comes to mean this process's own; gloo connects CPUs.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World()
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
