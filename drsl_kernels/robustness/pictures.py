"""The outcome of a comparison as pictures.

Relies on `experiment`, `inside_pictures`, `picture_parts` and matplotlib; `compare_command` and `page` rely on it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .experiment import Comparison
from .inside_pictures import distance_and_attack, feature_planes_picture
from .losses import TrainingLoss
from .picture_parts import legend_below, line_style
from .report import explanation
from .storage import write_atomically

__all__ = ["PICTURES", "draw_pictures"]

PICTURES: Final = (
    "robust_accuracy.png",
    "second_largest_softmax.png",
    "distance_and_attack.png",
    "feature_planes.png",
    "training_curves.png",
)

_BEFORE, _AFTER = "#56B4E9", "#D55E00"


def draw_pictures(comparison: Comparison, folder: Path) -> None:
    """Write `PICTURES` into the folder, each whole or not at all."""
    figures = (
        _robust_accuracy(comparison),
        _second_largest_softmax(comparison),
        distance_and_attack(comparison),
        feature_planes_picture(comparison),
        _training_curves(comparison),
    )
    for name, figure in zip(PICTURES, figures, strict=True):
        write_atomically(folder / name, partial(figure.savefig, dpi=150))


def _robust_accuracy(comparison: Comparison) -> Figure:
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, loss in enumerate(comparison.losses):
        curves = [comparison.accuracy_by_eps(run) for run in comparison.of(loss)]
        values = 100 * np.array([list(curve.values()) for curve in curves])
        axes.errorbar(
            list(curves[0]),
            values.mean(axis=0),
            yerr=values.std(axis=0, ddof=1) if len(values) > 1 else None,
            capsize=3,
            label=str(loss),
            **line_style(i),
        )
    axes.set_xlabel("eps: largest change of a pixel, pixels in [0, 1] (0: no attack)")
    axes.set_ylabel(f"accuracy on {comparison.settings.judging.held_out} images, %")
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.3)
    legend_below(figure, axes, "trained with")
    words = explanation(comparison)
    axes.set_title(f"{words['robust'].split(';')[0]}\n{words['accuracy']}", fontsize=9)
    figure.suptitle("Accuracy under attack")
    return figure


def _second_largest_softmax(comparison: Comparison) -> Figure:
    losses = comparison.losses
    columns = min(len(losses), 2)
    rows = -(-len(losses) // columns)
    figure = Figure(figsize=(4.2 * columns + 0.6, 2.6 * rows + 1.0), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(losses) :]:
        axes.set_visible(False)
    bins = np.linspace(0, 0.5, 26)
    most = max(1, *(sum(sum(run.right()) for run in comparison.of(loss)) for loss in losses))
    eps = comparison.settings.judging.histogram_eps()
    for axes, loss in zip(grid.flat, losses, strict=False):
        runs = comparison.of(loss)
        right = np.concatenate([np.array(run.right(), dtype=bool) for run in runs])
        before = np.concatenate([run.second_largest_before for run in runs])[right]
        after = np.concatenate([run.second_largest_after for run in runs])[right]
        for values, colour, label, style in (
            (before, _BEFORE, "before the attack", "stepfilled"),
            (after, _AFTER, f"after the attack within eps {eps:g}", "step"),
        ):
            axes.hist(
                values,
                bins=bins,
                weights=np.full(len(values), 100 / max(len(values), 1)),
                histtype=style,
                color=colour,
                alpha=0.75 if style == "stepfilled" else 1.0,
                linewidth=1.8,
                label=label,
            )
        axes.set_ylim(50 / most, 200)  # from half an image
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(str(loss), fontsize=10)
        axes.grid(alpha=0.3)
    figure.supxlabel(
        "second largest softmax value of an image\n(0: sure of one class, 0.5: two classes tie)", fontsize=9
    )
    figure.supylabel("images, % (log scale)", fontsize=9)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


def _training_curves(comparison: Comparison) -> Figure:
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels: tuple[Axes, Axes, Axes] = tuple(figure.subplots(1, 3))
    for i, loss in enumerate(comparison.losses):
        logs = [run.epochs for run in comparison.of(loss)]
        epochs = [row.epoch for row in logs[0]]
        _curve(panels[0], epochs, [[row.train_cross_entropy for row in run] for run in logs], i, loss)
        _curve(panels[1], epochs, [[100 * row.train_accuracy for row in run] for run in logs], i, loss)
        if loss.has_distance and loss.tau > 0:
            penalty = [[loss.tau * (row.train_distance or 0.0) for row in run] for run in logs]
            _curve(panels[2], epochs, penalty, i, loss)
    titles = (
        "cross-entropy part of the loss, nats",
        "accuracy, %",
        "penalty part of the loss, tau · distance",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    for axes in (panels[0], panels[2]):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    panels[2].set_visible(bool(panels[2].lines))
    legend_below(figure, panels[0], "on the training images; trained with")
    return figure


def _curve(axes: Axes, epochs: list[int], rows: list[list[float]], i: int, loss: TrainingLoss) -> None:
    """The mean over seeds, and the range of the seeds as a band."""
    values, style = np.array(rows), line_style(i)
    every = max(1, len(epochs) // 7)
    axes.plot(epochs, values.mean(axis=0), markevery=every, markersize=4, label=str(loss), **style)
    axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.2, linewidth=0)
