"""What the GPU benchmark compares: this package's backends, PyTorch eager and compiled, and the peers installed here.

Each contender is a function (logits, labels) -> mean loss, differentiable. A peer that cannot run here is named with
the reason. Relies on drsl_kernels, and on liger_kernel and quack where they are installed; `bench` relies on it.
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

from drsl_kernels import fused_drsl_loss, softmax_loss

from .device import Device
from .store import PLAIN_BASE

TAU = 0.3
LEFT_OUT = dict[str, str]  # contender -> why it was not measured


@dataclass(frozen=True)
class Contender:
    """One way to compute the mean loss of (logits, labels)."""

    name: str
    kind: Literal["plain", "penalty"]  # cross-entropy alone, or with the distance `uniform` times TAU
    loss: Callable[[Tensor, Tensor], Tensor]
    ours: bool = False
    compiles: bool = False  # its first call compiles for seconds
    must_be_ready: bool = False  # ... so many that it is measured only where that was done before
    overwrites_logits: bool = False
    note: str = ""


def contenders(device: Device) -> tuple[list[Contender], LEFT_OUT]:
    """All that can run on the device, and why the others cannot."""
    left_out: LEFT_OUT = {}
    found = [
        Contender(PLAIN_BASE, "plain", F.cross_entropy),
        Contender("reference", "penalty", partial(fused_drsl_loss, tau=TAU, backend="reference")),
        *_ours(),
        _compiled("compiled F.cross_entropy", "plain", F.cross_entropy, device),
        _compiled("compiled reference", "penalty", partial(fused_drsl_loss, tau=TAU, backend="reference"), device),
    ]
    for name, make in {"liger": _liger, "quack": _quack, "cut-cross-entropy": _cut_cross_entropy}.items():
        if device.torch.type != "cuda":
            left_out[name] = "needs a CUDA device"
            continue
        try:
            found.append(make())
        except Exception as error:  # another project's import may fail in any way; the reason goes into the result
            left_out[name] = f"{type(error).__name__}: {error}"
    return found, left_out


def _ours() -> list[Contender]:
    """With backend=None, which is what a user gets, and with each GPU backend by name."""
    found = []
    for backend in (None, "triton", "cuda"):
        name = f"drsl {backend}" if backend else "drsl"
        common: dict[str, Any] = {"ours": True, "compiles": backend != "cuda"}
        penalty = partial(fused_drsl_loss, tau=TAU, backend=backend)
        found.append(Contender(name, "penalty", penalty, **common))
        found.append(Contender(f"{name} plain", "plain", partial(softmax_loss, backend=backend), **common))
    return found


def _compiled(
    name: str, kind: Literal["plain", "penalty"], loss: Callable[[Tensor, Tensor], Tensor], device: Device
) -> Contender:
    compiled = torch.compile(lambda logits, y: loss(logits, y), dynamic=False, backend=device.compiler)
    return Contender(name, kind, compiled, compiles=True, must_be_ready=True)


def _liger() -> Contender:
    liger_cross_entropy = importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy
    return Contender(
        "liger",
        "plain",
        lambda logits, y: liger_cross_entropy(logits, y),
        compiles=True,
        overwrites_logits=True,
        note="writes the gradient into the logits: has its own, restored outside of the timed part before each sample",
    )


def _quack() -> Contender:
    cross_entropy = importlib.import_module("quack").cross_entropy
    return Contender("quack", "plain", lambda logits, y: cross_entropy(logits, y), compiles=True)


def _cut_cross_entropy() -> Contender:
    importlib.import_module("cut_cross_entropy")
    raise NotImplementedError("takes hidden states and a classifier; it has no loss of given logits")
