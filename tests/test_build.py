"""The build and its results: which wheels come out, when the extension is opened, and what is said when it is not.

Wheels are made from a copy of the sources, by pip, without network. Nothing here compiles the extension for this
machine: the installed one is looked at.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from drsl_kernels import _build, _version

ROOT = Path(__file__).parent.parent
SOURCES = [
    "CMakeLists.txt",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "csrc",
    "drsl_kernels",
    "pyproject.toml",
    "setup.py",
]
CROSS_COMPILER = "aarch64-linux-gnu-g++"
RUNNING = str(torch.__version__)


# --- Whether the extension is opened ---


@pytest.mark.parametrize(
    ("built", "running", "opened"),
    [
        ("2.13.0+cpu", "2.13.0+cpu", True),
        ("2.13.0+cpu", "2.13.0+cu130", True),
        ("2.13.0", "2.13.0+cu130", True),
        ("2.13.0+cpu", "2.13.1+cpu", False),
        ("2.13.0+cpu", "2.11.0+cpu", False),
        ("2.1.0", "2.10.0", False),
        ("2.14.0.dev20260101+cpu", "2.14.0.dev20260101+cpu", True),
        ("2.14.0.dev20260101+cpu", "2.14.0.dev20260102+cpu", False),
        ("2.14.0a0+git1111111", "2.14.0a0+git2222222", False),
    ],
)
def test_obstacle_compares_releases_of_torch(tmp_path: Path, built: str, running: str, opened: bool) -> None:
    info = _fake_extension(tmp_path, built)
    reason = _build.obstacle(info, tmp_path, running)
    assert (reason == "") is opened
    if not opened:
        assert built in reason
        assert running in reason
        assert "pip install --no-build-isolation --force-reinstall --no-deps ." in reason


def test_obstacle_names_another_python(tmp_path: Path) -> None:
    info = {**_fake_extension(tmp_path, RUNNING), "extension": "_C.cpython-27-x86_64-linux-gnu.so"}
    assert "_C.cpython-27-x86_64-linux-gnu.so" in _build.obstacle(info, tmp_path, RUNNING)


def test_obstacle_names_a_removed_file(tmp_path: Path) -> None:
    info = _fake_extension(tmp_path, RUNNING)
    (tmp_path / info["extension"]).unlink()
    assert str(tmp_path / info["extension"]) in _build.obstacle(info, tmp_path, RUNNING)


def test_a_copy_that_was_never_built_says_so(tmp_path: Path) -> None:
    assert "never built" in _build.obstacle(_build.read_build_info(tmp_path), tmp_path, RUNNING)


# The extension in these copies is garbage: an attempt to open it is an error of its own, and tells.
@pytest.mark.parametrize(
    ("built", "said"),
    [
        ("2.10.0+cpu", f"was built against torch 2.10.0+cpu, and torch {RUNNING} is running"),
        (RUNNING, f"built against torch {RUNNING}, cannot be opened beside torch {RUNNING}"),
    ],
)
def test_an_unusable_extension_is_named_and_the_library_works(tmp_path: Path, built: str, said: str) -> None:
    package = tmp_path / "drsl_kernels"
    shutil.copytree(ROOT / "drsl_kernels", package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    _fake_extension(package, built)

    result = _loss_in_new_process(tmp_path)
    assert result["file"].startswith(str(tmp_path))
    assert not result["status"]["loaded"]
    assert said in result["status"]["reason"]
    assert result["status"]["torch_built"] == built
    assert not result["imported"]
    assert result["loss"] == pytest.approx(result["expected"])
    assert len(result["warnings"]) == 1
    assert said in result["warnings"][0]


# --- The extension that is installed here ---


@pytest.fixture(scope="module")
def extension() -> Path:
    status = _build.load_extension()
    if status.torch_built is None:
        pytest.skip(status.reason)
    assert status.loaded, status.reason
    return _build.PACKAGE_DIR / _build.read_build_info(_build.PACKAGE_DIR)["extension"]


def test_facts_in_the_library_and_beside_it_agree(extension: Path) -> None:
    library = importlib.import_module("drsl_kernels._C")
    info = _build.read_build_info(_build.PACKAGE_DIR)
    status = _build.load_extension()
    assert Path(library.__file__) == extension
    assert library.torch_version == info["torch"] == status.torch_built
    assert library.compiler == info["compiler"] == status.compiler
    assert re.fullmatch(r"\w+ \d+[\d.]*", library.compiler)
    assert library.commit == info["commit"]
    assert library.instruction_sets == tuple(info["instruction_sets"]) == status.instruction_sets
    assert library.cxx11_abi is torch._C._GLIBCXX_USE_CXX11_ABI


def test_instruction_sets_are_all_there(extension: Path) -> None:
    x86 = os.uname().machine == "x86_64"
    expected = ("baseline", "avx2", "avx512") if x86 else ("baseline",)
    assert _build.load_extension().instruction_sets == expected


def test_library_carries_no_path_and_no_openmp_of_its_own(extension: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf (binutils)")
    dynamic = subprocess.run(["readelf", "-d", extension], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert "omp" not in dynamic


def test_one_openmp_runtime_in_the_process(extension: Path) -> None:
    result = _loss_in_new_process(ROOT)
    assert result["status"]["loaded"]
    assert len(result["openmp"]) == 1
    assert Path(result["openmp"][0]).parent == Path(torch.__file__).parent / "lib"


# --- Wheels ---


def test_pure_python_wheel_on_request(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path, DRSL_KERNELS_BUILD="0")
    assert wheel.name == f"drsl_kernels-{_version.__version__}-py3-none-any.whl"

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        dist_info = f"drsl_kernels-{_version.__version__}.dist-info"
        metadata = archive.read(f"{dist_info}/METADATA").decode()
        scripts = archive.read(f"{dist_info}/entry_points.txt").decode()
        archive.extractall(tmp_path / "site")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "drsl_kernels").rglob("*.py")}
    others = {"drsl_kernels/py.typed", "drsl_kernels/_build_info.json"}
    assert {name for name in names if not name.startswith(dist_info)} == modules | others
    assert f"{dist_info}/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in metadata
    assert re.findall(r"^Requires-Dist: (torch.*)$", metadata, re.MULTILINE) == ["torch>=2.11"]
    assert "drsl = drsl_kernels.robustness.cli:main" in scripts

    result = _loss_in_new_process(tmp_path / "site")
    assert "it was installed with DRSL_KERNELS_BUILD=0" in result["status"]["reason"]
    assert result["loss"] == pytest.approx(result["expected"])


def test_pure_python_wheel_without_a_compiler(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path, PATH=str(tmp_path))
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        info = json.loads(archive.read("drsl_kernels/_build_info.json"))
    assert info["extension"] is None
    assert info["reason"].startswith("missing when it was installed: a C++ compiler")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"DRSL_KERNELS_BUILD": "1", "PATH": ""}, "cannot be built here: missing a C++ compiler"),
        ({"DRSL_KERNELS_BUILD": "yes"}, "DRSL_KERNELS_BUILD must be 0, 1 or unset, got 'yes'"),
        ({"CXX": "/bin/false"}, "Set DRSL_KERNELS_BUILD=0 to install without the extension"),
        ({"CXX": "/nonexistent/g++"}, "Set DRSL_KERNELS_BUILD=0 to install without the extension"),
    ],
    ids=["required", "bad value", "failing compiler", "wrong compiler"],
)
def test_a_failing_build_is_an_error_that_names_the_way_out(
    tmp_path: Path, environment: dict[str, str], said: str
) -> None:
    done = _pip_wheel(tmp_path, environment)
    assert done.returncode != 0
    assert said in done.stdout
    assert not list(tmp_path.glob("*.whl"))


def test_source_archive_is_complete(tmp_path: Path) -> None:
    source = _copy_sources(tmp_path)
    (source / "drsl_kernels" / "_C.test.so").touch()
    program = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    environment = {**os.environ, "DRSL_KERNELS_BUILD": "0"}
    subprocess.run(
        [sys.executable, "-c", program, tmp_path], cwd=source, env=environment, check=True, capture_output=True
    )
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    cpp = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert cpp | {"CMakeLists.txt", "LICENSE", "setup.py", "drsl_kernels/_version.py"} <= names
    assert not {name for name in names if name.endswith((".so", "_build_info.json"))}


def test_one_version_of_torch_is_pinned() -> None:
    pin = re.compile(r"torch==([\d.]+)")
    isolated = pin.findall((ROOT / "pyproject.toml").read_text())
    assert isolated == pin.findall((ROOT / "constraints.txt").read_text())
    assert len(isolated) == 1


# --- Another processor ---


def test_core_compiles_for_aarch64(tmp_path: Path) -> None:
    cmake = shutil.which("cmake") or shutil.which("cmake", path=sysconfig.get_path("scripts"))
    if cmake is None or shutil.which(CROSS_COMPILER) is None:
        pytest.skip(f"needs cmake and the cross compiler {CROSS_COMPILER} (Debian: g++-aarch64-linux-gnu)")
    options = ["-DDRSL_BUILD_EXTENSION=OFF", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-Werror"]
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS_COMPILER}"]
    for command in ([cmake, "-S", ROOT, "-B", tmp_path, *options, *target], [cmake, "--build", tmp_path]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        assert done.returncode == 0, done.stdout
    assert "drsl_cpu_avx2" not in done.stdout


# --- Helpers ---


def _fake_extension(folder: Path, torch_built: str) -> dict[str, str | list[str]]:
    """A file that is no library, and the facts of a build against `torch_built` beside it."""
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    (folder / name).write_bytes(b"not a library")
    info: dict[str, str | list[str]] = {"extension": name, "reason": "", "torch": torch_built, "compiler": "GNU 12.2.0"}
    info |= {"commit": "", "instruction_sets": ["baseline"]}
    (folder / "_build_info.json").write_text(json.dumps(info))
    return info


def _loss_in_new_process(folder: Path) -> dict:
    """Import the package that lies in `folder`, call it twice, and report."""
    program = f"""
