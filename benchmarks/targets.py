"""The speed to reach on the CPU, line by line, and whether a result reaches it. `ratios` relies on it.

A ratio is of the medians of forward + backward of `uniform` over those of the contender that the column names, float32,
two threads, unless the line says something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

AGAINST = ("F.cross_entropy", "compiled reference", "clone")
# Shapes, and the ratio allowed against each of AGAINST; None where nothing is asked
FORWARD_BACKWARD: list[tuple[list[tuple[int, int]], tuple[float | None, float | None, float | None]]] = [
    ([(128, 10), (128, 100)], (0.8, 0.35, None)),
    ([(65536, 10), (16384, 100)], (0.4, 0.5, None)),
    ([(256, 1000)], (0.5, 0.2, None)),
    ([(4096, 1000), (1024, 32000), (256, 128256)], (0.38, 0.35, 1.5)),
]
NO_GRAD = 0.5  # of F.cross_entropy
HALF = 1.0  # bfloat16 and float16, of our own float32
AVX2 = 1.3  # of the ratio with AVX-512
MEMORY = 1.1  # peak above the logits, over one gradient: the rest is a few numbers per row


@dataclass(frozen=True)
class Target:
    """One line: what was asked, what was measured."""

    what: str
    shape: tuple[int, int]
    allowed: float
    measured: float

    @property
    def met(self) -> bool:
        return self.measured <= self.allowed

    def text(self) -> str:
        """The figure to two digits, or to as many as tell it from what was allowed."""
        rounded = f"{self.measured:.2f}"
        return rounded if (float(rounded) <= self.allowed) == self.met else f"{self.measured:.4f}"


def targets(rows: list[dict[str, Any]]) -> Iterator[Target]:
    """Every line that the measured `rows` of ratios.py bear on."""
    found = {(row["work"], row["dtype"], row["rows"], row["classes"], row["isa"]): row for row in rows}
    for (work, dtype, n, classes, isa), row in found.items():
        shape = (n, classes)
        medians = {name: timing["median"] for name, timing in row["seconds"].items()}
        ours = medians["uniform"]
        best = found.get((work, dtype, n, classes, "best"))
        if isa != "best":
            if best is not None and work == "forward+backward":
                ratio = ours / medians["F.cross_entropy"]
                reached = best["seconds"]["uniform"]["median"] / best["seconds"]["F.cross_entropy"]["median"]
                yield Target(f"{isa} over AVX-512, {dtype}", shape, AVX2, ratio / reached)
        elif dtype != "float32":
            continue  # the column of our own bfloat16 stands beside float32, in one run
        elif work == "no_grad":
            yield Target("no_grad over F.cross_entropy", shape, NO_GRAD, ours / medians["F.cross_entropy"])
        elif work == "forward+backward":
            limits = next(limits for shapes, limits in FORWARD_BACKWARD if shape in shapes)
            for name, allowed in zip(AGAINST, limits, strict=True):
                if allowed is not None and name in medians:
                    yield Target(f"over {name}", shape, allowed, ours / medians[name])
            for half in ("bfloat16", "float16"):
                if f"uniform {half}" in medians:
                    yield Target(f"{half} over float32", shape, HALF, medians[f"uniform {half}"] / ours)
            if "memory" in row:
                yield Target("peak memory over one gradient", shape, MEMORY, row["memory"]["uniform"])
