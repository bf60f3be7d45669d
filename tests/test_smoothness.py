"""The price of a class does not jump between neighbouring numbers of classes: instructions of the CPU kernels, counted.

Relies on cpp/count_instructions.cpp, which `make cpp-test` builds. A count is the same on every run; a time is not.
"""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest

COUNTER = Path(__file__).parents[1] / "build" / "extension" / "tests" / "cpp" / "count_instructions"
ROWS = {"avx512": 16, "avx2": 8}  # one block
# Where a vector is full, a kernel takes over from the other, or a chunk ends. Stepping is slow: benchmarks/scaling.py
# counts all numbers of classes from 2 to 300.
NEIGHBOURS = (8, 9, 16, 17, 48, 49, 95, 96, 128, 129, 160, 161, 320, 321)
AROUND_POWERS = (511, 512, 513, 1023, 1024, 1025, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COUNTER.is_file(), reason=f"{COUNTER} is not there: `make cpp-test` builds it"),
]


@cache
def instructions(isa: str, rows: int, classes: tuple[int, ...]) -> dict[int, float]:
    """Per row, by the number of classes."""
    command = [str(COUNTER), isa, str(rows), *map(str, classes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stderr
    return {int(c): int(count) / rows for c, count in (line.split() for line in done.stdout.splitlines())}


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_neighbours(isa: str) -> None:
    """One class more costs at most a vector more for every row, and the turn of a sweep."""
    count = instructions(isa, ROWS[isa], NEIGHBOURS)
    assert tuple(count) == NEIGHBOURS
    for c in NEIGHBOURS:
        if c - 1 in count:
            assert 0.8 * count[c - 1] <= count[c] <= 1.2 * count[c - 1] + 25, c


def test_around_powers_of_two() -> None:
    count = instructions("avx512", 1, AROUND_POWERS)
    for c in AROUND_POWERS:
        if c - 1 in count:
            assert abs(count[c] - count[c - 1]) <= 0.05 * count[c - 1] + 200, c


def test_linear() -> None:
    """Twice the classes cost at most twice as much; in the long run a class costs the same."""
    count = instructions("avx512", 1, (256, 512, 1024, 2048, 4096, 8192, 16384))
    for c in (256, 512, 1024, 2048, 4096, 8192):
        assert count[2 * c] <= 2.05 * count[c], c
    assert count[16384] / 16384 == pytest.approx(count[8192] / 8192, rel=0.05)
