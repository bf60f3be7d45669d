"""Where and with what the suite runs, as a line of JSON: `python -m gpu.machine`, with benchmarks/ on the path.

Relies on torch and drsl_kernels; `gpu_suite` runs it and keeps what it prints beside every figure.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import drsl_kernels

from .tools import ROOT, find_tool, output_of

PACKAGES = ("torch", "triton", "numpy", "liger-kernel", "quack-kernels", "cut-cross-entropy")


def main() -> None:
    """Print the facts."""
    print(json.dumps({"machine": machine(), "versions": versions(), "backends": backends()}))


def machine() -> dict[str, Any]:
    """The GPU, its driver and the host."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    host = {
        "processor": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }
    if not torch.cuda.is_available():
        return {"gpu": None, **host}
    gpu = torch.cuda.get_device_properties(0)
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": gpu.name,
        "count": torch.cuda.device_count(),
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "l2_bytes": gpu.L2_cache_size,
        "memory_bytes": gpu.total_memory,
        "driver": driver.splitlines()[0] if driver else None,
        **host,
    }


def versions() -> dict[str, Any]:
    """Of Python, the packages, the compiler and this project."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cuda_of_torch": torch.version.cuda,
        "nvcc": nvcc_version(),
        "drsl_kernels": drsl_kernels.info().version,
        "commit": output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty") or None,
        "sources": sources_hash(),
    }


def backends() -> list[dict[str, Any]]:
    return [{"name": b.name, "usable": b.usable, "detail": b.detail} for b in drsl_kernels.info().backends]


def nvcc_version() -> str | None:
    release = re.search(r"release [\d.]+, V([\d.]+)", output_of(str(find_tool("nvcc") or "nvcc"), "--version"))
    return release[1] if release else None


def sources_hash() -> str:
    """Names the code that ran, where there is no git to do it: of all files of csrc/ and drsl_kernels/."""
    digest = hashlib.sha256()
    files = [p for folder in ("csrc", "drsl_kernels") for p in (ROOT / folder).rglob("*") if p.suffix in SOURCES]
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
