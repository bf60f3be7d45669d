"""The build: CMake with Ninja (CMakeLists.txt) for the C++ extension, or a pure-Python install.

All else stands in pyproject.toml. The environment variable DRSL_KERNELS_BUILD decides:

    unset   build the extension; where a tool for it is missing, install pure Python and say what was missing
    0       pure Python
    1       build the extension; a missing tool is an error

A compiler that is there and fails is always an error, never a silent pure-Python install.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import ClassVar, NoReturn

from setuptools import Command, Distribution, __version__, setup
from setuptools.command.build import build

ROOT = Path(__file__).parent.resolve()
PACKAGE = "drsl_kernels"
WAY_OUT = "Set DRSL_KERNELS_BUILD=0 to install without the extension (pure Python, slower)."


@cache
def pure_python_reason() -> str:
    """Why this install has no extension, in words for the user; empty if it is to be built."""
    wish = os.environ.get("DRSL_KERNELS_BUILD", "")
    if wish not in ("", "0", "1"):
        fail(f"DRSL_KERNELS_BUILD must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return "it was installed with DRSL_KERNELS_BUILD=0"
    missing = ", ".join(missing_tools())
    if missing and wish == "1":
        fail(f"DRSL_KERNELS_BUILD=1, but the extension cannot be built here: missing {missing}.")
    return missing and f"missing when it was installed: {missing}"


def missing_tools() -> list[str]:
    """What the extension needs and this machine or environment lacks, in words for the user."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    present = {
        "a C++ compiler (g++, or the one that CXX names)": bool(compiler()),
        "cmake": bool(program("cmake")),
        "ninja": bool(program("ninja")),
        f"Python's C headers ({header})": header.is_file(),
        "the Python package pybind11": importlib.util.find_spec("pybind11") is not None,
        "the Python package torch": importlib.util.find_spec("torch") is not None,
    }
    return [name for name, there in present.items() if not there]


def requirements() -> list[str]:
    """The supported torch; with the extension, the release that it is built against, CPU or CUDA."""
    supported = "torch>=2.11"
    if pure_python_reason():
        return [supported]
    release = importlib.metadata.version("torch").partition("+")[0]
    return [supported, f"torch=={release}"]


def compiler() -> str:
    """The C++ compiler. What CXX names is not checked here: a wrong name must fail, not be ignored."""
    return os.environ.get("CXX") or program("g++") or program("c++") or program("clang++")


def program(name: str) -> str:
    """Path of a program, beside this Python (where pip puts cmake and ninja) or on PATH; empty if none."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name) or ""


def fail(message: str) -> NoReturn:
    raise SystemExit(f"\nerror: drsl_kernels: {message}\n")


class KernelsDistribution(Distribution):
    """A distribution whose wheel is tagged for this platform when it carries the extension."""

    def has_ext_modules(self) -> bool:
        return not pure_python_reason()


class Build(build):
    """The standard build, then the extension; from an empty folder, so that no removed module is packed."""

    sub_commands: ClassVar = [*build.sub_commands, ("build_kernels", None)]

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, PACKAGE), ignore_errors=True)
        super().run()


class BuildKernels(Command):
    """Builds the extension into the package, or writes the note that says why there is none."""

    description = "build the C++ extension with CMake and Ninja"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        self.editable_mode = False  # setuptools sets it for `pip install -e`
        self.build_lib = ""

    def finalize_options(self) -> None:
        self.build_lib = self.get_finalized_command("build").build_lib

    def run(self) -> None:
        package = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib, PACKAGE).resolve()
        reason = pure_python_reason()
        if reason:
            write_note(package, reason)
        else:
            cmake_build(package)

    # What setuptools asks of a sub-command of build. No outputs to list: run() puts them in their place.

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in names them


def write_note(package: Path, reason: str) -> None:
    """Say why there is no extension: now, and in the file that drsl_kernels/_build.py reads."""
    print(f"\nwarning: drsl_kernels is installed without its C++ extension: {reason}.\n", file=sys.stderr)
    package.mkdir(parents=True, exist_ok=True)
    note = json.dumps({"extension": None, "reason": reason}, indent=2)
    Path(package, "_build_info.json").write_text(note + "\n")


def cmake_build(package: Path) -> None:
    """Configure, build and install the extension into `package`. Rebuilds reuse the build folder."""
    folder = ROOT / "build" / "extension"
    cmake, ninja = program("cmake"), program("ninja")

    # CMake keeps the compiler, the Python and the paths that it saw first: with others, start afresh.
    torch = importlib.util.find_spec("torch")
    settings = "\n".join([sys.executable, cmake, ninja, compiler(), str(torch and torch.origin)])
    stamp = folder / "settings.txt"
    if not stamp.is_file() or stamp.read_text() != settings:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stamp.write_text(settings)

    options = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
    if "CXX" not in os.environ:  # CMake reads CXX itself, with words such as `ccache g++`
        options.append(f"-DCMAKE_CXX_COMPILER={compiler()}")
    call(cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *options)
    call(cmake, "--build", folder, "--target", "_C")
    call(cmake, "--install", folder, "--prefix", package)


def call(*command: str | Path) -> None:
    print("+", *command, flush=True)
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        fail(f"building the C++ extension failed: exit status {status} of the command above. {WAY_OUT}")


if int(__version__.split(".")[0]) < 77:  # older ones stumble over pyproject.toml without saying why
    fail(f"setuptools 77 or later is needed, found {__version__}: pip install --upgrade setuptools")

setup(
    install_requires=requirements(),
    distclass=KernelsDistribution,
    cmdclass={"build": Build, "build_kernels": BuildKernels},
)
