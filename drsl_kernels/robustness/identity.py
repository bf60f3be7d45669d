"""What numbers depend on besides the options: software, machine, and the bytes of images and weights.

A finished result is used again only where all of it is the same. `judging`, `experiment`, `attack_run` and the reports
rely on it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

from torch import Tensor

from drsl_kernels import info

__all__ = ["digest_of_file", "digest_of_tensors", "environment", "plain"]


def environment() -> dict[str, str]:
    """The software and the type of machine, on which numbers depend in their last digits."""
    software = info()
    return {
        "drsl_kernels": software.version,
        "backends": "; ".join(f"{b.name}: {b.detail}" for b in software.backends if b.usable),
        "torch": software.torch,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def digest_of_file(path: Path) -> str:
    """The sha256 of its bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_of_tensors(*tensors: Tensor) -> str:
    """The sha256 of shapes, dtypes and values of tensors on the CPU."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def plain(content: Any) -> Any:
    """As JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(content))
