"""pytest-benchmark suite: `make bench`, or `pytest benchmarks/test_loss.py`. One group per shape.

pytest-benchmark runs one contender after the other. For ratios that hold on a busy machine use ratios.py.
"""

from __future__ import annotations

import pytest
from contenders import SHAPES, evaluation, forward_backward
from pytest_benchmark.fixture import BenchmarkFixture

SIZES = [pytest.param(rows, classes, id=f"{rows}x{classes}") for rows, classes in SHAPES[:6]]


@pytest.mark.parametrize("name", ["F.cross_entropy", "uniform", "non_target_logits", "reference uniform", "clone"])
@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_forward_backward(benchmark: BenchmarkFixture, rows: int, classes: int, name: str) -> None:
    benchmark.group = f"forward+backward {rows}x{classes}"
    benchmark(forward_backward(rows, classes)[name])


@pytest.mark.parametrize("name", ["F.cross_entropy", "uniform"])
@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_evaluation(benchmark: BenchmarkFixture, rows: int, classes: int, name: str) -> None:
    benchmark.group = f"no_grad {rows}x{classes}"
    benchmark(evaluation(rows, classes)[name])
