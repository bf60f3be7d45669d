"""How the time grows with elements, classes and threads: `python benchmarks/scaling.py --out FILE.json`.

Three sweeps of forward + backward: N x 1000 from 1e3 to 1e9 elements with one and with two threads; every number of
classes from 2 to 300; and numbers around powers of two. Relies on `contenders`, `interleaved` and `machine`.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import click
import torch
from contenders import BASE, FLOOR, contenders
from interleaved import interleave
from machine import where, write

NAMES = (BASE, "uniform", FLOOR)
ELEMENTS = [10**e for e in range(3, 10)]
CLASSES = 1000  # of the first sweep
SWEPT = 2**18  # elements of a matrix in the other two
AROUND = [2**e + d for e in range(8, 17) for d in (-1, 0, 1)]


@click.command()
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="JSON file for the medians."
)
@click.option("--seconds", default=0.5, show_default=True, help="Time spent on each point.")
@click.option("--elements", default=len(ELEMENTS), show_default=True, help="How many sizes, from the smallest.")
def main(out: Path, seconds: float, elements: int) -> None:
    """Time our loss, F.cross_entropy and a copy over the three sweeps."""
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows += [_point("elements", n // CLASSES, CLASSES, threads, seconds) for n in ELEMENTS[:elements]]
    for sweep, classes in (("classes", range(2, 301)), ("powers", AROUND)):
        rows += [_point(sweep, max(1, SWEPT // c), c, threads, seconds / 5) for c in classes]
    write(out, {**where(), "rows": rows})


def _point(sweep: str, rows: int, classes: int, threads: int, seconds: float) -> dict[str, Any]:
    runs = contenders("forward+backward", rows, classes)
    times = interleave({name: runs[name] for name in NAMES}, seconds=seconds, least_rounds=5)
    del runs
    gc.collect()
    medians = {name: timing.median for name, timing in times.items()}
    return {"sweep": sweep, "rows": rows, "classes": classes, "threads": threads, "seconds": medians}


if __name__ == "__main__":
    main()
