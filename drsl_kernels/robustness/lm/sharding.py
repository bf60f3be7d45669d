"""A model over several processes: whole in each of them, or in parts by PyTorch's FSDP2 (`fully_shard`).

Whole, gradients are summed over the processes by `..distributed`. In parts, weights, gradients and the optimizer's
state are spread over the processes, and put together for each block when it is computed; checkpoints hold the whole
of them either way. `engine` relies on it.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..distributed import World
from .model import GPT
from .settings import Sharding

__all__ = ["Placement"]

_WHOLE: Final = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Placement:
    """Where the weights of a model are, and what follows from it.

    Raises:
        ValueError: "fsdp" without processes to share the model.
    """

    def __init__(self, sharding: Sharding, world: World) -> None:
        if sharding == "fsdp" and world.size == 1:
            raise ValueError("sharding 'fsdp' needs several processes: start them with torchrun")
        self.sharded = sharding == "fsdp"
        self.world = world

    def place(self, model: GPT, device: torch.device) -> GPT:
        """The model on its device, with each block a part of its own where it is sharded."""
        model.to(device)
        if self.sharded:
            mesh = init_device_mesh(device.type, (self.world.size,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model

    def backward(self, loss: Tensor, share: float, model: nn.Module) -> None:
        """Leave in the model the gradient of the joint batch's mean loss; this process has a `share` of its rows."""
        if self.sharded:  # which averages over the processes
            (loss * (share * self.world.size)).backward()  # type: ignore[no-untyped-call]
            return
        (loss * share if share != 1 else loss).backward()  # type: ignore[no-untyped-call]
        self.world.sum_gradients(model)

    def clip(self, model: nn.Module, norm: float) -> Tensor:
        """Shorten the gradient to a length; the length it had, a scalar."""
        length = torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
        return length.full_tensor() if isinstance(length, DTensor) else length

    def states(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        """The model's and the optimizer's state, whole. All processes have to ask."""
        if not self.sharded:
            found: dict[str, Any] = {"model": model.state_dict()}
            return found if optimizer is None else found | {"optimizer": optimizer.state_dict()}
        found = {"model": get_model_state_dict(model, options=_WHOLE)}
        if optimizer is not None:
            found["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
        return found

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, states: dict[str, Any]) -> None:
        """The inverse of `states`, in each process."""
        if self.sharded:
            set_model_state_dict(model, states["model"], options=StateDictOptions(full_state_dict=True))
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(model, optimizer, states["optimizer"], options=options)
        else:
            model.load_state_dict(states["model"])
            optimizer.load_state_dict(states["optimizer"])
