"""The Triton kernels compiled for GPUs that need not be here: no spills, 16-byte accesses, shared memory that fits.

Relies on triton_compile.py, which does the compiling in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Targets, with the shared memory that a program may use there, in bytes
TARGETS = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "cuda:100": 227 * 1024, "hip:gfx942": 64 * 1024}
USUAL = ("cuda:90", "hip:gfx942")  # without --all-cases: one of each maker


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_ahead_of_time(target: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton")
    if target not in USUAL and not request.config.getoption("--all-cases"):
        pytest.skip("compiled with --all-cases")
    script = Path(__file__).with_name("triton_compile.py")
    options = ["--all"] if request.config.getoption("--all-cases") else []
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, str(script), target, *options], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) > 30
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= TARGETS[target], kernel
        assert kernel["load"] >= kernel["wanted"], kernel
        assert kernel["store"] >= kernel["wanted"] or not kernel["stores"], kernel
