"""What the CPU benchmarks compare: shapes, kinds of work, and each contender as a function that does the same work.

Inputs are random normal logits and random labels. Relies on drsl_kernels; `ratios`, `scaling` and `test_loss` rely on
it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from drsl_kernels import fused_drsl_loss

Run: TypeAlias = Callable[[], object]
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Work: TypeAlias = Literal["forward", "forward+backward", "no_grad"]

WORKS: tuple[Work, ...] = ("forward+backward", "forward", "no_grad")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# (rows, classes), in the order in which the README lists them
SHAPES = [
    (128, 10),
    (128, 100),
    (65536, 10),
    (16384, 100),
    (256, 1000),
    (4096, 1000),
    (1024, 32000),
    (256, 128256),
]
TAU = 0.5
BASE = "F.cross_entropy"
OURS = ("uniform", "non_target_logits")
COMPILED = ("compiled F.cross_entropy", "compiled reference")
FLOOR = "clone"


def plain(logits: Tensor, y: Tensor) -> Tensor:
    """What everybody uses, without a penalty."""
    return F.cross_entropy(logits, y)


def reference(logits: Tensor, y: Tensor) -> Tensor:
    """The same loss as `uniform`, as one writes it in PyTorch."""
    penalty = (logits.softmax(1) - 1 / logits.shape[1]).square().sum(1)
    return F.cross_entropy(logits, y) + TAU * penalty.mean()


def losses(compiled: bool = False) -> dict[str, Loss]:
    """By name, as functions of logits and labels; `compiled` adds those that torch.compile makes."""
    found: dict[str, Loss] = {
        BASE: plain,
        "uniform": lambda logits, y: fused_drsl_loss(logits, y, TAU),
        "non_target_logits": lambda logits, y: fused_drsl_loss(logits, y, TAU, distance="non_target_logits"),
        "reference": reference,
    }
    if compiled:
        torch._dynamo.reset()  # for this shape alone, not for any
        found |= dict(zip(COMPILED, (torch.compile(plain), torch.compile(reference)), strict=True))
    return found


def logits_and_labels(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random, but the same in every run."""
    generator = torch.Generator().manual_seed(rows + classes)
    logits = torch.randn(rows, classes, generator=generator).to(dtype).requires_grad_()
    return logits, torch.randint(classes, (rows,), generator=generator)


def contenders(
    work: Work, rows: int, classes: int, dtype: torch.dtype = torch.float32, *, compiled: bool = False
) -> dict[str, Run]:
    """Each contender as a call without arguments, and `x.clone()` of the logits as the floor."""
    logits, y = logits_and_labels(rows, classes, dtype)
    kinds: dict[Work, Callable[[Loss], Run]] = {
        "forward": lambda loss: lambda: loss(logits, y),
        "forward+backward": lambda loss: lambda: backward(loss, logits, y),
        "no_grad": lambda loss: lambda: _evaluate(loss, logits, y),
    }
    runs = {name: kinds[work](loss) for name, loss in losses(compiled).items()}
    if work == "forward+backward" and dtype == torch.float32:
        ours = losses()["uniform"]
        for name, narrow in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
            half = logits.detach().to(narrow).requires_grad_()
            runs[f"uniform {name}"] = partial(backward, ours, half, y)
    runs[FLOOR] = logits.detach().clone
    return runs


def backward(loss: Loss, logits: Tensor, y: Tensor) -> None:
    """Loss and gradient, as in a training step."""
    logits.grad = None
    loss(logits, y).backward()  # type: ignore[no-untyped-call]


def _evaluate(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return loss(logits, y)
