"""Pictures of what `insight` found: the softmax distance of images that an attack broke, features in a plane.

Relies on `experiment`, matplotlib and SciPy; `pictures` relies on it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from .experiment import Comparison
from .losses import TrainingLoss

__all__ = ["attack_correlation", "distance_and_attack", "feature_planes_picture"]

_SURVIVED, _BROKEN = "#56B4E9", "#D55E00"
_SMALLEST: Final = 1e-30  # distances are drawn on a logarithmic axis


def attack_correlation(comparison: Comparison, loss: TrainingLoss) -> float | None:
    """Spearman's rank correlation, over images and seeds, of an image's distance and its being broken (1) or not (0).

    Misclassified images count as broken. None where all images, or all distances, are alike.
    """
    distances, broken = _distances(comparison, loss)
    if len(np.unique(distances)) < 2 or len(np.unique(broken)) < 2:
        return None
    return float(spearmanr(distances, broken).statistic)


def distance_and_attack(comparison: Comparison) -> Figure:
    """Histograms of the distance, of images that survived the attack and of those that did not."""
    losses = comparison.losses
    columns = min(len(losses), 2)
    rows = -(-len(losses) // columns)
    figure = Figure(figsize=(4.2 * columns + 0.6, 2.6 * rows + 1.0), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for axes in grid.flat[len(losses) :]:
        axes.set_visible(False)
    found = [_distances(comparison, loss) for loss in losses]
    everything = np.maximum(np.concatenate([distances for distances, _ in found]), _SMALLEST)
    bins = np.geomspace(everything.min() / 1.5, everything.max() * 1.5, 41)
    for axes, loss, (distances, broken) in zip(grid.flat, losses, found, strict=False):
        for which, colour, label, style in (
            (~broken, _SURVIVED, "survived the attack", "stepfilled"),
            (broken, _BROKEN, "broken by the attack", "step"),
        ):
            values = np.maximum(distances[which], _SMALLEST)
            axes.hist(values, bins=bins, histtype=style, color=colour, alpha=0.8, linewidth=1.8, label=label)
        rank = attack_correlation(comparison, loss)
        axes.set_title(f"{loss}: " + ("all alike" if rank is None else f"rank correlation {rank:+.2f}"), fontsize=10)
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    figure.supxlabel("distance of the wrong classes' softmax\nfrom their average, before the attack", fontsize=9)
    figure.supylabel("images", fontsize=9)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    eps = comparison.settings.judging.histogram_eps()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, title=f"attack within eps {eps:g}")
    return figure


def feature_planes_picture(comparison: Comparison) -> Figure:
    """Features of the first seed's models: a row per loss, a column per method; colours are classes."""
    runs = [comparison.of(loss)[0] for loss in comparison.losses]
    methods = [plane.method for plane in runs[0].planes]
    figure = Figure(figsize=(4.2 * max(len(methods), 1), 3.4 * len(runs) + 0.6), layout="constrained")
    if not methods:
        figure.text(0.5, 0.5, "too few images for a plane", ha="center")
        return figure
    grid = figure.subplots(len(runs), len(methods), squeeze=False)
    for row, run in zip(grid, runs, strict=True):
        for axes, plane in zip(row, run.planes, strict=True):
            for points, marker, size in ((plane.clean, "o", 14), (plane.attacked, "x", 18)):
                across, up = np.array(points).T
                axes.scatter(across, up, c=plane.labels, cmap="tab10", marker=marker, s=size, linewidths=1)
            axes.set_title(f"{run.loss}: {plane.method}", fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
    eps = comparison.settings.judging.histogram_eps()
    figure.suptitle(f"Features of images (dots)\nand of the same after the attack, eps {eps:g} (crosses)", fontsize=10)
    return figure


def _distances(comparison: Comparison, loss: TrainingLoss) -> tuple[np.ndarray, np.ndarray]:
    runs = comparison.of(loss)
    distances = np.concatenate([np.array(run.distances, dtype=float) for run in runs])
    radius = comparison.settings.judging.epsilons.index(comparison.settings.judging.histogram_eps())
    survived = np.concatenate([np.array(run.survived(radius), dtype=bool) for run in runs])
    return distances, ~survived
