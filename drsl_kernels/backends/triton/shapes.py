"""What a program of each Triton kernel holds, and how many programs share the work: the tables, as functions.

Nothing is tuned at run time. Relies on nothing of the package; launch.py relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

LANES = 64 if torch.version.hip else 32  # of a warp
MAX_SLICES = 64
MOST_AT_WORK = 2  # rows of a processor, of those with many classes
CACHED = 0.7  # of the L2 cache is theirs


@dataclass(frozen=True)
class Shape:
    """What a program of `rows_kernel` holds: `rows` rows of parts x lanes x word classes, over `warps` warps.

    A row has `lanes` lanes, each with `parts` words of `word` neighbouring classes. A thread gets `registers`, for left
    alone, NVIDIA's assembler spills one or two to fit more programs in.
    """

    rows: int
    parts: int
    lanes: int
    word: int
    warps: int
    registers: int


@dataclass(frozen=True)
class Tile:
    """What a program of the other kernels holds at a time: parts x lanes x word classes of one row."""

    parts: int
    lanes: int
    word: int
    warps: int
    registers: int


def few_classes_shape(
    classes: int,
    rows: int,
    itemsize: int,
    width: int,
    moments: bool = False,
    weighted: bool = False,
    lanes: int = LANES,
) -> Shape | None:
    """The tile for so many classes; None where a row is too long for one.

    `itemsize` is that of the logits, `width` as of the function below. Where sums of `moments` are taken the logits are
    held beside their exponentials, and weights of classes beside both where they are `weighted`.
    """
    word = max(width, 1)
    columns = max(triton.next_power_of_2(classes), word)
    # What a thread holds without spilling, and the longest row. The fewer threads share a row, the fewer compute its
    # loss. Addresses of single classes need registers as well.
    if itemsize < 8:
        held, longest = (16, 4096) if moments or weighted else (32, 8192)
        if width < 2:
            held, longest = (4, 2048) if weighted else (8, 4096)
    else:
        held, longest = (4, 1024) if weighted else (8, 2048)
        if width < 2:
            held, longest = (2, 512) if weighted else (4, 1024)
    if columns > longest:
        return None
    threads = 128
    if rows * columns <= 2048:
        # The whole batch in one program: no other kernel has to run before or after it.
        threads, held = 256, min(held, 8)
    held = max(min(held, columns), word)
    per_row = columns // held
    threads = max(threads, per_row)
    registers = min(168 if itemsize < 8 and not weighted else 255, 65536 // threads)
    return Shape(threads // per_row, held // word, per_row, word, threads // lanes, registers)


def tile_shape(
    itemsize: int, width: int, moments: bool = False, weighted: bool = False, alone: bool = False, lanes: int = LANES
) -> Tile:
    """A thread reads 16 bytes at a time, and several times before it uses what it read.

    For `width` see there. Sums of `moments` and of `weighted` moments take registers, which leaves fewer to read into.
    `alone`: no other program runs on the same processor, so this one has to keep its memory busy.
    """
    threads, word = 512, max(width, 1)
    held = (8 if moments or weighted else 16) if itemsize < 8 else (2 if weighted else 4)
    if width < 2:
        held //= 4 if weighted else 2
    if itemsize < 8 and not moments and width * itemsize == 16:
        threads, held = 512 if alone else 256, 32
    return Tile(max(1, held // word), threads, word, threads // lanes, 128)


def sum_shape(count: int, lanes: int = LANES) -> tuple[int, int]:
    """Block and warps of the one program that sums so many losses."""
    return (2048, 8) if count <= 2**14 else (8192, 1024 // lanes)


def options(warps: int, registers: int = 0, hip: bool = torch.version.hip is not None) -> dict[str, Any]:
    """How a kernel is compiled; `registers` a thread may have (0: NVIDIA's assembler decides)."""
    chosen: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": True}
    return chosen | {"maxnreg": registers} if registers and not hip else chosen


def slice_count(rows: int, classes: int, processors: int) -> int:
    """Into how many slices a row is cut, so that few long rows fill the device."""
    wanted = triton.cdiv(2 * processors, rows)
    return max(1, min(wanted, MAX_SLICES, classes // 8192)) if rows < processors else 1


def rows_at_work(logits: Tensor, classes: int) -> int:
    """How many rows a processor works on at a time: more hide each other's waits, fewer stay in the L2 cache."""
    share = CACHED * cache_bytes(logits.device) / processor_count(logits.device)
    return max(1, min(MOST_AT_WORK, int(share / (classes * logits.element_size()))))


@cache
def cache_bytes(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter
        return 2**20
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


@cache
def processor_count(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
