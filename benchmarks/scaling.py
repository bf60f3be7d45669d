"""How the time grows with rows, classes and threads: `python benchmarks/scaling.py --out FILE.json`.

Forward + backward, float32: rows of 1000 classes up to 1e9 elements, with one and with two threads; 256 rows of up to
131072 classes; every number of classes from 2 to 300. For the last also the instructions, where `make cpp-test` has
built the counter. Relies on `contenders`, `interleaved` and `machine`; `pictures` draws the result.
"""

from __future__ import annotations

import gc
import subprocess
from pathlib import Path
from typing import Any

import click
import torch
from contenders import BASE, FLOOR, contenders
from interleaved import interleave
from machine import where, write

COUNTER = Path(__file__).parents[1] / "build" / "extension" / "tests" / "cpp" / "count_instructions"
OURS, REFERENCE, COMPILED = "uniform", "reference", "compiled reference"
ROWS = [10**e for e in range(7)]
CLASSES = [2**e for e in range(1, 18)]
EVERY = range(2, 301)
PER_CLASS = 2**18  # elements of a matrix where every number of classes is timed
COUNTED_ROWS = 16  # one block of the widest kernels
# What PyTorch keeps besides the logits must fit into the memory, and the time into an hour.
MOST = {BASE: 10**8, REFERENCE: 10**7, COMPILED: 10**8}


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File for the medians.")
@click.option("--seconds", default=1.0, show_default=True, help="Time spent on each point.")
@click.option("--points", default=999, show_default=True, help="How many points of each sweep, from the smallest.")
@click.option("--compiled/--no-compiled", default=True, show_default=True, help="Time torch.compile as well.")
def main(out: Path, seconds: float, points: int, compiled: bool) -> None:
    """Time our loss, PyTorch's and a copy over the sweeps."""
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        names = (BASE, OURS, FLOOR) if threads == 1 else (BASE, OURS, REFERENCE, *([COMPILED] * compiled), FLOOR)
        rows += [point("rows", n, 1000, threads, names, seconds) for n in ROWS[:points]]
    rows += [point("classes", 256, c, 2, names, seconds) for c in CLASSES[:points]]
    every = EVERY[:points]
    rows += [point("every", PER_CLASS // c, c, 2, (BASE, OURS, FLOOR), seconds / 10) for c in every]
    write(out, {**where(), "rows": rows, "instructions": instructions(list(every))})


def point(sweep: str, rows: int, classes: int, threads: int, names: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """Median seconds of each contender that can take so many elements."""
    some = [name for name in names if rows * classes <= MOST.get(name, rows * classes)]
    runs = contenders("forward+backward", rows, classes, compiled=COMPILED in some)
    times = interleave({name: runs[name] for name in some}, seconds=seconds, least_rounds=5)
    del runs
    gc.collect()
    medians = {name: timing.median for name, timing in times.items()}
    return {"sweep": sweep, "rows": rows, "classes": classes, "threads": threads, "seconds": medians}


def instructions(classes: list[int]) -> dict[str, dict[int, float]]:
    """Instructions per row, by instruction set and number of classes; empty without the counter."""
    found: dict[str, dict[int, float]] = {}
    for isa in ("avx512",) if COUNTER.is_file() else ():
        command = [str(COUNTER), isa, str(COUNTED_ROWS), *map(str, classes)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line.split() for line in done.stdout.splitlines()]
        found[isa] = {int(c): int(count) / COUNTED_ROWS for c, count in lines}
    return found


if __name__ == "__main__":
    main()
