"""Every instruction set of the CPU kernels that this machine has: the tests marked `every_capability` run again, in
a process that is told to use it.
"""

from __future__ import annotations

import json
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
CAPABILITIES = ("baseline", "avx2", "avx512")
UNKNOWN = "avx1024"


def python(*arguments: str, capability: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with the kernels of one instruction set."""
    environment = os.environ | {"DRSL_KERNELS_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False
    )


# A process chooses the instruction set once, when it first needs it: each gets a child, for which all is imported.
SAID = """
import json, os, sys, tempfile
import drsl_kernels
said = {}
for capability in sys.argv[1:]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.environ["DRSL_KERNELS_CPU_CAPABILITY"] = capability
            print(drsl_kernels.info().backends[0].detail, flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, capability
        said[capability] = [file.seek(0) or file.read() for file in (out, err)]
print(json.dumps(said))
"""


@cache
def all_said() -> dict[str, list[str]]:
    """By instruction set that is asked for: what info() says of the compiled backend, and the warnings."""
    done = python("-c", SAID, *CAPABILITIES, UNKNOWN, capability="")
    assert done.returncode == 0, done.stderr
    said: dict[str, list[str]] = json.loads(done.stdout)
    return said


def used_by_default() -> str:
    return re.match(r"CPU, (\w+)", drsl_kernels.info().backends[0].detail)[1]


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> str:
    if request.param not in load_extension().instruction_sets:
        pytest.skip(f"{request.param} kernels are not built here")
    if "is not available here" in all_said()[request.param][1]:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def test_info_names_the_instruction_set(capability: str) -> None:
    detail, warnings = all_said()[capability]
    assert detail.startswith(f"CPU, {capability} "), detail + warnings


def test_an_unknown_instruction_set_is_named_and_passed_over() -> None:
    if not load_extension().loaded:
        pytest.skip("no compiled backend here")
    detail, warnings = all_said()[UNKNOWN]
    assert f"DRSL_KERNELS_CPU_CAPABILITY={UNKNOWN} is not available here" in warnings
    assert detail.startswith(f"CPU, {used_by_default()} ")


def test_the_marked_tests_pass(capability: str) -> None:
    if capability == used_by_default():
        pytest.skip("this process runs them already")
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "-x", "--tb=short"]
    files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.every_capability" in path.read_text()]
    result = python("-m", "pytest", *files, "-m", "every_capability", "-k", "cpp", *options, capability=capability)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 500
