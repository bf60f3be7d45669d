"""Loading the compiled extension `drsl_kernels._C`, or telling why it is not loaded.

The build writes `_build_info.json` beside the extension (CMakeLists.txt; setup.py for a pure-Python install).
It is read before the library is opened, because opening one that was built against another torch can crash
the process. Relies on torch only; `backends` relies on it.
"""

from __future__ import annotations

import importlib
import json
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

PACKAGE_DIR = Path(__file__).parent
REMEDY = (
    "To build it for this environment, run in the source folder: "
    "pip install --no-build-isolation --force-reinstall --no-deps ."
)


@dataclass(frozen=True)
class BuildStatus:
    """Whether the extension is loaded, why not, and how it was built.

    `reason` is empty when `loaded` is true. When no extension was built, `torch_built` and `compiler` are
    None and `instruction_sets` is empty. Without CUDA kernels `cuda_architectures` is empty, and
    `no_cuda_reason` says why.
    """

    loaded: bool
    reason: str
    torch_built: str | None
    torch_running: str
    compiler: str | None
    instruction_sets: tuple[str, ...]
    cuda_architectures: tuple[str, ...]
    no_cuda_reason: str


@cache
def load_extension() -> BuildStatus:
    """Load `drsl_kernels._C`, which registers the operators with torch. Later calls return the same."""
    info = read_build_info(PACKAGE_DIR)
    reason = obstacle(info, PACKAGE_DIR, str(torch.__version__)) or _open(info)
    return BuildStatus(
        loaded=not reason,
        reason=reason,
        torch_built=info.get("torch"),
        torch_running=str(torch.__version__),
        compiler=info.get("compiler"),
        instruction_sets=tuple(info.get("instruction_sets", ())),
        cuda_architectures=tuple(info.get("cuda_architectures", ())),
        no_cuda_reason=info.get("no_cuda_reason", ""),
    )


def read_build_info(folder: Path) -> dict[str, Any]:
    """What the build left in the package folder: `extension` (file name or None), `reason`, facts."""
    path = folder / "_build_info.json"
    if not path.is_file():
        return {"extension": None, "reason": "this copy of drsl_kernels was never built"}
    info: dict[str, Any] = json.loads(path.read_text())
    return info


def obstacle(info: dict[str, Any], folder: Path, torch_running: str) -> str:
    """Why this Python and this torch must not open the extension that `info` describes; empty if they may."""
    name = info["extension"]
    if name is None:
        return f"the C++ extension is not there: {info['reason']}. {REMEDY}"
    if not name.endswith(sysconfig.get_config_var("EXT_SUFFIX")):
        python = sysconfig.get_python_version()
        return f"the C++ extension was built for another Python ({name}), not for Python {python}. {REMEDY}"
    if not (folder / name).is_file():
        return f"the C++ extension is not there: {folder / name} was removed. {REMEDY}"
    if not _same_interface(info["torch"], torch_running):
        versions = f"against torch {info['torch']}, and torch {torch_running} is running"
        return f"the C++ extension was built {versions}. {REMEDY}"
    return ""


def _same_interface(built: str, running: str) -> bool:
    """Whether a library built against torch `built` may be opened beside torch `running`.

    torch promises no stable C++ interface between releases, patch releases included, so these must agree.
    The builds of one release (2.13.0+cpu, 2.13.0+cu130) have the same sources, and the extension calls only
    what all of them contain: opening it is tried, and fails cleanly if a symbol is missing. A development
    version tells only with its local part which sources it has, so there everything must agree.
    """
    release = built.partition("+")[0]
    is_final = release.replace(".", "").isdigit()
    return built == running or (is_final and release == running.partition("+")[0])


def _open(info: dict[str, Any]) -> str:
    try:
        importlib.import_module("drsl_kernels._C")
    except ImportError as error:
        return (
            f"the C++ extension, built against torch {info['torch']}, cannot be opened beside torch "
            f"{torch.__version__}: {error}. {REMEDY}"
        )
    return ""
