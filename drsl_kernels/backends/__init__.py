"""Choosing the backend that computes a loss, and telling why one is unavailable.

Relies on `_build` (loading the extension), `spec` and `reference`; `functional` relies on it. A backend is a
callable with the signature of `reference.softmax_loss`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import reference
from .._build import load_extension
from .._version import __version__
from ..spec import BACKENDS, LossSpec, LossStats, check_backend_name, watches_operators
from . import cpp

Backend: TypeAlias = Callable[
    [Tensor, Tensor, "Tensor | float", "Tensor | None", LossSpec, bool], tuple[Tensor, "LossStats | None"]
]


@dataclass(frozen=True)
class BackendInfo:
    """One backend: whether it can be used here, and what it is or why not."""

    name: str
    usable: bool
    detail: str


@dataclass(frozen=True)
class Info:
    """What `drsl_kernels.info()` returns; printing it gives a short table."""

    version: str
    torch: str
    backends: tuple[BackendInfo, ...]

    def __str__(self) -> str:
        lines = [f"drsl_kernels {self.version}, torch {self.torch}"]
        lines += [f"  {b.name:<10} {'usable' if b.usable else 'not usable':<11} {b.detail}" for b in self.backends]
        return "\n".join(lines)


def info() -> Info:
    """Say which backends are built and usable here, and why the others are not."""
    return Info(__version__, torch.__version__, tuple(_inspect(name) for name in BACKENDS))


def choose(logits: Tensor, name: str | None) -> Backend:
    """The backend for these logits: the one that `name` forces, or the fastest that is usable.

    Raises:
        ValueError: `name` is not the name of a backend.
        RuntimeError: the backend that `name` forces cannot be used for these logits; says why.
    """
    if name is not None:
        check_backend_name(name)
        return _forced(logits, name)
    if type(logits) not in (Tensor, Parameter) or needs_transforms():
        return reference.softmax_loss
    if logits.is_cpu and _usable("cpp"):
        return cpp.softmax_loss
    _warn_fallback(logits.device.type)
    return reference.softmax_loss


def needs_transforms() -> bool:
    """True where only PyTorch's own operators work: under forward-mode differentiation, or where they are watched."""
    return torch.autograd.forward_ad._current_level >= 0 or watches_operators()


def _forced(logits: Tensor, name: str) -> Backend:
    if name == "reference" or not isinstance(logits, Tensor):  # the reference tells what is wrong with the latter
        return reference.softmax_loss
    if not _usable(name):
        raise RuntimeError(f"backend={name!r} is not usable: {_inspect(name).detail}")
    if logits.device.type != "cpu":
        raise RuntimeError(f"backend='cpp' needs logits on the CPU, got {logits.device}")
    if needs_transforms():
        raise RuntimeError(
            "backend='cpp' is not usable inside torch.compile, torch.func or forward-mode differentiation; "
            "leave backend=None there"
        )
    return cpp.softmax_loss


@cache
def _usable(name: str) -> bool:
    return _inspect(name).usable


def _inspect(name: str) -> BackendInfo:
    if name == "reference":
        return BackendInfo(name, True, "pure PyTorch, any device")
    if name == "cpp":
        status = load_extension()
        if not status.loaded:
            return BackendInfo(name, False, status.reason)
        return BackendInfo(name, True, f"CPU, {cpp.capability()} (compiled: {', '.join(status.instruction_sets)})")
    return BackendInfo(name, False, "not part of this version")


@cache
def _warn_fallback(device: str) -> None:
    """One warning per kind of device, since a silent fallback costs a user the speed that they came for."""
    why = _inspect("cpp").detail if device == "cpu" else f"no compiled backend for {device!r} tensors in this version"
    message = f"drsl_kernels runs on the slower pure-PyTorch reference: {why}"
    warnings.warn(message, RuntimeWarning, stacklevel=_frames_to_user())


def _frames_to_user() -> int:
    """The stack level, seen from the caller, of the first frame outside of this package and of torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "drsl_kernels",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    return level
