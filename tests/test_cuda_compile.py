"""The CUDA kernels compiled by nvcc for three generations of GPUs, without one: registers, spills and wide accesses.

Each storage format for one generation, all of them for all with --all-cases. Relies on nvcc, and on the cuobjdump that
lies beside it or in Triton's wheel. Results stay in build/nvcc/ under a hash of everything they depend on, so that only
a change of the sources is compiled again.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FORMATS = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}  # bytes per logit
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# What is compiled without --all-cases. float16 differs from bfloat16 in its conversions alone, and float64 has the code
# of float32 with half as many elements to a lane.
USUAL = {
    "float32": "sm_90",
    "float64": None,
    "bfloat16": "sm_100",
    "float16": None,
    "launch": "sm_80",
    "plan": "sm_80",
}
FLAGS = ["-std=c++20", "-O3", "-Xptxas=-v"]
REGISTERS = 65536  # of a multiprocessor, on every generation
KERNELS_PER_FORMAT = {"group_kernel": 24, "block_kernel": 12, "part_kernel": 6, "weight_kernel": 1, "finish_kernel": 1}

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = pytest.mark.slow
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH or in /usr/local/cuda/bin: kernels not compiled")


@dataclass(frozen=True)
class Kernel:
    """What the compiler says of one kernel on one architecture."""

    name: str  # as mangled
    architecture: str
    stack_bytes: int
    spilled_bytes: int
    registers: int
    threads: int  # most per block: the kernel's launch bound
    accesses: frozenset[str]  # global loads and stores, as in LDG.E.128

    def is_a(self, kind: str) -> bool:
        return f"{len(kind)}{kind}" in self.name

    @property
    def shape(self) -> tuple[int, int]:
        """Lanes and elements per lane of a group kernel."""
        lanes, elements = re.findall(r"Li(\d+)E", self.name)
        return int(lanes), int(elements)


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_spills_and_registers_fit(source: Path, pytestconfig: pytest.Config) -> None:
    kernels = compiled(source, wanted(source.stem, pytestconfig))
    assert bool(kernels) == (source.stem in FORMATS)
    for kernel in kernels:
        assert kernel.spilled_bytes == 0, kernel
        assert kernel.stack_bytes == 0, kernel
        assert 0 < kernel.registers * kernel.threads <= REGISTERS, kernel


@needs_nvcc
@pytest.mark.parametrize("storage", FORMATS)
def test_every_kernel_is_there(storage: str, pytestconfig: pytest.Config) -> None:
    architectures = wanted(storage, pytestconfig)
    kernels = compiled(source_of(storage), architectures)
    assert {kernel.architecture for kernel in kernels} == set(architectures)
    shapes = 2 if storage == "float64" else 4  # a lane has no registers for the others
    for architecture in architectures:
        of_this = [kernel for kernel in kernels if kernel.architecture == architecture]
        count = {kind: sum(kernel.is_a(kind) for kernel in of_this) for kind in KERNELS_PER_FORMAT}
        assert count == {**KERNELS_PER_FORMAT, "group_kernel": 6 * shapes}


@needs_nvcc
@pytest.mark.parametrize("storage", FORMATS)
def test_accesses_of_sixteen_bytes(storage: str, pytestconfig: pytest.Config) -> None:
    for kernel in compiled(source_of(storage), wanted(storage, pytestconfig)):
        if kernel.is_a("group_kernel"):
            width = min(16, FORMATS[storage] * kernel.shape[1]) * 8  # a lane may hold less than 16 bytes of a row
            assert f"LDG.E.{width}" in kernel.accesses, kernel
            assert f"STG.E.{width}" in kernel.accesses, kernel
        elif kernel.is_a("block_kernel") or kernel.is_a("part_kernel"):
            assert "LDG.E.128" in kernel.accesses, kernel
            # The gradient makes room in the cache for logits that will be read again (EF: evict first).
            assert ("STG.E.EF.128" in kernel.accesses) == kernel.is_a("block_kernel"), kernel


# ---------------------------------------------------------------------------------------------------------
# Compiling


def source_of(storage: str) -> Path:
    return ROOT / "csrc" / "cuda" / f"{storage}.cu"


def wanted(stem: str, config: pytest.Config) -> tuple[str, ...]:
    """The architectures to compile a source for, of those that this nvcc knows; the oldest it must."""
    known = known_architectures()
    if config.getoption("--all-cases"):
        return known
    usual = USUAL[stem]
    if usual is None:
        pytest.skip("compiled with --all-cases")
    return (usual,) if usual in known else known[:1]


@functools.cache
def known_architectures() -> tuple[str, ...]:
    known = run([str(NVCC), "--list-gpu-code"]).split()
    assert ARCHITECTURES[0] in known, known
    return tuple(name for name in ARCHITECTURES if name in known)


@functools.cache
def compiled(source: Path, architectures: tuple[str, ...]) -> tuple[Kernel, ...]:
    """All kernels of a file."""
    folder = ROOT / "build" / "nvcc" / f"{source.stem}-{content_hash(source, architectures)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{source.stem}.lock")):
        if not folder.exists():
            forget_older(folder)
            compile_into(folder, source, architectures)
    return tuple(parse(folder))


def content_hash(source: Path, architectures: tuple[str, ...]) -> str:
    """Of everything that the result depends on."""
    digest = hashlib.sha256()
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h"), *source.parent.glob("*.cuh")]
    for path in [source, *sorted(headers)]:
        digest.update(path.read_bytes())
    digest.update(repr((FLAGS, architectures, run([str(NVCC), "--version"]))).encode())
    return digest.hexdigest()[:16]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Test processes side by side: the second waits for the first, and finds its result."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def forget_older(folder: Path) -> None:
    stem = folder.name.rpartition("-")[0]
    for path in folder.parent.glob(f"{stem}-*"):
        if path.is_dir():
            shutil.rmtree(path)


def compile_into(folder: Path, source: Path, architectures: tuple[str, ...]) -> None:
    scratch = folder.with_name(f"{source.stem}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    targets = [f"-gencode=arch=compute_{name[3:]},code={name}" for name in architectures]
    compiler_says = run([str(NVCC), *FLAGS, *targets, "-c", str(source), "-o", str(scratch / "kernels.o")])
    (scratch / "ptxas.txt").write_text(compiler_says)
    tool = cuobjdump()
    (scratch / "elf.txt").write_text(
        kept(["arch = ", ".nv.info.", "EIATTR_MAX_THREADS", "Value:"], tool, "-elf", scratch)
    )
    (scratch / "sass.txt").write_text(kept(["arch = ", "Function : ", "LDG.", "STG."], tool, "-sass", scratch))
    (scratch / "kernels.o").unlink()
    scratch.rename(folder)


def kept(signs: list[str], tool: str, what: str, folder: Path) -> str:
    """The lines that matter of a dump of many megabytes."""
    lines = run([tool, what, str(folder / "kernels.o")]).splitlines()
    return "\n".join(line.strip() for line in lines if any(sign in line for sign in signs))


def cuobjdump() -> str:
    beside = shutil.which("cuobjdump", path=str(Path(str(NVCC)).resolve().parent))
    found = beside or shutil.which("cuobjdump")
    if found is None:
        spec = importlib.util.find_spec("triton")
        if spec is None or spec.origin is None:
            pytest.skip("no cuobjdump beside nvcc or on PATH, and no Triton whose wheel has one")
        found = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}"
    return done.stdout


# ---------------------------------------------------------------------------------------------------------
# Reading what the tools say


def parse(folder: Path) -> Iterator[Kernel]:
    threads = launch_bounds((folder / "elf.txt").read_text())
    accesses = global_accesses((folder / "sass.txt").read_text())
    report = (folder / "ptxas.txt").read_text()
    for entry in re.split(r"(?=Compiling entry function)", report)[1:]:
        name, architecture = first(r"Compiling entry function '(\S+)' for '(\w+)'", entry)
        stack, stores, loads = first(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", entry)
        (registers,) = first(r"Used (\d+) registers", entry)
        yield Kernel(
            name=name,
            architecture=architecture,
            stack_bytes=int(stack),
            spilled_bytes=int(stores) + int(loads),
            registers=int(registers),
            threads=threads[architecture, name],
            accesses=frozenset(accesses[architecture, name]),
        )


def first(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text)
    assert found, f"{pattern} not in {text[:400]}"
    return found.groups()


def launch_bounds(elf: str) -> dict[tuple[str, str], int]:
    bounds = {}
    pattern = r"arch = (\w+)|^\.nv\.info\.(\S+)|EIATTR_MAX_THREADS\nValue:\s+0x(\w+)"
    architecture = kernel = ""
    for match in re.finditer(pattern, elf, re.MULTILINE):
        if match[1]:
            architecture = match[1]
        elif match[2]:
            kernel = match[2]
        else:
            bounds[architecture, kernel] = int(match[3], 16)
    return bounds


def global_accesses(sass: str) -> dict[tuple[str, str], set[str]]:
    accesses: dict[tuple[str, str], set[str]] = {}
    architecture = ""
    here: set[str] = set()
    for match in re.finditer(r"arch = (\w+)|Function : (\S+)|\b((?:LDG|STG)\.[A-Z0-9.]+)", sass):
        if match[1]:
            architecture = match[1]
        elif match[2]:
            here = accesses.setdefault((architecture, match[2]), set())
        else:
            here.add(match[3])
    return accesses
