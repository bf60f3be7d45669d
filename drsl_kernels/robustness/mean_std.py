"""Mean and spread over seeds. The reports rely on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

__all__ = ["MeanStd"]


@dataclass(frozen=True)
class MeanStd:
    """Mean and sample standard deviation (divisor n - 1) over seeds; no deviation from a single seed."""

    mean: float
    std: float | None

    @staticmethod
    def of(values: Sequence[float]) -> MeanStd:
        return MeanStd(mean(values), stdev(values) if len(values) > 1 else None)

    def signed(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        return f"{self.mean:+.2f}{spread}"

    def percent(self) -> str:
        spread = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return f"{100 * self.mean:.1f}{spread}"
