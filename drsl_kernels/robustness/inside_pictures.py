"""Pictures of what `insight` found: the softmax distance of images that an attack broke, features in a plane.

Images that are wrong without an attack are left out: none broke them. Relies on `experiment`, matplotlib and SciPy;
`pictures` and `page` rely on it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from .experiment import Comparison
from .judging import RunResult
from .losses import TrainingLoss
from .mean_std import MeanStd

__all__ = ["attack_correlation", "distance_and_attack", "feature_planes_picture", "telling_radius"]

_SURVIVED, _BROKEN = "#56B4E9", "#D55E00"
_SMALLEST: Final = 1e-30  # distances are drawn on a logarithmic axis


def telling_radius(comparison: Comparison) -> int:
    """Index of the radius at which the attacks break nearest to half of the images, in the mean over all runs.

    Where nearly all or none are broken there is little to relate to their distances.
    """
    radii = range(len(comparison.settings.judging.epsilons))
    shares = [[_broken(run, radius).mean() for run in comparison.runs if any(run.right())] for radius in radii]
    return min(radii, key=lambda radius: abs(float(np.mean(shares[radius] or 0)) - 0.5))


def attack_correlation(comparison: Comparison, loss: TrainingLoss) -> MeanStd | None:
    """Spearman's rank correlation of an image's distance and its being broken (1) or not (0) at `telling_radius`.

    Over the images of each seed; mean and spread over the seeds. None where in all of them the images, or the
    distances, are alike.
    """
    radius = telling_radius(comparison)
    ranks = []
    for run in comparison.of(loss):
        distances, broken = _distances(run), _broken(run, radius)
        if len(np.unique(distances)) > 1 and len(np.unique(broken)) > 1:
            ranks.append(float(spearmanr(distances, broken).statistic))
    return MeanStd.of(ranks) if ranks else None


def distance_and_attack(comparison: Comparison) -> Figure:
    """Histograms of the distance, of images that survived the attack and of those that did not."""
    losses = comparison.losses
    columns = min(len(losses), 2)
    rows = -(-len(losses) // columns)
    figure = Figure(figsize=(4.2 * columns + 0.6, 2.6 * rows + 1.0), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for axes in grid.flat[len(losses) :]:
        axes.set_visible(False)
    radius = telling_radius(comparison)
    found = [[(_distances(run), _broken(run, radius)) for run in comparison.of(loss)] for loss in losses]
    everything = np.maximum(np.concatenate([distances for runs in found for distances, _ in runs]), _SMALLEST)
    if not len(everything):
        figure.text(0.5, 0.5, "no image is right without an attack", ha="center")
        return figure
    bins = np.geomspace(everything.min() / 1.5, everything.max() * 1.5, 41)
    for axes, loss, runs in zip(grid.flat, losses, found, strict=False):
        distances, broken = (np.concatenate(parts) for parts in zip(*runs, strict=True))
        for which, colour, label, style in (
            (~broken, _SURVIVED, "survived the attack", "stepfilled"),
            (broken, _BROKEN, "broken by the attack", "step"),
        ):
            values = np.maximum(distances[which], _SMALLEST)
            axes.hist(values, bins=bins, histtype=style, color=colour, alpha=0.8, linewidth=1.8, label=label)
        rank = attack_correlation(comparison, loss)
        said = "all alike" if rank is None else f"rank correlation {rank.signed()}"
        axes.set_title(f"{loss}: {said}", fontsize=10)
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    figure.supxlabel("distance of the wrong classes' softmax\nfrom their average, before the attack", fontsize=9)
    figure.supylabel("images", fontsize=9)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    eps = comparison.settings.judging.epsilons[radius]
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
    classes = sorted({label for run in runs for label in run.planes[0].labels})
    for row, run in zip(grid, runs, strict=True):
        for axes, plane in zip(row, run.planes, strict=True):
            right, labels = np.array(run.right()[: len(plane.labels)]), np.array(plane.labels)
            for points, marker, size in ((plane.clean, "o", 14), (plane.attacked, "x", 18)):
                for k in classes:
                    across, up = np.array(points)[right & (labels == k)].T
                    style = {"color": f"C{k % 10}", "marker": marker, "s": size, "linewidths": 1}
                    axes.scatter(across, up, label=str(k) if marker == "o" else None, **style)
            axes.set_title(f"{run.loss}: {plane.method}", fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
    eps = comparison.settings.judging.histogram_eps()
    words = f"Features of images (dots)\nand of the same after the attack within eps {eps:g} (crosses)"
    figure.suptitle(words, fontsize=10)
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=10, title="class", fontsize=8)
    return figure


def _distances(run: RunResult) -> np.ndarray:
    return np.array([distance for distance, right in zip(run.distances, run.right(), strict=True) if right])


def _broken(run: RunResult, radius: int) -> np.ndarray:
    survived = zip(run.survived(radius), run.right(), strict=True)
    return np.array([not survives for survives, right in survived if right], dtype=bool)
