"""The bounds of benchmarks/bottleneck.py hold, and the committed result keeps to them. No test depends on a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from code_blocks import ROOT
from test_benchmarks import run
from torch import Tensor

RESULT: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "bottleneck.json").read_text())


@pytest.fixture(scope="module")
def bottleneck() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import bottleneck
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return bottleneck


def kl(p: Tensor, log_q: Tensor) -> Tensor:
    """Summed over the classes: p (C,), log_q (..., C)."""
    return (p * (p.log() - log_q)).sum(-1)


def test_the_least_gap_in_closed_form(bottleneck: ModuleType) -> None:
    """Where w = (-1, 0, 1) is the best, the search finds the same."""
    lifted = bottleneck.targets()["lifted"]
    want = bottleneck.symmetric_gap(lifted)
    assert want > 1e-3
    assert bottleneck.least_gap(lifted) == pytest.approx(want, abs=bottleneck.TOLERANCE)
    assert bottleneck.least_gap(lifted, mixture=True) == pytest.approx(want, abs=bottleneck.TOLERANCE)


@pytest.mark.parametrize("name", ["lifted", "hollow"])
def test_no_softmax_is_below_the_least_gap(name: str, bottleneck: ModuleType) -> None:
    """Of a grid over directions of w and over h, by the definition."""
    p = bottleneck.targets()[name]
    w = bottleneck.weights(torch.linspace(0.0, torch.pi, 301, dtype=torch.float64))
    h = torch.linspace(-8.0, 8.0, 801, dtype=torch.float64)
    log_q = (w.unsqueeze(1) * h.unsqueeze(1)).log_softmax(-1)
    gaps = torch.stack([kl(row, log_q).amin(1) for row in p]).mean(0)
    least = bottleneck.least_gap(p)
    assert least - 1e-8 <= gaps.min() <= least + 1e-3


def test_no_mixture_is_below_its_bound(bottleneck: ModuleType) -> None:
    """Of random weights, hidden states and priors: three components for each context."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    p = bottleneck.targets()["lifted"]
    w, h, priors = 2.0 * normal(20000, 1, 1, 3), 2.0 * normal(20000, 2, 3, 1), normal(20000, 2, 3, 1).softmax(2)
    log_q = (priors * (h * w).softmax(-1)).sum(2).log()
    gaps = (kl(p[0], log_q[:, 0]) + kl(p[1], log_q[:, 1])) / 2.0
    least = bottleneck.least_gap(p, mixture=True)
    assert least <= gaps.min() <= 50.0 * least  # and some come near


@pytest.mark.parametrize("mixture", [False, True], ids=["softmax", "mixture"])
@pytest.mark.parametrize("name", ["lifted", "hollow"])
def test_bounds_of_intervals(name: str, mixture: bool, bottleneck: ModuleType) -> None:
    """Are not above any value in between."""
    edges = torch.linspace(0.0, torch.pi, 25, dtype=torch.float64)
    inside = edges[:-1] + torch.linspace(0.01, 0.99, 40, dtype=torch.float64).unsqueeze(1) * (edges[1] - edges[0])
    for row in bottleneck.targets()[name]:
        values = bottleneck.row_gap(row, inside.flatten())
        if mixture:
            values = values * bottleneck.violates(row, inside.flatten())
        bounds = bottleneck.bound(row, edges[:-1], edges[1:], mixture)
        assert (bounds <= values.reshape(inside.shape).amin(0) + 1e-12).all()
        assert (bounds > 0.0).sum() >= (8 if mixture else 20)


def test_what_was_reached_keeps_to_the_bounds() -> None:
    rows = {row["target"]: row for row in RESULT["rows"]}
    for row in rows.values():
        for model, least in row["known"].items():
            assert row["reached"][model] >= least - RESULT["tolerance"] - 1e-12
    lifted, hollow = rows["lifted"]["reached"], rows["hollow"]["reached"]
    assert lifted["sigsoftmax"] < 1e-6 < 1e-3 < lifted["softmax"]
    assert hollow["mixture of 2 softmaxes"] < 1e-6 < 1e-2 < hollow["softmax"]
    assert RESULT["random"]["models"]["softmax"]["rank"] == RESULT["random"]["width"] + 1
    assert RESULT["random"]["models"]["sigsoftmax"]["rank"] > RESULT["random"]["width"] + 1


def test_the_script(tmp_path: Path) -> None:
    result, printed = run("bottleneck.py", tmp_path, "--restarts", "1", "--steps", "2")
    assert result.keys() == RESULT.keys()
    assert [row["known"] for row in result["rows"]] == [
        {model: pytest.approx(least, abs=1e-9) for model, least in row["known"].items()} for row in RESULT["rows"]
    ]
    assert "hollow" in printed
