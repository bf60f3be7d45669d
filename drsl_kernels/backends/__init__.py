"""Choosing the backend that computes a loss, and telling why one is unavailable.

Relies on `_build` (loading the extension), `spec` and `reference`; `functional` relies on it. A backend is a
callable with the signature of `reference.softmax_loss`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Final, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import reference
from .._build import load_extension
from .._version import __version__
from ..checks import constant_when_compiled, inside_function_transform, watches_operators
from ..spec import BACKENDS, LossSpec, LossStats, check_backend_name
from . import cpp
from .pieces import REFERENCE, Pieces

# (logits, y, tau, weight, spec, return_stats, margins)
Backend: TypeAlias = Callable[
    [Tensor, Tensor, "Tensor | float", "Tensor | None", LossSpec, bool, "Tensor | None"],
    tuple[Tensor, "LossStats | None"],
]

VARIABLE: Final = "DRSL_KERNELS_BACKEND"
ENVIRONMENT: Final = os.environ.get(VARIABLE) or None

# Per kind of device, the best first. For CUDA the order awaits measurements.
PREFERENCE: Final[dict[str, tuple[str, ...]]] = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}


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
    """The backend for these logits: the one that `name` forces, or the first usable one of `PREFERENCE`.

    The environment variable DRSL_KERNELS_BACKEND stands in for a `name` of None, where PyTorch does not ask for its
    own operators.

    Raises:
        ValueError: `name` is not the name of a backend.
        RuntimeError: the backend that `name` forces cannot be used for these logits; says why.
    """
    if name is not None:
        check_backend_name("backend", name)
        return _forced(logits, name, f"backend={name!r}")
    if type(logits) not in (Tensor, Parameter) or needs_transforms():
        return reference.softmax_loss
    if ENVIRONMENT is not None:
        check_backend_name(VARIABLE, ENVIRONMENT)
        return _forced(logits, ENVIRONMENT, f"{VARIABLE}={ENVIRONMENT}")
    return _best(logits.device.type)


def choose_pieces(logits: Tensor, name: str | None) -> Pieces:
    """Those of the backend that `choose` chooses."""
    chosen = choose(logits, name)
    names = (name for name in BACKENDS if name != "reference" and _usable(name))
    return next((_load_pieces(name) for name in names if _load(name) is chosen), REFERENCE)


@cache
def _best(device: str) -> Backend:
    """Decided once per kind of device, with one warning where no backend has it."""
    for candidate in PREFERENCE.get(device, ()):
        if _usable(candidate):
            return _load(candidate)
    _warn_fallback(device)
    return reference.softmax_loss


def is_compiled(logits: Tensor, name: str | None) -> bool:
    """True where `torch.compile` traces this call and the device has a backend: then the operators of `ops` take it.

    What is exported stays made of PyTorch's own operators, so that it runs without this package.
    """
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not inside_function_transform()
        and torch.autograd.forward_ad._current_level < 0
        and name != "reference"
        and type(logits) in (Tensor, Parameter)
        and (name is not None or _has_backend(logits.device.type))
    )


@constant_when_compiled
def _has_backend(device: str) -> bool:
    return any(_usable(name) for name in PREFERENCE.get(device, ()))


def needs_transforms() -> bool:
    """True where only PyTorch's own operators work: under forward-mode differentiation, or where they are watched."""
    return torch.autograd.forward_ad._current_level >= 0 or watches_operators()


def _forced(logits: Tensor, name: str, how: str) -> Backend:
    if name == "reference" or not isinstance(logits, Tensor):  # the reference tells what is wrong with the latter
        return reference.softmax_loss
    if not _usable(name):
        raise RuntimeError(f"{how} is not usable: {_inspect(name).detail}")
    if logits.device.type not in _devices(name):
        where = " or ".join("the CPU" if device == "cpu" else "a CUDA device" for device in _devices(name))
        raise RuntimeError(f"{how} needs logits on {where}, got {logits.device}")
    if needs_transforms():
        raise RuntimeError(
            f"{how} is not usable inside torch.export, torch.func or forward-mode differentiation; "
            "leave backend=None there"
        )
    return _load(name)


@cache
def _load(name: str) -> Backend:
    """The callable of a usable backend. What it needs is imported here, and not where nobody uses it."""
    if name in ("cpp", "cuda"):
        return cpp.backend(import_module("drsl_kernels._C").softmax_loss)
    triton: Backend = import_module(".triton", __name__).softmax_loss
    return triton


@cache
def _load_pieces(name: str) -> Pieces:
    if name in ("cpp", "cuda"):
        import_module("drsl_kernels._C")
        return cpp.pieces(torch.ops.drsl_kernels)
    pieces: Pieces = import_module(".triton.pieces", __name__).PIECES
    return pieces


def _devices(name: str) -> tuple[str, ...]:
    if name == "triton" and import_module(".triton", __name__).INTERPRETED:
        return ("cuda", "cpu")
    return ("cpu",) if name == "cpp" else ("cuda",)


@cache
def _usable(name: str) -> bool:
    return _inspect(name).usable


def _inspect(name: str) -> BackendInfo:
    if name == "reference":
        return BackendInfo(name, True, "pure PyTorch, any device")
    if name == "triton":
        return _inspect_triton()
    status = load_extension()
    if not status.loaded:
        return BackendInfo(name, False, status.reason)
    if name == "cpp":
        return BackendInfo(name, True, f"CPU, {cpp.capability()} (compiled: {', '.join(status.instruction_sets)})")
    if not status.cuda_architectures:
        return BackendInfo(name, False, f"not built: {status.no_cuda_reason}")
    if not torch.cuda.is_available():
        return BackendInfo(name, False, "no CUDA device is available")
    compiled = ", ".join(status.cuda_architectures)
    foreign = [i for i in range(torch.cuda.device_count()) if not _runs_on(status.cuda_architectures, i)]
    if foreign:
        wanted = ", ".join("sm_{}{}".format(*torch.cuda.get_device_capability(i)) for i in foreign)
        return BackendInfo(name, False, f"compiled for {compiled}, and not for {wanted}: set TORCH_CUDA_ARCH_LIST")
    return BackendInfo(name, True, f"CUDA C++ (compiled: {compiled})")


def _runs_on(architectures: tuple[str, ...], device: int) -> bool:
    """Machine code runs on later GPUs of its generation, PTX (compiled when it is loaded) on all later ones."""
    major, minor = torch.cuda.get_device_capability(device)
    for architecture in architectures:
        number = int("".join(filter(str.isdigit, architecture)))
        if architecture.endswith("+PTX") and number <= 10 * major + minor:
            return True
        if number // 10 == major and number % 10 <= minor:
            return True
    return False


def _inspect_triton() -> BackendInfo:
    if find_spec("triton") is None:
        return BackendInfo("triton", False, "the Python package triton is not installed")
    module = import_module(".triton", __name__)
    if module.INTERPRETED:
        return BackendInfo("triton", True, f"triton {module.VERSION}, interpreted: slow, for tests")
    if not torch.cuda.is_available():
        return BackendInfo("triton", False, "no CUDA device is available")
    return BackendInfo("triton", True, f"triton {module.VERSION}")


def _warn_fallback(device: str) -> None:
    """A warning, since a silent fallback costs a user the speed that they came for."""
    reasons = [f"{name} ({_inspect(name).detail})" for name in PREFERENCE.get(device, ())]
    why = "; ".join(reasons) if reasons else f"no compiled backend for {device!r} tensors in this version"
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
