"""What the suite leaves besides results.json: a CSV, pictures, and the table of targets held against the figures.

Relies on `store` and, for the pictures, on matplotlib; `gpu_suite` relies on it.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .store import COPY, FORWARD_BACKWARD, PLAIN_BASE, WHOLE_LOGITS

Row = dict[str, Any]

DRY_RUN = "DRY RUN ON THE CPU: these figures mean nothing"
COPY_LIMIT, EAGER_LIMIT = 1.25, 0.7
# Over whole logits. With a large vocabulary the memory is mostly that of the weight's gradient in float32, half of what
# the logits take with theirs.
LINEAR_LIMIT, LINEAR_MEMORY_LIMIT = 1.1, 0.6
LARGE_VOCABULARY = 128256
BACKENDS = {"": "default", " triton": "triton", " cuda": "cuda"}  # suffix of the contender -> column

# Target -> what the names of its tests contain.
TESTED = {
    "no host synchronisation": "without_synchronising",
    "CUDA-graph capturable": "cuda_graph",
    "bit-identical over 100 runs": "bit_identical",
}


def write_csv(results: Row, path: Path) -> None:
    """One line per case, work and contender; times in microseconds."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        bases = [f"over {PLAIN_BASE}", f"over {COPY}"]
        facts = ["regime", "rows", "classes", "dtype"]
        writer.writerow(["dry_run", *facts, "work", "contender", "q1_us", "median_us", "q3_us", "samples", *bases])
        for case in measured(results):
            for work, times in case["works"].items():
                for name, t in times.items():
                    microseconds = [f"{1e6 * t[key]:.3f}" for key in ("q1", "median", "q3")]
                    ratios = [f"{t[base]:.4f}" if base in t else "" for base in bases]
                    line = [results["dry_run"], *(case[f] for f in facts), work, name, *microseconds, t["samples"]]
                    writer.writerow(line + ratios)


def write_linear_csv(results: Row, path: Path) -> None:
    """One line per vocabulary and contender; times in milliseconds, memory in MiB."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        facts, times = ["tokens", "width", "classes", "dtype"], ["q1_ms", "median_ms", "q3_ms"]
        writer.writerow(["dry_run", *facts, "contender", *times, "samples", f"over {WHOLE_LOGITS}", "peak_mib"])
        for case in measured_linear(results):
            for name, t in case["times"].items():
                milliseconds = [f"{1e3 * t[key]:.3f}" for key in ("q1", "median", "q3")]
                ratio = f"{t[f'over {WHOLE_LOGITS}']:.4f}" if f"over {WHOLE_LOGITS}" in t else ""
                peak = case["peak_bytes"][name]
                line = [results["dry_run"], *(case[f] for f in facts), name, *milliseconds, t["samples"], ratio]
                writer.writerow([*line, "" if peak is None else f"{peak / 2**20:.1f}"])


def measured_linear(results: Row) -> list[Row]:
    return [case for case in results.get("linear", {}).get("cases", []) if case.get("times")]


def measured(results: Row) -> list[Row]:
    return [case for case in results.get("bench", {}).get("cases", []) if case.get("works")]


def targets(results: Row) -> list[Row]:
    """Each speed target with its measured figure, for backend=None and for each backend by name."""
    cases = measured(results)
    latency = [case for case in cases if case["regime"] == "latency"]
    bandwidth = [case for case in cases if case["regime"] == "bandwidth"]
    rows = []
    for dtype in ("float32", "bfloat16"):
        large = [case for case in bandwidth if case["dtype"] == dtype]
        rows.append(_row(f"{dtype}, large: over the copy", COPY_LIMIT, large, _over("", COPY)))
        rows.append(_row(f"{dtype}, large, plain: over the fastest peer", 1.0, large, _over_fastest_peer))
    for case in latency:
        rows.append(_row(f"{case['name']}: over {PLAIN_BASE}", EAGER_LIMIT, [case], _over("", PLAIN_BASE)))
    counted = [case for case in cases if case.get("launches") and case["regime"] == "latency"]
    rows.append(_row(f"launches less those of {PLAIN_BASE}", -1, counted, _launches_less))
    rows += _linear_targets(measured_linear(results))
    return rows + [_tested(results, target, word) for target, word in TESTED.items()]


def _linear_targets(cases: list[Row]) -> list[Row]:
    large = [case for case in cases if case["classes"] >= LARGE_VOCABULARY]
    return [
        _row(f"linear: time over {WHOLE_LOGITS}", LINEAR_LIMIT, cases, _linear_time),
        _row("linear, plain: time over the fastest peer", 1.0, cases, _linear_over_peer),
        _row(f"linear, large: memory over {WHOLE_LOGITS}", LINEAR_MEMORY_LIMIT, large, _linear_memory),
    ]


def _row(target: str, limit: float, cases: list[Row], figure: Callable[[Row, str], float | None]) -> Row:
    """The largest figure over the cases decides."""
    row: Row = {"target": target, "limit": limit}
    for suffix, column in BACKENDS.items():
        figures = {case["name"]: value for case in cases if (value := figure(case, suffix)) is not None}
        worst = max(figures, key=lambda name: figures[name], default=None)
        row[column] = None if worst is None else round(figures[worst], 3)
        row[f"{column} at"] = worst if len(cases) > 1 else None
    row["met"] = None if row["default"] is None else row["default"] <= limit
    return row


def _over(kind: str, base: str) -> Callable[[Row, str], float | None]:
    def figure(case: Row, suffix: str) -> float | None:
        time = case["works"].get(FORWARD_BACKWARD, {}).get(f"drsl{suffix}{kind}")
        ratio: float | None = time and time.get(f"over {base}")
        return ratio

    return figure


def _over_fastest_peer(case: Row, suffix: str) -> float | None:
    times = case["works"].get(FORWARD_BACKWARD, {})
    peers = (PLAIN_BASE, f"compiled {PLAIN_BASE}", "liger", "quack")
    there = [times[name]["median"] for name in peers if name in times and name not in case["disagrees"]]
    ours = times.get(f"drsl{suffix} plain")
    return ours["median"] / min(there) if ours and there else None


def _linear_time(case: Row, suffix: str) -> float | None:
    ratio: float | None = case["times"].get(f"drsl{suffix}", {}).get(f"over {WHOLE_LOGITS}")
    return ratio


def _linear_over_peer(case: Row, suffix: str) -> float | None:
    """Of those that do not store the logits."""
    times = case["times"]
    peers = ("F.linear_cross_entropy, chunked", "liger", "cut-cross-entropy")
    there = [times[name]["median"] for name in peers if name in times and name not in case["disagrees"]]
    ours = times.get(f"drsl{suffix} plain")
    return ours["median"] / min(there) if ours and there else None


def _linear_memory(case: Row, suffix: str) -> float | None:
    peaks = case["peak_bytes"]
    ours, whole = peaks.get(f"drsl{suffix}"), peaks.get(WHOLE_LOGITS)
    return ours / whole if ours is not None and whole else None


def _launches_less(case: Row, suffix: str) -> float | None:
    counts = case["launches"]
    return counts[f"drsl{suffix}"] - counts[PLAIN_BASE] if f"drsl{suffix}" in counts else None


def _tested(results: Row, target: str, word: str) -> Row:
    """Met where all tests whose name contains the word passed, on each backend; figures are numbers of tests."""
    tests = [t for t in results.get("test", {}).get("tests", []) if word in t["name"]]
    row: Row = {"target": target, "limit": "tests pass", "default": None}
    for column in ("triton", "cuda"):
        mine = [t["outcome"] for t in tests if f"[{column}" in t["name"]]
        row[column] = f"{mine.count('passed')}/{len(mine)}" if mine else None
    outcomes = {t["outcome"] for t in tests}
    row["met"] = None if not outcomes or outcomes == {"skipped"} else outcomes == {"passed"}
    return row


def table(rows: Iterable[Row], dry_run: bool) -> str:
    """The targets as text. A dry run meets and misses nothing."""
    heads = ("target", "limit", *BACKENDS.values(), "met", "worst at")
    lines = [heads]
    for row in rows:
        met = "dry run" if dry_run else {True: "met", False: "NOT MET", None: "not measured"}[row["met"]]
        cells = [row["target"], row["limit"], *(row[c] for c in BACKENDS.values()), met, row.get("default at")]
        lines.append(tuple("-" if cell is None else str(cell) for cell in cells))
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def draw(results: Row, out: Path) -> list[str]:
    """One picture per regime. Names of the files, none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None or not measured(results):
        return []
    import matplotlib

    matplotlib.use("agg")
    drawn = []
    for regime, base in (("latency", PLAIN_BASE), ("bandwidth", COPY)):
        cases = [case for case in measured(results) if case["regime"] == regime]
        if cases:
            _draw_regime(results, regime, base, cases, out / f"{regime}.png")
            drawn.append(f"{regime}.png")
    return drawn


