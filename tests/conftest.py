"""What all tests share: the backends they run on, seeds, and the hypothesis profile. Pytest reads it first."""

from __future__ import annotations

import hashlib
import os
import re

# Triton decides when it is imported whether it compiles its kernels or interprets them on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import drsl_kernels
from drsl_kernels import backends
from drsl_kernels._build import load_extension
from drsl_kernels.backends import cpp

if find_spec("hypothesis") is not None:  # the tests that need a GPU do without
    from hypothesis import HealthCheck, settings

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
    parser.addoption("--all-cases", action="store_true", help="run every case of the large grids on every backend")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests come first, so that no worker is left with them; large grids are thinned."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if config.getoption("--all-cases"):
        return
    grids: dict[tuple[str, str], list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            backend = item.callspec.params.get("backend")
            if backend in ONE_OF:
                grids.setdefault((backend, f"{item.path}:{item.originalname}"), []).append(item)
    left_out: set[pytest.Item] = set()
    for (backend, _), grid in grids.items():
        left_out |= set(grid) - thinned(grid, ONE_OF[backend])
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    config.stash[LEFT_OUT] = len(left_out)


LEFT_OUT = pytest.StashKey[int]()
SMALL_GRID = 20  # cases; of larger ones a backend gets one in so many, in which every value of every parameter comes up
ONE_OF = {"triton": 60, "cuda": 16, "reference": 16, "cpp": 2}


def thinned(grid: list[pytest.Function], one_of: int) -> set[pytest.Item]:
    if len(grid) <= SMALL_GRID:
        return set(grid)
    shuffled = sorted(grid, key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())
    kept: set[pytest.Item] = set()
    seen: set[tuple[str, str]] = set()
    for item in shuffled:
        values = {(name, repr(value)) for name, value in item.callspec.params.items()}
        if not values <= seen or one_of * len(kept) < len(grid):
            kept.add(item)
            seen |= values
    return kept


# What the last lines of a run count: proof that needs no GPU
PROOFS = {
    "Triton kernels interpreted": re.compile(r"\[(.*-)?triton[-\]]|test_triton\.py|test_twins\.py"),
    "Triton kernels compiled for a GPU": re.compile(r"test_triton_compile\.py"),
    "CUDA kernels run on the CPU": re.compile(r"\[(.*-)?cuda[-\]]|test_cuda\.py|test_twins\.py"),
    "CUDA kernels compiled for GPUs": re.compile(r"test_cuda_compile\.py"),
    "the GPU suite rehearsed": re.compile(r"test_gpu_suite\.py"),
}
_left_out_by_workers: list[int] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of pytest-xdist is done: all of them leave out the same cases."""
    _left_out_by_workers.append(getattr(node, "workeroutput", {}).get("left_out", 0))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", ())]
    counts = {what: sum(bool(pattern.search(node)) for node in passed) for what, pattern in PROOFS.items()}
    if any(counts.values()):
        terminalreporter.section("passed without a GPU")
        for what, count in counts.items():
            terminalreporter.write_line(f"{count:6} {what}")
    for against in ("F.cross_entropy", "the reference"):
        run, good = (
            sum(
                dict(report.user_properties).get(f"samples against {against}", 0)
                for outcome in outcomes
                for report in terminalreporter.stats.get(outcome, ())
            )
            for outcomes in (("passed", "failed"), ("passed",))
        )
        if run:
            terminalreporter.write_line(f"{good:6} of {run} of PyTorch's own samples, against {against}")
    left_out = max([config.stash.get(LEFT_OUT, 0), *_left_out_by_workers])
    if left_out:
        terminalreporter.write_line(f"{left_out:6} further cases of large grids left out: --all-cases runs them")


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


def on_host_function(logits: Any, y: Any, weight: Any, margins: Any, tau: Any, codes: Any, return_stats: bool) -> Any:
    """What `drsl_kernels._C.softmax_loss` is for the extension, over the operator of that library."""
    tau, tau_value = (tau, 0.0) if isinstance(tau, torch.Tensor) else (None, tau)
    operator = torch.ops.drsl_kernels_on_host.softmax_loss.default
    loss, stats = operator(logits, y, weight, margins, tau, tau_value, *codes, return_stats)
    return (loss, stats) if return_stats else loss


@pytest.fixture
def cuda_on_host(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Let backend="cuda" take CPU tensors, through the build of its sources for the CPU; returns the backend."""
    if not ON_HOST.is_file():
        pytest.skip(f"{ON_HOST} is not there: `make cpp-test` builds it")
    torch.ops.load_library(ON_HOST)
    usable, load, devices = backends._usable, backends._load, backends._devices
    load_pieces, pieces = backends._load_pieces, cpp.pieces(torch.ops.drsl_kernels_on_host)
    on_host = cpp.backend(on_host_function)
    monkeypatch.setattr(backends, "_usable", lambda name: name == "cuda" or usable(name))
    monkeypatch.setattr(backends, "_load", lambda name: on_host if name == "cuda" else load(name))
    monkeypatch.setattr(backends, "_load_pieces", lambda name: pieces if name == "cuda" else load_pieces(name))
    monkeypatch.setattr(backends, "_devices", lambda name: ("cpu",) if name == "cuda" else devices(name))
    return on_host


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny tensors: threads that wait for one another make busy machines very slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def split() -> Any:
    """A few digits: 70 to train with, and as many held out."""
    from drsl_kernels.robustness.data import digits  # the tests that need a GPU do without what it imports

    return digits().first(70)
