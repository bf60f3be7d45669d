"""What the GPU tests share: the comparison with the truth, and a CUDA graph that is a plain call on the CPU.

The truth is computed on the CPU, in float64. Relies on cases.py and truth.py; the test files of this folder rely on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from cases import assert_error, run
from torch import Tensor
from truth import loss_and_gradient

T = TypeVar("T")


def pick(device: torch.device, on_gpu: T, on_cpu: T) -> T:
    """A size: the one that the GPU is tested with, or a small one for the CPU."""
    return on_cpu if device.type == "cpu" else on_gpu


def assert_true_on(
    device: torch.device,
    z: Tensor,
    y: Tensor,
    tau: Tensor | float = 0.0,
    *,
    backend: str,
    tolerance: float = 32.0,
    **arguments: Any,
) -> None:
    """`cases.assert_true` called on `device`, with the truth from the CPU. Logits on `device` keep their strides."""
    got = run(z.to(device), y.to(device), moved(tau, device), backend=backend, **moved(arguments, device))
    z, y, tau, arguments = (moved(x, torch.device("cpu")) for x in (z, y, tau, arguments))
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    best = loss_and_gradient(z, y, tau, **arguments)
    naive = loss_and_gradient(z, y, tau, dtype=dtype, **arguments)
    assert got[0].dtype == dtype
    assert got[1].dtype == z.dtype
    half_ulps = 2.0 if device.type == "cpu" and z.dtype == torch.bfloat16 else 1.0  # Triton's interpreter truncates
    smoothed = arguments.get("label_smoothing", 0.0) > 0
    for name, ours, truth, plain in zip(("loss", "gradient", "gradient of tau"), got, best, naive, strict=True):
        if truth is not None:
            assert ours is not None
            scale = 1.0 if dtype == torch.float64 or name == "gradient of tau" or smoothed else 0.0
            assert_error(name, ours.cpu(), truth, plain, tolerance * torch.finfo(dtype).eps, scale, half_ulps)


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, or the tensors in a dict, on the device; anything else as it is."""
    if isinstance(value, dict):
        return {name: moved(one, device) for name, one in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def recorded(device: torch.device, work: Callable[[], T]) -> Callable[[], T]:
    """`work` as a CUDA graph: each call replays it and returns the same output tensors, filled anew."""
    if device.type == "cpu":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()

    def replay() -> T:
        graph.replay()
        return outputs

    return replay


@contextmanager
def never_waiting(device: torch.device) -> Iterator[None]:
    """Whatever makes the host wait for the device raises, in the threads of the autograd engine too."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