def _draw_regime(results: Row, regime: str, base: str, cases: list[Row], path: Path) -> None:
    """Time over that of `base`, one panel per dtype, one line per contender, sizes side by side."""
    from matplotlib import pyplot as plt

    dtypes = sorted({case["dtype"] for case in cases}, reverse=True)
    figure, axes = plt.subplots(1, len(dtypes), figsize=(6.5 * len(dtypes), 5), sharey=True, squeeze=False)
    names = sorted({name for case in cases for name in case["works"][FORWARD_BACKWARD]}, key=_order)
    styles = dict(zip(names, ["-o", "--s", ":^", "-.D"] * len(names), strict=False))
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        mine = sorted((c for c in cases if c["dtype"] == dtype), key=lambda c: (c["classes"], c["rows"]))
        for name in names:
            ratios = [c["works"][FORWARD_BACKWARD].get(name, {}).get(f"over {base}", float("nan")) for c in mine]
            axis.plot(range(len(mine)), ratios, styles[name], label=name, linewidth=2.5 if "drsl" in name else 1.2)
        axis.set_xticks(range(len(mine)), [f"{c['rows']}x{c['classes']}" for c in mine], rotation=30, ha="right")
        axis.set_title(dtype)
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel(f"time of {FORWARD_BACKWARD} over {base}")
    axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(DRY_RUN if results["dry_run"] else f"{regime}, {results['machine']['gpu']}, {results['date'][:10]}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _order(name: str) -> tuple[bool, str]:
    return not name.startswith("drsl"), name


def summary_of_kernels(kernels: Iterable[Row]) -> list[Row]:
    """Per profiled kernel: time, achieved bandwidth, registers."""
    rows = []
    for kernel in kernels:
        m = kernel["metrics"]
        moved = sum(m.get(f"dram__bytes_{way}.sum", 0) for way in ("read", "write"))
        nanoseconds = m.get("gpu__time_duration.sum")
        rows.append(
            {
                "case": kernel["case"],
                "kernel": kernel["kernel"][:60],
                "microseconds": nanoseconds and nanoseconds / 1e3,
                "gb_per_s": nanoseconds and moved / nanoseconds,
                "registers": m.get("launch__registers_per_thread"),
            }
        )
    return rows
