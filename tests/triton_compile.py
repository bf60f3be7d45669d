"""Compiles the Triton kernels for a GPU that need not be there, and prints what came out of it as JSON.

    python tests/triton_compile.py cuda:90 [--all]

One line per kernel and configuration of the launch tables: spilled bytes, shared memory, widest global load and store
in bytes. A script of its own because Triton decides at its import whether it compiles or interprets, and the tests
interpret. test_triton_compile.py runs it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from drsl_kernels.backends.triton.few_classes import rows_kernel
from drsl_kernels.backends.triton.many_classes import gradient_kernel, row_kernel, stats_kernel
from drsl_kernels.backends.triton.shapes import Shape, Tile, few_classes_shape, options, sum_shape, tile_shape
from drsl_kernels.backends.triton.steps import label_weights_kernel, sum_kernel

ELEMENTS = {"bf16": 2, "fp32": 4, "fp64": 8}
ODD = "fp32"  # for which unusual arguments are compiled as well
THOROUGH = "cuda:90"  # the target on which more is compiled
USUAL = {THOROUGH: ("bf16", "fp32")}  # elsewhere bf16 alone
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Case(NamedTuple):
    """A kernel with its compile-time arguments; `present` are the types of the optional pointers that are not None.

    `registers` as for `options`; 16 `bytes_per_access` are what the aligned path must reach, 0 where nothing is asked.
    """

    name: str
    kernel: Any
    present: dict[str, str]
    constants: dict[str, Any]
    warps: int
    bytes_per_access: int = 0
    registers: int = 0


def cases(target: str, lanes: int, everything: bool = False) -> Iterator[Case]:
    """What the launch tables ask for, and on one target some of what unusual arguments compile; `everything`: all."""
    losses = {"losses": "*fp64", "denominator": "*fp64", "total": "*fp32"}
    for count in (100, 10**6):
        block, warps = sum_shape(count, lanes)
        yield Case(f"sum {block}", sum_kernel, losses, {"BLOCK": block}, warps, 0)
    weights = {"labels": "*i64", "class_weights": "*fp32", "parts": "*fp64"}
    yield Case("label_weights", label_weights_kernel, weights, {"BLOCK": 1024}, 4, 0)
    for element in ELEMENTS if everything else USUAL.get(target, ("bf16",)):
        yield from cases_of(element, lanes, target == THOROUGH, everything)


def cases_of(element: str, lanes: int, thorough: bool, everything: bool) -> Iterator[Case]:
    itemsize = ELEMENTS[element]
    acc = "fp64" if itemsize == 8 else "fp32"
    # moments: no class weights, which leaves room for longer rows
    loads = [("light", 0, 1, False), ("heavy", 1, 3, True), ("soft", 0, 6, True), ("moments", 1, 3, False)]
    loads += [("transformed", 1, 1, False)]
    for load, truth, distance, smooth in loads:
        some = ("light", "heavy", "soft") if element != "fp64" else ("light", "heavy")
        odd_ones = ("transformed", "moments") if thorough else ("transformed",)
        if not (everything or load in some or (load in odd_ones and element == ODD)):
            continue
        moments, weighted = load != "light", load in ("heavy", "soft")
        outputs = {"grad": f"*{element}", "denominator": "*fp64", "losses": "*fp64", "saved": f"*{acc}"}
        present = {"logits": f"*{element}", "labels": "*i64", "parts": "*fp64"} | outputs
        if load == "heavy":
            present |= {"class_weights": f"*{acc}", "tau": f"*{acc}", "reports": f"*{acc}", "upstream": f"*{acc}"}
        elif load == "soft":
            present |= {"class_weights": f"*{acc}"}
        elif load == "transformed":
            present |= {"class_margins": f"*{acc}"}
        constants = {
            "TRUTH": truth,
            "DISTANCE": distance,
            "SMOOTH": smooth,
            "SOFT": load == "soft",
            "ACTIVATION": int(load == "transformed"),
            "MEAN": 2,
            "SKIP": load == "heavy",
            "FLAT": True,
            "ACC": getattr(tl, acc.replace("fp", "float")),
            "SLICES_BLOCK": 64,
        }

        def whole_rows(name: str, batches: list[tuple[int, int]], width: int, **others: Any) -> Iterator[Case]:
            shapes = (few_classes_shape(*batch, itemsize, width, moments, weighted, lanes) for batch in batches)  # noqa: B023
            for shape in dict.fromkeys(shapes):
                if shape is not None:
                    size = f"{shape.rows}x{shape.parts}x{shape.lanes}x{shape.word}"
                    case = Case(f"rows {size} {name}", rows_kernel, present, constants, shape.warps)  # noqa: B023
                    yield case._replace(constants=constants | blocks_of(shape), registers=shape.registers, **others)  # noqa: B023

        grid = [(10, 1), *((classes, 65536) for classes in (10, 250, 2000, 8000))]
        for aligned in (True, False) if everything or (load == "heavy" and itemsize == 2) else (True,):
            width = 16 // itemsize if aligned else 0
            tile, alone = (tile_shape(itemsize, width, moments, weighted, x, lanes) for x in (False, True))
            constants |= {"WIDTH": width, **blocks_of(tile)}
            wanted = 16 if aligned else 0
            name = f"{element} {load} {'aligned' if aligned else 'strided'}"
            yield from whole_rows(name, grid, width, bytes_per_access=wanted)
            for kernel in (row_kernel, stats_kernel, gradient_kernel):
                yield Case(
                    f"{kernel.fn.__name__} {name}", kernel, present, constants, tile.warps, wanted, tile.registers
                )
            if alone != tile:
                name = f"row_kernel alone {name}"
                yield Case(
                    name, row_kernel, present, constants | blocks_of(alone), alone.warps, wanted, alone.registers
                )
        # What a run of other arguments compiles: the mean's labels counted on the spot, classes that are pairs or odd,
        # rows in two dimensions, the loss alone.
        odd = ((1, False), (2, True)) if thorough and element == ODD and load == "light" else ()
        for width, flat in ((1, True), (1, False), (2, True)) if everything else odd:
            tile = tile_shape(itemsize, width, moments, weighted, False, lanes)
            constants |= {"WIDTH": width, "FLAT": flat, "MEAN": 1, **blocks_of(tile)}
            if width == 2:
                constants["SKIP"] = False
                present = {pointer: of for pointer, of in present.items() if pointer not in ("grad", "upstream")}
            name = f"{element} {load} width {width}{'' if flat else ' two strides'}"
            yield from whole_rows(name, [(10, 128), (10, 65536), (100, 128), (1000, 256)], width)
            yield Case(f"row_kernel {name}", row_kernel, present, constants, tile.warps, 0, tile.registers)


def blocks_of(shape: Shape | Tile) -> dict[str, int]:
    blocks = {"PARTS": shape.parts, "LANES": shape.lanes, "WORD": shape.word}
    return blocks | {"BLOCK_R": shape.rows} if isinstance(shape, Shape) else blocks


def compiled(case: Case, target: GPUTarget) -> Any:
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(case.kernel.params):
        name = parameter.name
        if parameter.annotation_type:
            # A number that is compiled in would have the kernel compiled again for the next batch.
            assert parameter.do_not_specialize, f"{case.name}: {name}"
            signature[name] = parameter.annotation_type
        elif name in case.present:
            signature[name] = case.present[name]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(i,)] = case.constants[name] if parameter.is_constexpr else None
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(
        source, target=target, options=options(case.warps, case.registers, hip=target.backend == "hip")
    )


def nvidia_report(kernel: Any, folder: Path) -> dict[str, int]:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [str(CUOBJDUMP), "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True)
    facts = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage.stdout + usage.stderr))
    widths = {"ld": 0, "st": 0}
    for access, count, bits in re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"]):
        widths[access] = max(widths[access], int(count or 1) * int(bits) // 8)
    return {
        "spilled": int(facts["STACK"]) + int(facts["LOCAL"]),
        "registers": int(facts["REG"]),
        "load": widths["ld"],
        "store": widths["st"],
    }


def amd_report(kernel: Any) -> dict[str, int]:
    text = kernel.asm["amdgcn"]
    words = {"": 4, "x2": 8, "x3": 12, "x4": 16}
    widths = {"load": 0, "store": 0}
    for access, count in re.findall(r"\b(?:global|buffer|flat)_(load|store)_dword(x\d)?\b", text):
        widths[access] = max(widths[access], words[count])
    counts = {name: int(value) for name, value in re.findall(r"\.(\w+(?:_count|_fixed_size)):\s*(\d+)", text)}
    # What scalar registers do not hold goes into lanes of vector registers, not into memory.
    spilled = counts["vgpr_spill_count"] + counts["private_segment_fixed_size"]
    return {"spilled": spilled, "registers": counts["vgpr_count"], **widths}


def main(name: str, everything: bool) -> None:
    backend, arch = name.split(":")
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(name, target.warp_size, everything):
            kernel = compiled(case, target)
            report = nvidia_report(kernel, Path(folder)) if backend == "cuda" else amd_report(kernel)
            facts = {"name": case.name, "wanted": case.bytes_per_access, "stores": "stats_kernel" not in case.name}
            print(json.dumps(facts | report | {"shared": kernel.metadata.shared}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], "--all" in sys.argv)
