"""Time against `F.cross_entropy`, interleaved in one process: `python benchmarks/ratios.py --out FILE.json`.

Prints a table and writes every median with the machine, versions, commit and date. Relies on `contenders` and
`interleaved`.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from contenders import SHAPES, TAU, Run, evaluation, forward_backward
from interleaved import Timing, interleave
from rich.console import Console
from rich.table import Table

import drsl_kernels

OURS = ("uniform", "non_target_logits")


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write all medians to this JSON file.")
@click.option("--threads", default=2, show_default=True, help="Threads that torch may use.")
@click.option("--seconds", default=3.0, show_default=True, help="Time spent on each shape and kind of work.")
@click.option("--shapes", default=len(SHAPES), show_default=True, help="How many of the shapes, from the first.")
def main(out: Path | None, threads: int, seconds: float, shapes: int) -> None:
    """Time the fused loss against F.cross_entropy without a penalty."""
    torch.set_num_threads(threads)
    rows = []
    for n, classes in SHAPES[:shapes]:
        rows.append(_measure("forward+backward", n, classes, forward_backward(n, classes), seconds))
        rows.append(_measure("no_grad", n, classes, evaluation(n, classes), seconds / 2))
    Console(width=120).print(_table(rows))
    if out is not None:
        _write(out, {"tau": TAU, "threads": threads, **_where(), "rows": rows})


def _measure(work: str, rows: int, classes: int, runs: dict[str, Run], seconds: float) -> dict[str, Any]:
    times = interleave(runs, seconds=seconds)
    base = times["F.cross_entropy"].median
    return {
        "work": work,
        "rows": rows,
        "classes": classes,
        "seconds": {name: asdict(t) for name, t in times.items()},
        "ratio": {name: times[name].median / base for name in OURS if name in times},
        "over_clone": _over_clone(times),
    }


def _over_clone(times: dict[str, Timing]) -> float | None:
    return times["uniform"].median / times["clone"].median if "clone" in times else None


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Time as a ratio to F.cross_entropy (no penalty), float32, medians of interleaved runs")
    for column in ("work", "logits", "F.cross_entropy", "uniform", "non_target_logits", "uniform / clone"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for row in rows:
        base = row["seconds"]["F.cross_entropy"]["median"]
        ratio = row["ratio"]
        table.add_row(
            row["work"],
            f"{row['rows']}x{row['classes']}",
            f"{base * 1e6:,.1f} us",
            f"{ratio['uniform']:.2f}",
            f"{ratio['non_target_logits']:.2f}" if "non_target_logits" in ratio else "",
            f"{row['over_clone']:.2f}" if row["over_clone"] else "",
        )
    return table


def _where() -> dict[str, Any]:
    root = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "processor": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "drsl_kernels": str(drsl_kernels.info()),
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    """Through a temporary file beside it, so that a broken-off run never leaves half a result."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main()
