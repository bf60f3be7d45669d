"""The comparison of language models as pictures: perplexity and accuracy under each kind of attack, and training.

Relies on `report`, `..picture_parts` and matplotlib; `page` and the command rely on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..picture_parts import legend_below, line_style
from ..storage import write_atomically
from .experiment import LanguageComparison
from .judging import Point
from .losses import LanguageLoss

__all__ = ["PICTURES", "draw_pictures"]

# Names of files, and what they show.
PICTURES: Final[dict[str, str]] = {
    "embedding_attack.png": "The same text under PGD on the vectors of its tokens, against the radius.",
    "substitution.png": "The second halves of the same sequences, against the number of tokens exchanged before them.",
    "training_curves.png": "Training, evaluation by evaluation.",
}

_SIZE: Final = (9.5, 4.2)  # inches


def draw_pictures(comparison: LanguageComparison, folder: Path) -> None:
    """Write `PICTURES` into the folder, each whole or not at all."""
    figures = (
        _attack(comparison, "embedding", "radius, as a share of the mean length of the model's vectors"),
        _attack(comparison, "substitution", "tokens exchanged"),
        _training(comparison),
    )
    for name, figure in zip(PICTURES, figures, strict=True):
        write_atomically(folder / name, partial(figure.savefig, dpi=150))


def _attack(comparison: LanguageComparison, kind: str, size: str) -> Figure:
    """Perplexity and accuracy side by side; `kind` is a field of a result."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    perplexity, accuracy = figure.subplots(1, 2)
    for i, loss in enumerate(comparison.losses):
        runs: list[tuple[Point, ...]] = [getattr(run, kind) for run in comparison.of(loss)]
        sizes = [point.size for point in runs[0]]
        _curve(perplexity, sizes, [[point.perplexity for point in run] for run in runs], i, loss)
        _curve(accuracy, sizes, [[100 * point.accuracy for point in run] for run in runs], i, loss)
    if kind == "embedding":  # where it grows by orders of magnitude
        perplexity.set_yscale("log")
        perplexity.yaxis.set_major_formatter("{x:g}")
    perplexity.set_title("perplexity", fontsize=10)
    accuracy.set_title("next token right, %", fontsize=10)
    accuracy.set_ylim(0, 1.1 * accuracy.get_ylim()[1])
    for axes in (perplexity, accuracy):
        axes.set_xlabel(size)
        axes.grid(alpha=0.3)
    legend_below(figure, perplexity, "trained with")
    return figure


def _training(comparison: LanguageComparison) -> Figure:
    figure = Figure(figsize=_SIZE, layout="constrained")
    train, validation = figure.subplots(1, 2)
    for i, loss in enumerate(comparison.losses):
        runs = [run.rows for run in comparison.of(loss)]
        steps = [float(row.step) for row in runs[0]]
        _curve(train, steps, [[row.train_loss for row in run] for run in runs], i, loss)
        _curve(validation, steps, [[row.validation_bits_per_byte for row in run] for run in runs], i, loss)
    train.set_title("training loss with its penalty, nats per token", fontsize=10)
    validation.set_title("validation part, bits per byte", fontsize=10)
    for axes in (train, validation):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    legend_below(figure, train, "trained with")
    return figure


def _curve(axes: Axes, sizes: Sequence[float], runs: Sequence[Sequence[float]], i: int, loss: LanguageLoss) -> None:
    """The mean over seeds, and the range of the seeds as a band."""
    values, style = np.array(runs), line_style(i)
    axes.plot(sizes, values.mean(axis=0), markersize=4, label=str(loss), **style)
    axes.fill_between(sizes, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.2, linewidth=0)
