"""Time of the loss as a ratio to others, interleaved in one process: `python benchmarks/ratios.py --out FILE.json`.

Prints the ratios and, line by line, whether each target is met; writes every median with the machine, versions, commit
and date. Kernels for another instruction set are timed in a process of their own. Relies on `contenders`,
`interleaved`, `targets` and `machine`.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from contenders import (
    BASE,
    COMPILED,
    DTYPES,
    FLOOR,
    OURS,
    SHAPES,
    TAU,
    WORKS,
    Work,
    backward,
    contenders,
    logits_and_labels,
    losses,
)
from interleaved import interleave
from machine import peak_memory, where, write
from rich.console import Console
from rich.table import Table
from targets import targets

OTHER_ISA = "avx2"
ISA_VARIABLE = "DRSL_KERNELS_CPU_CAPABILITY"


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write all medians to this JSON file.")
@click.option("--threads", default=2, show_default=True, help="Threads that torch may use.")
@click.option("--seconds", default=2.0, show_default=True, help="Time spent on each shape and kind of work.")
@click.option("--shapes", default=len(SHAPES), show_default=True, help="How many of the shapes, from the first.")
@click.option("--compiled/--no-compiled", default=True, show_default=True, help="Time torch.compile as well.")
@click.option("--other-isa/--no-other-isa", default=True, show_default=True, help="Time AVX2 kernels as well.")
@click.option("--only-isa", hidden=True, help="What the process for another instruction set is started with.")
def main(
    out: Path | None, threads: int, seconds: float, shapes: int, compiled: bool, other_isa: bool, only_isa: str | None
) -> None:
    """Time the fused loss against F.cross_entropy without a penalty, and against all the others."""
    torch.set_num_threads(threads)
    chosen = SHAPES[:shapes]
    if only_isa is not None:
        rows = [measure("forward+backward", n, c, "float32", seconds, isa=only_isa) for n, c in chosen]
        print(json.dumps(rows))
        return
    rows = []
    for n, classes in chosen:
        for dtype in DTYPES:
            for work in WORKS:
                with_compiled = compiled and dtype == "float32" and work == "forward+backward"
                rows.append(measure(work, n, classes, dtype, seconds, compiled=with_compiled))
                print(f"{n}x{classes} {dtype} {work}", file=sys.stderr)
    if other_isa:
        rows += _with_isa(OTHER_ISA, threads, seconds, shapes)
    Console(width=120).print(ratio_table(rows))
    Console(width=120).print(target_table(rows))
    if out is not None:
        write(out, {"tau": TAU, "threads": threads, **where(), "rows": rows})


def measure(
    work: Work, rows: int, classes: int, dtype: str, seconds: float, *, compiled: bool = False, isa: str = "best"
) -> dict[str, Any]:
    """Medians of every contender; with a gradient also the peak of memory above the logits, in gradients."""
    runs = contenders(work, rows, classes, DTYPES[dtype], compiled=compiled)
    slow = {"reference"} if rows * classes > 2**22 else set()
    times = interleave({name: run for name, run in runs.items() if name not in slow}, seconds=seconds)
    result: dict[str, Any] = {
        "work": work,
        "dtype": dtype,
        "isa": isa,
        "rows": rows,
        "classes": classes,
        "seconds": {name: asdict(timing) for name, timing in times.items()},
    }
    gradient = rows * classes * DTYPES[dtype].itemsize
    if work == "forward+backward" and gradient >= 2**24:  # below, the process itself moves more
        del runs  # and the gradient that its logits hold
        result["memory"] = {name: peak / gradient for name, peak in _memory(rows, classes, dtype).items()}
    return result


def _memory(rows: int, classes: int, dtype: str) -> dict[str, int]:
    """Peak above the logits, in bytes."""
    logits, y = logits_and_labels(rows, classes, DTYPES[dtype])
    peaks = {}
    for name in (BASE, *OURS):
        step = partial(backward, losses()[name], logits, y)
        step()
        logits.grad = None
        gc.collect()
        peaks[name] = peak_memory(step)
    return peaks


def _with_isa(isa: str, threads: int, seconds: float, shapes: int) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--only-isa", isa, "--threads", str(threads), "--shapes", str(shapes)]
    done = subprocess.run(
        [*command, "--seconds", str(seconds)],
        env=os.environ | {ISA_VARIABLE: isa},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def ratio_table(rows: list[dict[str, Any]]) -> Table:
    """Our losses over each contender, all shapes and kinds of work."""
    table = Table(title="Time as a ratio to F.cross_entropy (no penalty), medians of interleaved runs")
    for column in ("logits", "dtype", "work", BASE, *OURS, *COMPILED, "reference", FLOOR):
        table.add_column(column, justify="left" if column in ("dtype", "work") else "right")
    for row in rows:
        medians = {name: timing["median"] for name, timing in row["seconds"].items()}
        base = medians[BASE]
        table.add_row(
            f"{row['rows']}x{row['classes']}",
            row["dtype"] + ("" if row["isa"] == "best" else f" {row['isa']}"),
            row["work"],
            f"{base * 1e6:,.1f} us",
            *[f"{medians[name] / base:.2f}" if name in medians else "" for name in (*OURS, *COMPILED)],
            *[f"{medians[name] / base:.2f}" if name in medians else "" for name in ("reference", FLOOR)],
        )
    return table


def target_table(rows: list[dict[str, Any]]) -> Table:
    """Every target with what was measured."""
    table = Table(title="Targets")
    for column in ("logits", "what", "allowed", "measured", ""):
        table.add_column(column, justify="right" if column in ("logits", "allowed", "measured") else "left")
    for target in targets(rows):
        style = "green" if target.met else "red"
        table.add_row(
            f"{target.shape[0]}x{target.shape[1]}",
            target.what,
            f"{target.allowed:.2f}",
            target.text(),
            f"[{style}]{'met' if target.met else 'not met'}[/{style}]",
        )
    return table


if __name__ == "__main__":
    main()
