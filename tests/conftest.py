"""What all tests share: the backends they run on, seeds, and the hypothesis profile. Pytest reads it first."""

from __future__ import annotations

import os

# Triton decides when it is imported whether it compiles its kernels or interprets them on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import drsl_kernels
from drsl_kernels import backends
from drsl_kernels._build import load_extension
from drsl_kernels.backends import cpp

settings.register_profile(
    "repeatable", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    if find_spec("triton") is not None and os.environ["TRITON_INTERPRET"] == "1":
        import interpreter

        interpreter.speed_up()
    config.addinivalue_line("markers", "every_capability: runs again for each instruction set of the CPU kernels")
    config.addinivalue_line("markers", "backends(*names): the only backends to run on")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-interpreted", action="store_true", help="run every case of Triton's interpreter")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests come first, so that no worker is left with them; large grids are thinned for Triton's interpreter.

    It gets every fifth case. Five has no factor in common with the number of dtypes, distances, truths or reductions,
    so all of them come up.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if config.getoption("--all-interpreted"):
        return
    grids: dict[str, list[pytest.Item]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and "triton" in item.name.partition("[")[2]:
            grids.setdefault(f"{item.path}:{item.originalname}", []).append(item)
    left_out = {item for grid in grids.values() if len(grid) > 20 for i, item in enumerate(grid) if i % 5}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


# Two workers of the suite share the machine; tests of threading ask for more (`two_threads`).
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20230312)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


ALL_BACKENDS = ("cpp", "reference", "triton", "cuda")
ON_HOST = Path(__file__).parents[1] / "build" / "extension" / "libdrsl_on_host.so"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of a `backend` runs on all of them, on those that its marker `backends` names, or as it says itself."""
    chosen = any("backend" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "backend" in metafunc.fixturenames and not chosen:
        marker = metafunc.definition.get_closest_marker("backends")
        metafunc.parametrize("backend", marker.args if marker else ALL_BACKENDS, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """A usable backend. The compiled one is skipped in a pure-Python install only: a broken one fails.

    On CPU tensors all of them: Triton's kernels are interpreted, and those of CUDA run with fibers for threads.
    """
    name: str = request.param
    if name == "cuda":
        request.getfixturevalue("cuda_on_host")
    if name == "cpp" and not load_extension().loaded and load_extension().torch_built is None:
        pytest.skip(next(b.detail for b in drsl_kernels.info().backends if b.name == name))
    if name == "triton" and find_spec("triton") is None:
        pytest.skip("the Python package triton is not installed")
    return name


@pytest.fixture
def cuda_on_host(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Let backend="cuda" take CPU tensors, through the build of its sources for the CPU; returns the backend."""
    if not ON_HOST.is_file():
        pytest.skip(f"{ON_HOST} is not there: `make cpp-test` builds it")
    torch.ops.load_library(ON_HOST)
    usable, load, devices = backends._usable, backends._load, backends._devices
    on_host = partial(cpp.softmax_loss, operator=torch.ops.drsl_kernels_on_host.softmax_loss.default)
    monkeypatch.setattr(backends, "_usable", lambda name: name == "cuda" or usable(name))
    monkeypatch.setattr(backends, "_load", lambda name: on_host if name == "cuda" else load(name))
    monkeypatch.setattr(backends, "_devices", lambda name: ("cpu",) if name == "cuda" else devices(name))
    return on_host
