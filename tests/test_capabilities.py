"""Every instruction set of the CPU kernels that this machine has: the tests marked `every_capability` run again, in
a process that is told to use it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import drsl_kernels
from drsl_kernels._build import load_extension

TESTS = Path(__file__).parent


def python(*arguments: str, capability: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with the kernels of one instruction set."""
    environment = os.environ | {"DRSL_KERNELS_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False
    )


@cache
def said_with(capability: str) -> subprocess.CompletedProcess[str]:
    """What info() says of the compiled backend when an instruction set is asked for."""
    return python("-c", "import drsl_kernels; print(drsl_kernels.info().backends[0].detail)", capability=capability)


def used_by_default() -> str:
    return re.match(r"CPU, (\w+)", drsl_kernels.info().backends[0].detail)[1]


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def capability(request: pytest.FixtureRequest) -> str:
    if request.param not in load_extension().instruction_sets:
        pytest.skip(f"{request.param} kernels are not built here")
    if "is not available here" in said_with(request.param).stderr:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def test_info_names_the_instruction_set(capability: str) -> None:
    said = said_with(capability)
    assert said.stdout.startswith(f"CPU, {capability} "), said.stdout + said.stderr


def test_an_unknown_instruction_set_is_named_and_passed_over() -> None:
    if not load_extension().loaded:
        pytest.skip("no compiled backend here")
    said = said_with("avx1024")
    assert "DRSL_KERNELS_CPU_CAPABILITY=avx1024 is not available here" in said.stderr
    assert said.stdout.startswith(f"CPU, {used_by_default()} ")


def test_the_marked_tests_pass(capability: str) -> None:
    if capability == used_by_default():
        pytest.skip("this process runs them already")
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "-x", "--tb=short"]
    files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.every_capability" in path.read_text()]
    result = python("-m", "pytest", *files, "-m", "every_capability", "-k", "cpp", *options, capability=capability)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 500
