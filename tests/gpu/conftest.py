"""Where the GPU tests run, and on what: `TRITON_INTERPRET=0 pytest -m gpu tests/gpu`, skipped without a CUDA device.

--require-backends   a backend that is not usable fails instead of being skipped
--on-cpu             run the bodies on small CPU tensors, interpreted: proof that the tests themselves work
--one-each           of each test only the first case per backend
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import drsl_kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-backends", action="store_true", help="fail where a GPU backend is not usable")
    parser.addoption("--on-cpu", action="store_true", help="run the GPU tests on CPU tensors, on small inputs")
    parser.addoption("--one-each", action="store_true", help="of each GPU test one case per backend")


def wanted(config: pytest.Config, option: str) -> bool:
    """Whether an option of this folder was given; it is unknown where pytest was started for another folder."""
    return bool(config.getoption(option, default=False))


class NeedsDevice(pytest.File):
    """A test file where there is no device: one skip for all of it."""

    def collect(self) -> Iterable[pytest.Item]:
        pytest.skip("needs a CUDA device")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File | None:
    if torch.cuda.is_available() or wanted(parent.config, "--on-cpu"):
        return None
    return NeedsDevice.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not wanted(config, "--one-each"):
        return
    firsts: dict[tuple[str, object], pytest.Item] = {}
    for item in items:
        assert isinstance(item, pytest.Function)
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        firsts.setdefault((f"{item.path}::{item.originalname}", parameters.get("gpu_backend")), item)
    kept = set(firsts.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CUDA device, or the CPU under --on-cpu."""
    return torch.device("cpu" if wanted(request.config, "--on-cpu") else "cuda")


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Each GPU backend in turn."""
    name: str = request.param
    if name == "triton" and device.type == "cuda" and os.environ["TRITON_INTERPRET"] == "1":
        pytest.fail("interpreted kernels prove nothing about the device: set TRITON_INTERPRET=0")
    status = next(b for b in drsl_kernels.info().backends if b.name == name)
    if not status.usable:
        reason = f"backend {name!r} is not usable: {status.detail}"
        if wanted(request.config, "--require-backends"):
            pytest.fail(reason)
        pytest.skip(reason)
    return name
