"""What all tests share: the backends they run on, seeds, and the hypothesis profile. Pytest reads it first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import drsl_kernels
from drsl_kernels._build import load_extension

settings.register_profile(
    "repeatable", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_capability: runs again for each instruction set of the CPU kernels")


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


@pytest.fixture(params=["cpp", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn. The compiled one is skipped in a pure-Python install only: a broken one fails."""
    name: str = request.param
    if name == "cpp" and not load_extension().loaded and load_extension().torch_built is None:
        pytest.skip(next(b.detail for b in drsl_kernels.info().backends if b.name == name))
    return name
