"""The CPU benchmarks run, on a few small shapes, and say what they promise. No test depends on a time.

On one thread where they have the option: on a busy machine two that wait for each other take three times as long.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from code_blocks import ROOT

BENCHMARKS = ROOT / "benchmarks"


def run(script: str, tmp_path: Path, *options: str) -> tuple[dict[str, Any], str]:
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / script), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("*.part"))
    result: dict[str, Any] = json.loads(out.read_text())
    assert {"commit", "date", "processor", "torch"} <= result.keys()
    return result, done.stdout


def test_ratios(tmp_path: Path) -> None:
    result, printed = run(
        "ratios.py", tmp_path, "--shapes", "2", "--seconds", "0.001", "--threads", "1", "--no-compiled"
    )
    works = [(r["rows"], r["classes"], r["dtype"], r["work"], r["isa"]) for r in result["rows"]]
    assert len(set(works)) == len(works) == 2 * 2 * 3 + 2
    assert "Targets" in printed
    assert "met" in printed


def test_scaling(tmp_path: Path) -> None:
    result, _ = run("scaling.py", tmp_path, "--points", "2", "--seconds", "0.001", "--no-compiled")
    assert {r["sweep"] for r in result["rows"]} == {"rows", "classes", "every"}
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from pictures import draw
    finally:
        sys.path.remove(str(BENCHMARKS))
    draw(result, tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_loop(tmp_path: Path) -> None:
    result, printed = run("loop.py", tmp_path, "--rounds", "1", "--seconds", "0.1", "--threads", "1")
    assert len(result["ratios"]) == 5
    assert printed.count("of F.cross_entropy") == 5


def test_scaled_logits(tmp_path: Path) -> None:
    result, printed = run("scaled_logits.py", tmp_path, "--epochs", "1", "--steps", "1")
    assert [len(values) for values in result["robust_accuracy"].values()] == [len(result["factors"])] * 3
    assert printed.count("\n") == 3


def test_a_target_is_met_or_not() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from targets import targets
    finally:
        sys.path.remove(str(BENCHMARKS))

    def row(work: str, ours: float, dtype: str = "float32", isa: str = "best") -> dict[str, Any]:
        seconds = {"uniform": ours, "F.cross_entropy": 1.0, "compiled reference": 2.0, "clone": 0.5}
        seconds |= {"uniform bfloat16": 0.4}
        timings = {name: {"median": median} for name, median in seconds.items()}
        return {"work": work, "dtype": dtype, "isa": isa, "rows": 4096, "classes": 1000, "seconds": timings}

    rows = [row("forward+backward", 0.38), row("no_grad", 0.6), row("forward", 9.0)]
    rows += [row("forward+backward", 0.9, dtype="bfloat16"), row("forward+backward", 0.5, isa="avx2")]
    found = {t.what: (t.measured, t.met) for t in targets(rows)}
    assert found["over F.cross_entropy"] == (0.38, True)
    assert found["over compiled reference"] == (0.19, True)
    assert found["over clone"] == (0.76, True)
    assert found["no_grad over F.cross_entropy"] == (0.6, False)
    assert found["bfloat16 over float32"] == (pytest.approx(0.4 / 0.38), False)
    assert found["avx2 over AVX-512, float32"] == (pytest.approx(0.5 / 0.38), False)
    assert len(found) == 6
