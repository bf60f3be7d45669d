"""What the linear stage compares: losses of a linear layer that never store its logits, and losses of logits in memory.

Each contender is a function (hidden, weight, labels) -> mean loss, differentiable. A peer that cannot run here is named
with the reason. Relies on `contenders`, and on liger_kernel and cut_cross_entropy where they are installed; `linear`
relies on it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from drsl_kernels import fused_drsl_loss, fused_linear_drsl_loss, fused_linear_softmax_loss, softmax_loss

from .contenders import LEFT_OUT, TAU
from .device import Device
from .store import PLAIN_BASE, WHOLE_LOGITS

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LinearContender:
    """One way to compute the mean loss of (hidden, weight, labels)."""

    name: str
    kind: Literal["plain", "penalty"]  # cross-entropy alone, or with the distance `uniform` times TAU
    loss: Loss
    note: str = ""


def linear_contenders(device: Device) -> tuple[list[LinearContender], LEFT_OUT]:
    """All that can run on the device, and why the others cannot."""
    found = [
        LinearContender(WHOLE_LOGITS, "penalty", _of_logits(partial(fused_drsl_loss, tau=TAU))),
        LinearContender(f"{WHOLE_LOGITS} plain", "plain", _of_logits(softmax_loss)),
        LinearContender(PLAIN_BASE, "plain", _of_logits(F.cross_entropy)),
        *_ours(),
    ]
    left_out: LEFT_OUT = {}
    for name, make in PEERS.items():
        if name in NEED_CUDA and device.torch.type != "cuda":
            left_out[name] = "needs a CUDA device"
            continue
        try:
            found.append(make(name))
        except Exception as error:  # another project's import may fail in any way; the reason goes into the result
            left_out[name] = f"{type(error).__name__}: {error}"
    return found, left_out


def _of_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda hidden, weight, y: loss(F.linear(hidden, weight), y)


def _ours() -> list[LinearContender]:
    """With backend=None, which is what a user gets, and with each GPU backend by name."""
    found = []
    for backend in (None, "triton", "cuda"):
        name = f"drsl {backend}" if backend else "drsl"
        penalty: Any = partial(fused_linear_drsl_loss, tau=TAU, backend=backend)
        plain: Any = partial(fused_linear_softmax_loss, backend=backend)
        found.append(LinearContender(name, "penalty", penalty))
        found.append(LinearContender(f"{name} plain", "plain", plain))
    return found


def _torch(name: str) -> LinearContender:
    loss: Loss = F.linear_cross_entropy  # from torch 2.13 on
    return LinearContender(name, "plain", loss)


def _torch_chunked(name: str) -> LinearContender:
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return LinearContender(name, "plain", partial(F.linear_cross_entropy, options=options))


def _liger(name: str) -> LinearContender:
    function = importlib.import_module(
        "liger_kernel.ops.fused_linear_cross_entropy"
    ).LigerFusedLinearCrossEntropyFunction

    def loss(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        result = function.apply(hidden, weight, y)
        found: Tensor = result[0] if isinstance(result, tuple) else result  # newer releases return more
        return found

    return LinearContender(name, "plain", loss)


def _cut_cross_entropy(name: str) -> LinearContender:
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    note = "leaves out gradients that bfloat16 would round away, and computes the logits again in the backward pass"
    return LinearContender(name, "plain", lambda hidden, weight, y: loss(hidden, weight, y), note)


PEERS: dict[str, Callable[[str], LinearContender]] = {
    "F.linear_cross_entropy": _torch,
    "F.linear_cross_entropy, chunked": _torch_chunked,
    "liger": _liger,
    "cut-cross-entropy": _cut_cross_entropy,
}
NEED_CUDA = ("liger", "cut-cross-entropy")
