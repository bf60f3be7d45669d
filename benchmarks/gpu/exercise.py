"""The program that compute-sanitizer and ncu look on at: `python -m gpu.exercise`, with benchmarks/ on the path.

    --mode sanitize   every kind of call on small and awkward inputs, each compared with the reference on the CPU;
                      --part I/N for one of N processes that share the work
    --mode profile    one forward+backward per backend and case, announced by a line `case: ...`, with the profiler
                      switched on for it alone

Relies on drsl_kernels and `device`; `gpu_suite` runs it.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
from torch import Tensor

import drsl_kernels
from drsl_kernels import fused_drsl_loss

from .contenders import TAU
from .device import Device, device

# Few classes, odd ones, many, and rows that are split; few enough for a tool that slows each access a hundredfold.
SANITIZED = [(5, 3), (37, 10), (130, 257), (3, 1000), (2, 5003), (2, 70001)]
PROFILED = [(4096, 1000), (134218, 1000), (1047, 128256), (128, 10), (4195, 32000), (13421773, 10)]
TINY = [(3, 3), (2, 130)]
FAR_LABELS = (-1, 2**31, -(2**62))


def main() -> None:
    """Run until done or out of time; a wrong result ends it with a message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("sanitize", "profile"), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--part", default="0/1")
    options = parser.parse_args()
    here = device(options.device)
    end = time.monotonic() + options.seconds
    shapes = TINY if options.device == "cpu" else SANITIZED if options.mode == "sanitize" else PROFILED
    names = backends()
    part, parts = map(int, options.part.split("/"))
    todo = list(enumerate(itertools.product(shapes, (torch.float32, torch.bfloat16), names)))[part::parts]
    done = 0
    for i, (shape, dtype, name) in todo:
        if time.monotonic() > end:
            break
        if options.mode == "profile":
            profile(here, name, shape, dtype)
        else:
            sanitize(here, name, shape, dtype, view=i)
        done += 1
    print(f"exercise: {done} of {len(todo)} inputs ({', '.join(names)})", flush=True)


def backends() -> list[str]:
    """The GPU backends that are usable; a dry run without Triton goes through the reference."""
    usable = [b.name for b in drsl_kernels.info().backends if b.usable]
    return [name for name in ("triton", "cuda") if name in usable] or ["reference"]


def profile(here: Device, backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = torch.randn(shape, device=here.torch, dtype=dtype).requires_grad_()
    y = torch.randint(shape[1], shape[:1], device=here.torch)

    def run() -> None:
        torch.autograd.grad(fused_drsl_loss(logits, y, TAU, backend=backend), logits)

    run()
    print(f"case: {backend} {shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}", flush=True)
    here.profiled(run)
    here.free()


def sanitize(here: Device, backend: str, shape: tuple[int, int], dtype: torch.dtype, view: int) -> None:
    """Loss alone and gradients, upstream 1 and other, masked classes, ignored and mislabelled rows, in one of `views`.

    One, because a backend that compiles for each takes most of its time for that.
    """
    rows, classes = shape
    generator = torch.Generator().manual_seed(classes)
    padded = torch.randn(rows, classes + 5, generator=generator).to(dtype)
    padded[0, 1] = -torch.inf
    y = torch.randint(2, classes, (rows,), generator=generator)
    y[-1] = -100
    z, there = (views(x, classes)[view % 4] for x in (padded, padded.to(here.torch)))
    check(here, backend, z, there, y)
    if here.torch.type == "cuda":  # on the CPU such labels are refused
        for label in (*FAR_LABELS, classes):
            wrong = torch.where(torch.arange(rows) == 0, label, y)
            loss, grad = results(there, wrong.to(here.torch), 1.0, backend, "none")
            if not (loss[0].isnan() and grad[0, 2:].isnan().all() and not loss[1:].isnan().any()):
                raise SystemExit(f"exercise: label {label} of {shape} {dtype} on {backend}: loss {loss.tolist()}")


def views(padded: Tensor, classes: int) -> list[Tensor]:
    """The same logits in other places: rows that start where a vector does and not, no padding, classes apart."""
    first = padded[:, :classes]
    return [first, padded[:, 1 : classes + 1], first.contiguous(), first.t().contiguous().t()]


def check(here: Device, backend: str, z: Tensor, there: Tensor, y: Tensor) -> None:
    """Compare `there` with the reference on the same logits `z` on the CPU."""
    tolerance = 1e-5 if z.dtype == torch.float32 else 1e-2
    for reduction, factor in (("mean", 1.0), ("mean", 3.0), ("none", 1.0)):
        want, want_grad = results(z.float(), y, factor, "reference", reduction)
        loss, grad = results(there, y.to(here.torch), factor, backend, reduction)
        with torch.no_grad():
            alone = fused_drsl_loss(there, y.to(here.torch), TAU, reduction=reduction, backend=backend).cpu()
        for name, got, right in (("loss", loss, want), ("loss alone", alone, want), ("gradient", grad, want_grad)):
            if not torch.allclose(got.float(), right, rtol=tolerance, atol=tolerance * right.abs().max().item()):
                raise SystemExit(f"exercise: {name} of {tuple(z.shape)} {z.dtype} on {backend}, {reduction} is wrong")


def results(z: Tensor, y: Tensor, factor: float, backend: str, reduction: str) -> tuple[Tensor, Tensor]:
    """Loss and `factor` times the gradient, on the CPU."""
    z = z.detach().requires_grad_()
    loss = fused_drsl_loss(z, y, TAU, reduction=reduction, backend=backend)
    grad = torch.autograd.grad(loss, z, torch.full_like(loss, factor))[0]
    return loss.detach().cpu(), grad.cpu()


if __name__ == "__main__":
    main()
