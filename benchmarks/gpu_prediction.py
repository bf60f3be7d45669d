"""What the Triton kernels should take on an H200, from their machine code alone: to be held against a run on one.

    python benchmarks/gpu_prediction.py --out benchmarks/results/gpu_prediction.json

Needs no GPU. Each kernel is compiled for sm_90 as `launch.py` would launch it; in its loops over logits the
instructions are counted, and held against what the chip can issue and move. Nothing is measured here.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # decided at the import of Triton

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import machine
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from drsl_kernels.backends.triton.few_classes import rows_kernel
from drsl_kernels.backends.triton.many_classes import row_kernel
from drsl_kernels.backends.triton.shapes import CACHED as AT_WORK_SHARE
from drsl_kernels.backends.triton.shapes import MOST_AT_WORK, few_classes_shape, tile_shape

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from triton_compile import CUOBJDUMP, Case, blocks_of, compiled

# NVIDIA's data sheet and tuning guide of Hopper
PROCESSORS, CLOCK, BANDWIDTH, CACHE = 132, 1.98e9, 4.8e12, 50e6
SCHEDULERS = 4  # of a processor, each issues one instruction of a warp per cycle
MUFU_CYCLES = 8  # of a scheduler for one warp's exponentials, logarithms or reciprocals
REGISTERS, WARPS, SHARED = 65536, 64, 228 * 1024  # of a processor
REACHED = 0.9  # of the bandwidth, by a copy
CACHED = 0.6  # of the cache holds what is wanted of it: a guess

SHAPES = [
    *((n, c, d) for n, c in ((2**23, 10), (2**20, 100), (2**17, 1000)) for d in ("fp32", "bf16")),
    *((n, c, d) for n, c in ((8192, 32000), (2048, 128256), (1024, 262144)) for d in ("fp32", "bf16")),
]
ITEMSIZE = {"fp32": 4, "bf16": 2}
UNIFORM = 1
MIN_JUMP = 16  # instructions


class Instruction(NamedTuple):
    at: int
    text: str


@dataclass(frozen=True)
class Loop:
    """What one warp does in one turn of a loop."""

    instructions: int
    mufu: int


@dataclass(frozen=True)
class Prediction:
    """Times are in units of a device-to-device copy of the logits."""

    rows: int
    classes: int
    dtype: str
    kernel: str
    registers: int
    programs_per_processor: int
    kilobytes_in_flight: float  # of a processor, before anything is computed; bandwidth times 0.7 us is 26
    instructions_per_element: float
    mufu_per_element: float
    memory: float
    issue: float
    mufu: float

    @property
    def at_best(self) -> float:
        """All perfectly overlapped, and no wait that other warps do not hide."""
        return max(self.memory, self.issue, self.mufu)

    @property
    def at_worst(self) -> float:
        """The memory and the processor take turns."""
        return self.memory + max(self.issue, self.mufu)


def case_of(rows: int, classes: int, dtype: str) -> tuple[Case, int]:
    """The kernel for loss and gradient in one launch, and in how many turns of its loops it takes a row."""
    itemsize = ITEMSIZE[dtype]
    width = next(w for w in (16 // itemsize, 4, 2, 1) if classes % w == 0)
    present = {
        "logits": f"*{dtype}",
        "labels": "*i64",
        "grad": f"*{dtype}",
        "parts": "*fp64",
        "denominator": "*fp64",
        "losses": "*fp64",
    }
    constants: dict[str, Any] = {"TRUTH": 0, "DISTANCE": UNIFORM, "SMOOTH": False, "SOFT": False, "ACC": tl.float32}
    constants |= {"MEAN": 2, "SKIP": False, "FLAT": True, "WIDTH": width}
    shape = few_classes_shape(classes, rows, itemsize, width)
    if shape is not None:
        constants |= blocks_of(shape)
        return Case("rows_kernel", rows_kernel, present, constants, shape.warps, 0, shape.registers), 1
    tile = tile_shape(itemsize, width, alone=at_work(classes * itemsize) == 1)
    constants |= blocks_of(tile)
    turns = -(-classes // (tile.parts * tile.lanes * tile.word))
    return Case("row_kernel", row_kernel, present, constants, tile.warps, 0, tile.registers), turns


def at_work(row_bytes: int) -> int:
    """`rows_at_work` of shapes.py, for this processor."""
    return max(1, min(MOST_AT_WORK, int(AT_WORK_SHARE * CACHE / PROCESSORS / row_bytes)))


def loops_of(cubin: bytes) -> tuple[list[Loop], int]:
    """The loops that access global memory, innermost only, and the registers of a thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def tool(option: str) -> str:
            return subprocess.run(
                [str(CUOBJDUMP), option, str(path)], capture_output=True, text=True, check=True
            ).stdout

        sass, usage = tool("-sass"), tool("-res-usage")
    code = [Instruction(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+([^;/]+);", sass)]
    ranges = []
    for instruction in code:
        jump = re.search(r"\bBRA(?:\.\S+)? (?:!?U?P\d, )?0x([0-9a-f]+)", instruction.text)
        if jump and int(jump[1], 16) < instruction.at:
            ranges.append((int(jump[1], 16), instruction.at))
    loops = []
    for start, end in sorted(set(ranges)):
        if any(start <= a and b <= end and (a, b) != (start, end) and _touches_memory(code, a, b) for a, b in ranges):
            continue
        if _touches_memory(code, start, end):
            rare = _of_one_tile(code, start, end)
            inside = [i.text for i in code if start <= i.at <= end and i.at not in rare]
            loops.append(
                Loop(
                    len(inside),
                    sum("MUFU" in text for text in inside),
                )
            )
    return loops, int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]


def _of_one_tile(code: list[Instruction], start: int, end: int) -> set[int]:
    """What a loop over tiles jumps over, but for the tile that holds the label."""
    jumped: set[int] = set()
    for instruction in code:
        jump = re.search(r"@\S+ BRA 0x([0-9a-f]+)", instruction.text)
        if jump and start <= instruction.at < (to := int(jump[1], 16)) <= end:
            between = {i.at for i in code if instruction.at < i.at < to}
            compares = sum("ISETP" in i.text for i in code if i.at in between)
            if len(between) >= MIN_JUMP and compares > len(between) // 4:
                jumped |= between
    return jumped


def _touches_memory(code: list[Instruction], start: int, end: int) -> bool:
    inside = [i.text for i in code if start <= i.at <= end]
    return any("MUFU.EX2" in text for text in inside) and any("LDG" in text for text in inside)


def predict(rows: int, classes: int, dtype: str) -> Prediction:
    case, turns = case_of(rows, classes, dtype)
    kernel = compiled(case, GPUTarget("cuda", 90, 32))
    loops, registers = loops_of(kernel.asm["cubin"])
    assert len(loops) == (1 if turns == 1 and case.kernel is rows_kernel else 2), (case.name, loops)

    whole_rows = case.kernel is rows_kernel
    per_warp = -(-registers // 8) * 8 * 32
    shared = kernel.metadata.shared + 1024
    programs = min(REGISTERS // (per_warp * case.warps), WARPS // case.warps, SHARED // shared, 32)
    row_bytes = classes * ITEMSIZE[dtype]
    word = case.constants["WORD"] * ITEMSIZE[dtype]
    copy = 2 * rows * row_bytes / (REACHED * BANDWIDTH)

    # Labels: 8 bytes a row, and as many for the kernel that counts them beforehand.
    labels = 16 / row_bytes
    # The second sweep begins where the first ended, and finds in the cache what other rows at work leave of it.
    again = 0.0
    if not whole_rows:
        programs = min(programs, at_work(row_bytes))
        again = 1.0 - min(1.0, CACHED * CACHE / (PROCESSORS * programs * row_bytes))
    tiles = -(-rows // case.constants["BLOCK_R"]) if whole_rows else rows * turns
    scheduled = tiles * case.warps / (PROCESSORS * SCHEDULERS * CLOCK)
    issue = scheduled * sum(loop.instructions for loop in loops)
    mufu = scheduled * sum(loop.mufu for loop in loops) * MUFU_CYCLES
    per_element = tiles * case.warps * 32 / (rows * classes)
    lanes = case.constants["PARTS"] * case.constants["LANES"] * case.constants["WORD"] / classes  # padding of a row
    return Prediction(
        rows,
        classes,
        dtype,
        case.name,
        registers,
        programs,
        round(case.constants["PARTS"] * word * 32 * case.warps * programs / 1024 / (lanes if whole_rows else 1), 1),
        round(per_element * sum(loop.instructions for loop in loops), 2),
        round(per_element * sum(loop.mufu for loop in loops), 2),
        round((2 + again + labels) / 2, 2),
        round(issue / copy, 2),
        round(mufu / copy, 2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    rows = []
    for shape in SHAPES:
        found = predict(*shape)
        rows.append(asdict(found) | {"at_best": found.at_best, "at_worst": round(found.at_worst, 2)})
        print(json.dumps(rows[-1]), flush=True)
    if out is not None:
        where = {key: value for key, value in machine.where().items() if key in ("commit", "date")}
        machine.write(out, {"triton": triton.__version__, **where, "device": "H200", "predictions": rows})


if __name__ == "__main__":
    main()
