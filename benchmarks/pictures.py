"""Pictures of a result of scaling.py: `python benchmarks/pictures.py`. Relies on matplotlib."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
STYLES = {
    "F.cross_entropy": {"color": "tab:gray"},
    "uniform": {"color": "tab:red", "linewidth": 2.0},
    "reference": {"color": "tab:blue", "linestyle": ":"},
    "compiled reference": {"color": "tab:blue"},
    "clone": {"color": "black", "linestyle": "--"},
}
NAMES = {
    "uniform": "fused_drsl_loss",
    "reference": "DRSL in PyTorch",
    "compiled reference": "DRSL, torch.compile",
    "clone": "logits.clone(), the floor",
}


def draw(result: dict[str, Any], folder: Path) -> None:
    """Two files: growth with rows and classes, and the price of every number of classes."""
    plt.rcParams["svg.hashsalt"] = "drsl_kernels"
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _lines(left, [r for r in result["rows"] if r["sweep"] == "rows" and r["threads"] == 2], "rows")
    one = [r for r in result["rows"] if r["sweep"] == "rows" and r["threads"] == 1]
    left.loglog(
        [r["rows"] for r in one],
        [r["seconds"]["uniform"] for r in one],
        color="tab:red",
        linestyle=":",
        label="fused_drsl_loss, one thread",
    )
    left.set(xlabel="rows of 1000 classes", ylabel="seconds, loss and gradient")
    left.legend(fontsize=8)
    _lines(right, [r for r in result["rows"] if r["sweep"] == "classes"], "classes")
    right.set(xlabel="classes of 256 rows")
    figure.savefig(folder / "cpu_growth.png", dpi=110)

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    every = [r for r in result["rows"] if r["sweep"] == "every"]
    for name in ("F.cross_entropy", "uniform", "clone"):
        price = [1e9 * r["seconds"][name] / (r["rows"] * r["classes"]) for r in every]
        left.semilogy([r["classes"] for r in every], price, label=NAMES.get(name, name), **STYLES[name])
    left.set(xlabel="classes", ylabel="nanoseconds per logit, 2 threads")
    left.legend(fontsize=8)
    for isa, counts in result["instructions"].items():
        right.plot([int(c) for c in counts], list(counts.values()), label=f"fused_drsl_loss, {isa}")
    right.set(xlabel="classes", ylabel="instructions per row")
    right.set_ylim(bottom=0)
    if result["instructions"]:
        right.legend(fontsize=8)
    figure.savefig(folder / "cpu_every_class.png", dpi=110)
    plt.close("all")


def _lines(axes: Axes, rows: list[dict[str, Any]], across: str) -> None:
    for name, style in STYLES.items():
        some = [r for r in rows if name in r["seconds"]]
        seconds = [r["seconds"][name] for r in some]
        axes.loglog([r[across] for r in some], seconds, label=NAMES.get(name, name), **style)
    axes.grid(visible=True, which="major", alpha=0.3)


if __name__ == "__main__":
    draw(json.loads((RESULTS / "cpu_scaling.json").read_text()), RESULTS)
