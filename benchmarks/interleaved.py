"""Fair timing of several functions in one process: rounds in which every contender runs once, then medians.

Interleaving puts drifts of the machine (frequency, neighbours, temperature) on all contenders alike, so ratios of
medians hold where absolute times do not. Relies on nothing; the benchmarks of this folder rely on it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds of one contender."""

    median: float
    low: float  # first decile
    high: float  # last decile
    over_first: float  # median over the rounds of the ratio to the first contender's sample of the round


def interleave(
    contenders: dict[str, Callable[[], object]], *, seconds: float, least_rounds: int = 15
) -> dict[str, Timing]:
    """Time each contender once per round, until `seconds` have passed.

    Each round has an order of its own: what a contender leaves in the caches and in the allocator, it leaves to all.
    A sample is the mean of as many calls as fill about half a millisecond, so that the clock's step and the
    loop's own cost do not count.
    """
    calls = {name: _calls_per_sample(run) for name, run in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    random = Random(0)
    end = time.perf_counter() + seconds
    round_number = 0
    gc.collect()
    gc.disable()
    try:
        while round_number < least_rounds or time.perf_counter() < end:
            random.shuffle(names)
            for name in names:
                samples[name].append(_sample(contenders[name], calls[name]))
            round_number += 1
    finally:
        gc.enable()
    first = next(iter(samples.values()))
    return {name: _summary(values, first) for name, values in samples.items()}


def _sample(run: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def _calls_per_sample(run: Callable[[], object]) -> int:
    run()
    run()
    return max(1, int(5e-4 / max(_sample(run, 3), 1e-7)))


def _summary(values: list[float], first: list[float]) -> Timing:
    deciles = statistics.quantiles(values, n=10)
    ratios = [value / base for value, base in zip(values, first, strict=True)]
    return Timing(statistics.median(values), deciles[0], deciles[-1], statistics.median(ratios))
