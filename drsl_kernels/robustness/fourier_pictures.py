"""The single Fourier attack as a picture: how many images each wave fools.

Relies on `attack_run` and matplotlib; `attack_command` relies on it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from .attack_run import Attacked, Subject
from .attack_table import AttackOutcome
from .storage import write_atomically

__all__ = ["draw_heat_map", "heat_map", "heat_map_name"]

_COLUMNS: Final = 3
_PANEL: Final = 3.4  # inches


def heat_map_name(subject: Subject) -> str:
    """The name of a checkpoint's picture, as the names of its parts begin."""
    return f"fourier-{subject.path.stem}-{subject.digest[:12]}.png"


def draw_heat_map(result: Attacked, folder: Path) -> None:
    """Write the picture of a checkpoint, whole or not at all; none where the attack was not run."""
    outcomes = [outcome for outcome in result.table.outcomes if outcome.found is not None]
    if outcomes:
        figure = heat_map(outcomes, result.subject.label)
        write_atomically(folder / heat_map_name(result.subject), partial(figure.savefig, dpi=150))


def heat_map(outcomes: list[AttackOutcome], label: str) -> Figure:
    """The fooling rate of each frequency, one panel for each radius, frequency 0 in the middle, the worst in a ring.

    Args:
        outcomes: of the single Fourier attack on one model, at several radii; one or more.
        label: of the model.
    """
    rates = [_rates(outcome) for outcome in outcomes]
    highest = max(rate.max() for rate in rates)
    columns = min(len(rates), _COLUMNS)
    rows = -(-len(rates) // columns)
    figure = Figure(figsize=(_PANEL * columns + 1.6, _PANEL * rows + 1.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(rates) :]:
        axes.set_visible(False)
    for axes, outcome, rate in zip(grid.flat, outcomes, rates, strict=False):
        image = _panel(axes, outcome, rate, highest or 1.0)
    figure.colorbar(image, ax=grid, label="images whose prediction changes, %", shrink=0.9)
    figure.supxlabel("m: waves from left to right", fontsize=10)
    figure.supylabel("l: waves from top to bottom", fontsize=10)
    figure.suptitle(f"Single Fourier attack: which waves fool\n{label}", fontsize=11)
    return figure


def _rates(outcome: AttackOutcome) -> np.ndarray:
    """In %, frequency 0 in the middle."""
    found = outcome.found or {}
    rates: np.ndarray = np.fft.fftshift(100 * np.array(found["fooled"]) / found["samples"])
    return rates


def _panel(axes: Axes, outcome: AttackOutcome, rates: np.ndarray, highest: float) -> AxesImage:
    found = outcome.found or {}
    (up, left), (height, width) = (-(size // 2) - 0.5 for size in rates.shape), rates.shape
    extent = (left, left + width, up + height, up)
    image = axes.imshow(rates, extent=extent, vmin=0, vmax=highest, cmap="viridis")
    l, m = found["frequency"]  # noqa: E741
    axes.plot(m, l, marker="o", markersize=9, markerfacecolor="none", markeredgecolor="#D55E00", markeredgewidth=1.8)
    axes.set_title(
        f"eps {outcome.eps:.4g}; worst ({l}, {m}): {rates.max():.1f} %\nof {found['samples']} images, the worse sign",
        fontsize=9,
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    return image