import sys
sys.path.insert(0, {str(folder)!r})
import dataclasses, json, re, warnings
import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import drsl_kernels
    from drsl_kernels import _build
    logits, y = torch.randn(4096, 64), torch.randint(64, (4096,))
    loss = [drsl_kernels.fused_drsl_loss(logits, y, 0.0).item() for _ in range(2)][0]
maps = open("/proc/self/maps").read()
print(json.dumps({{
    "file": drsl_kernels.__file__,
    "status": dataclasses.asdict(_build.load_extension()),
    "imported": "drsl_kernels._C" in sys.modules,
    "loss": loss,
    "expected": F.cross_entropy(logits, y).item(),
    "warnings": [str(w.message) for w in caught if "drsl_kernels" in str(w.message)],
    "openmp": sorted(set(re.findall(r"/\\S*lib[gi]?omp\\S*", maps))),
}}))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict = json.loads(done.stdout)
    return report


def _copy_sources(folder: Path) -> Path:
    source = folder / "source"
    source.mkdir()
    built = shutil.ignore_patterns("__pycache__", "_C*", "_build_info.json")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=built)
        else:
            shutil.copy(ROOT / name, source / name)
    return source


def _pip_wheel(folder: Path, changes: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `pip wheel` on a copy of the sources, in this environment without CXX and with `changes`."""
    source = _copy_sources(folder)
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "DRSL_KERNELS_BUILD")} | changes
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder)]
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(source)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def _wheel(folder: Path, **environment: str) -> Path:
    done = _pip_wheel(folder, environment)
    assert done.returncode == 0, done.stdout
    (wheel,) = folder.glob("*.whl")
    return wheel
