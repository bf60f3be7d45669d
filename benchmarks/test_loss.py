"""pytest-benchmark suite, one group per kind of work and shape: `make bench`, or `pytest benchmarks/test_loss.py`.

pytest-benchmark runs one contender after the other. For ratios that hold on a busy machine use ratios.py.
"""

from __future__ import annotations

import pytest
from contenders import BASE, DTYPES, FLOOR, OURS, SHAPES, WORKS, Work, contenders
from pytest_benchmark.fixture import BenchmarkFixture

SIZES = [pytest.param(rows, classes, id=f"{rows}x{classes}") for rows, classes in SHAPES[:6]]


@pytest.mark.parametrize("name", [BASE, *OURS, "reference", FLOOR])
@pytest.mark.parametrize(("rows", "classes"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("work", WORKS)
def test_loss(benchmark: BenchmarkFixture, work: Work, dtype: str, rows: int, classes: int, name: str) -> None:
    benchmark.group = f"{work} {rows}x{classes} {dtype}"
    benchmark(contenders(work, rows, classes, DTYPES[dtype])[name])
