"""Times the CPU kernels of two commits against each other: `python benchmarks/compare_kernels.py COMMIT [COMMIT]`.

Builds each commit in a folder of its own, then runs compare_kernels.cpp: interleaved in one process, nanoseconds per
logit and thread, and the median ratio of the second commit (the working tree, unless it is named) to the first. Relies
on `machine` and `contenders`.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import click
from contenders import SHAPES
from machine import where, write
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
ENTRY = """
#include "cpu/kernels.h"
extern "C" __attribute__((visibility("default"))) const drsl::Kernels* drsl_kernels_for(const char* name) {
  return drsl::kernels_for(name);
}
"""
WORKS = [("float32", "gradient"), ("bfloat16", "gradient"), ("float32", "loss")]


@click.command()
@click.argument("before")
@click.argument("after", required=False)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the medians to this JSON file.")
@click.option("--threads", default=2, show_default=True, help="Threads among which the rows are divided.")
@click.option("--seconds", default=1.0, show_default=True, help="Time spent on each line.")
@click.option("--isa", "isas", multiple=True, default=["avx512", "avx2"], show_default=True, help="Instruction sets.")
def main(before: str, after: str | None, out: Path | None, threads: int, seconds: float, isas: tuple[str, ...]) -> None:
    """Time the kernels of commit BEFORE against those of AFTER, or of the working tree."""
    with tempfile.TemporaryDirectory() as folder:
        libraries = [build(commit, Path(folder) / str(i)) for i, commit in enumerate((before, after))]
        program = Path(folder) / "compare"
        source = ROOT / "benchmarks" / "compare_kernels.cpp"
        _call("c++", "-O2", "-std=c++20", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program), "-ldl", "-pthread")
        lines = [(isa, *shape, *work) for isa in isas for shape in SHAPES for work in WORKS]
        rows: list[dict[str, Any]] = []
        for isa, n, classes, dtype, work in track(lines, description="timing"):
            command = [program, isa, threads, seconds, n, classes, dtype, work, *libraries]
            printed = _call(*map(str, command)).split("\n")
            (first, _), (second, ratio) = [map(float, line.split()) for line in printed[:2]]
            line = {"isa": isa, "rows": n, "classes": classes, "dtype": dtype, "work": work}
            rows.append(line | {"before": first, "after": second, "ratio": ratio})
    Console(width=100).print(table(rows))
    if out is not None:
        write(out, {"before": before, "after": after or "working tree", "threads": threads, **where(), "rows": rows})


def build(commit: str | None, folder: Path) -> Path:
    """The kernels of a commit, or of the working tree, as a library with one function."""
    folder.mkdir()
    source = ROOT
    if commit is not None:
        source = folder / "source"
        source.mkdir()
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "x", "-C", source], input=archive, check=True)
    made = folder / "build"
    _call("cmake", "-S", str(source), "-B", str(made), "-G", "Ninja", "-DDRSL_BUILD_EXTENSION=OFF")
    _call("cmake", "--build", str(made), "--target", "drsl_cpu")
    (folder / "entry.cpp").write_text(ENTRY)
    library = folder / "kernels.so"
    parts = ["-shared", "-fPIC", f"-I{source / 'csrc'}", str(folder / "entry.cpp"), str(made / "libdrsl_cpu.a")]
    _call("c++", "-O2", "-std=c++20", *parts, "-o", str(library))
    return library


def table(rows: list[dict[str, Any]]) -> Table:
    """A line per shape, format and kind of work."""
    result = Table(title="Nanoseconds per logit and thread")
    for column in ("logits", "dtype", "work", "kernels", "before", "after", "ratio"):
        result.add_column(column, justify="left" if column in ("dtype", "work", "kernels") else "right")
    for row in rows:
        shape = f"{row['rows']}x{row['classes']}"
        numbers = [f"{row[name]:.3f}" for name in ("before", "after", "ratio")]
        result.add_row(shape, row["dtype"], row["work"], row["isa"], *numbers)
    return result


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise click.ClickException(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
