"""What a CPU result must say about where it comes from, the peak of memory, and files that are whole or not there.

Relies on Linux's /proc; the benchmarks of this folder rely on it.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import drsl_kernels


def where() -> dict[str, Any]:
    """Machine, versions, commit and date."""
    root = Path(__file__).parent
    commit = _git(root, "describe", "--always", "--exclude=*")
    # Results that an earlier benchmark has just written change nothing that is measured.
    changed = _git(root, "status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": f"{commit}-dirty" if changed else commit or None,
        "processor": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "drsl_kernels": str(drsl_kernels.info()),
    }


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()


def write(path: Path, content: dict[str, Any]) -> None:
    """Through a temporary file beside it, so that a broken-off run never leaves half a result."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process grows, at most, while it runs."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
