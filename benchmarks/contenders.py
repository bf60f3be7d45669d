"""What the benchmarks compare: shapes, and each contender as a function that does the same work.

Inputs are random normal logits and random labels. Relies on drsl_kernels; `ratios` and `test_loss` rely on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from drsl_kernels import fused_drsl_loss

Run = Callable[[], object]

# (rows, classes). The first three are the ones that the README's speed check is about.
SHAPES = [
    (128, 10),
    (256, 1000),
    (4096, 1000),
    (128, 100),
    (65536, 10),
    (16384, 100),
    (1024, 32000),
    (256, 128256),
]
TAU = 0.5


def logits_and_labels(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + classes)
    logits = torch.randn(rows, classes, generator=generator).to(dtype).requires_grad_()
    return logits, torch.randint(classes, (rows,), generator=generator)


def forward_backward(rows: int, classes: int) -> dict[str, Run]:
    """Loss and gradient of the logits, float32: `F.cross_entropy` (no penalty) against the penalised losses."""
    logits, y = logits_and_labels(rows, classes)
    losses: dict[str, Callable[[], Tensor]] = {
        "F.cross_entropy": lambda: F.cross_entropy(logits, y),
        "uniform": lambda: fused_drsl_loss(logits, y, TAU),
        "non_target_logits": lambda: fused_drsl_loss(logits, y, TAU, distance="non_target_logits"),
        "reference uniform": lambda: fused_drsl_loss(logits, y, TAU, backend="reference"),
    }

    def step(loss: Callable[[], Tensor]) -> Run:
        def run() -> None:
            logits.grad = None
            loss().backward()

        return run

    runs: dict[str, Run] = {name: step(loss) for name, loss in losses.items()}
    runs["clone"] = lambda: logits.detach().clone()
    return runs


def evaluation(rows: int, classes: int) -> dict[str, Run]:
    """The loss alone, under no_grad."""
    logits, y = logits_and_labels(rows, classes)

    def plain() -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(logits, y)

    def ours() -> Tensor:
        with torch.no_grad():
            return fused_drsl_loss(logits, y, TAU)

    return {"F.cross_entropy": plain, "uniform": ours}
