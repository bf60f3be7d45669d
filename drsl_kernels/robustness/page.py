"""The outcome of a comparison as a page to read: Markdown, and HTML in one file with every picture inside.

Relies on `report` and `page_parts`, and on `pictures` for what was drawn; `compare_command` relies on it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

from .attack_names import eps_names
from .detection_report import detection_rows, detection_words
from .experiment import Comparison
from .identity import environment
from .inside_pictures import attack_correlation, telling_radius
from .insight import PLANE_IMAGES
from .judging import LISTED
from .loss_names import BASELINE
from .losses import TrainingLoss
from .mean_std import MeanStd
from .page_parts import STYLE, html_figure, html_list, html_table, markdown_table
from .pictures import PICTURES
from .report import accuracies, explanation, felled_by, time_rows
from .storage import write_text

__all__ = ["PAGES", "write_pages"]

PAGES: Final = ("report.md", "report.html")

_DETECTION: Final = "Are abnormal images found?"

_CAPTIONS: Final = {
    "robust_accuracy.png": "Accuracy against the size of the perturbation.",
    "second_largest_softmax.png": "The second largest softmax value of each image, before and after the attack.",
    "distance_and_attack.png": "Distance of the wrong classes' softmax from their average, of images that the attack "
    "broke and of those that it did not.",
    "feature_planes.png": "What the network sees: features of images and of their attacked twins, reduced to a plane.",
    "training_curves.png": "Training, epoch by epoch.",
}


@dataclass(frozen=True)
class _Page:
    """What both formats say."""

    title: str
    sober: list[str]
    felled: list[str]
    checks: list[str]
    head: list[str]
    rows: list[list[str]]
    meaning: list[str]
    detection: list[list[str]]
    detected: list[str]
    captions: dict[str, str]


def write_pages(comparison: Comparison, folder: Path) -> None:
    """Write `PAGES` into the folder that holds the pictures already, each whole or not at all."""
    page = _page(comparison)
    for name, text in zip(PAGES, (_markdown(page), _html(page, folder)), strict=True):
        write_text(folder / name, text)


def _page(comparison: Comparison) -> _Page:
    losses = comparison.losses
    columns = [accuracies(comparison.of(loss)) for loss in losses]
    names = ["clean", *(f"robust, eps {name}" for name in eps_names(comparison.settings.judging.epsilons))]
    rows = [
        [name, *(value.percent() for value in values)]
        for name, values in zip(names, zip(*columns, strict=True), strict=True)
    ]
    rows += time_rows(comparison, losses)
    ranks = [attack_correlation(comparison, loss) for loss in losses]
    at = f"{_looked_at(comparison, LISTED)}, eps {_telling_eps(comparison):.4g}"
    rows.append(
        [f"distance and being broken, rank correlation ({at})", *("" if r is None else r.signed() for r in ranks)]
    )
    software = "; ".join(f"{what} {value}" for what, value in environment().items())
    meaning = [f"{what}: {words}" for what, words in explanation(comparison).items()]
    return _Page(
        title=f"Accuracy of {comparison.settings.training.dataset} classifiers under attack",
        sober=list(_sober(comparison)),
        felled=list(_felled(comparison)),
        checks=[f"{finding.outcome}: {finding.in_words()}" for finding in comparison.findings()],
        head=["trained with", *map(str, losses)],
        rows=rows,
        meaning=[*meaning, *_comparing(comparison), f"made with: {software}"],
        detection=detection_rows(comparison),
        detected=detection_words(comparison),
        captions=_captions(comparison),
    )


def _looked_at(comparison: Comparison, most: int) -> str:
    """Of which images of each model single values are kept."""
    images = comparison.runs[0].images
    some = f"all {images} images" if images <= most else f"the first {most} of {images} images"
    return f"those of {some} that are right without an attack"


def _telling_eps(comparison: Comparison) -> float:
    return comparison.settings.judging.epsilons[telling_radius(comparison)]


def _captions(comparison: Comparison) -> dict[str, str]:
    """What the pictures show, and of how many images, after an attack of which radius."""
    judging = comparison.settings.judging
    within = f"; the attack is within eps {judging.histogram_eps():.4g}"
    if judging.histogram_eps() > judging.epsilons[0]:
        within += ", and an image that fell at a smaller one is shown as it fell"
    listed, plane = (f" Of {_looked_at(comparison, most)}" for most in (LISTED, PLANE_IMAGES))
    looked_at = {
        "second_largest_softmax.png": f"{listed}{within}.",
        "distance_and_attack.png": f"{listed}; the attack is within eps {_telling_eps(comparison):.4g}, where it broke "
        "nearest to half of them.",
        "feature_planes.png": f"{plane}{within}.",
    }
    return {name: words + looked_at.get(name, "") for name, words in _CAPTIONS.items()}


def _felled(comparison: Comparison) -> Iterator[str]:
    """What each attack broke that those before it had not, up to the radius of the histograms."""
    eps = comparison.settings.judging.histogram_eps()
    for loss in comparison.losses:
        counts: Counter[str] = Counter()
        for run in comparison.of(loss):
            for row in felled_by(comparison, run):
                if row["eps"] <= eps:
                    counts[row["attack"]] += row["images"]
        images = sum(run.images for run in comparison.of(loss))
        said = ", ".join(f"{attack} {100 * count / images:.1f}" for attack, count in counts.items())
        yield f"{loss}, up to eps {eps:.4g}, in % of all images, what each attack broke after those before it: {said}"


def _sober(comparison: Comparison) -> Iterator[str]:
    """What the losses do not do, and why a figure may be too high, in words."""
    if comparison.settings.judging.held_out == "validation":
        yield (
            "These images chose the best epoch of each run, too: compare options with these figures, and print those "
            "of the test images."
        )
    for finding in comparison.findings():
        if finding.outcome == "warning":
            yield f"{finding.in_words()}."
    baseline = _baseline(comparison)
    if baseline is None:
        yield "There is no baseline here: whether a loss helps cannot be told without cross-entropy beside it."
    else:
        for loss in comparison.losses:
            if loss != baseline:
                yield from _against(comparison, loss, baseline)
    if len(comparison.seeds) < 3:
        yield f"{len(comparison.seeds)} seed(s) say little about the spread between trainings: use 3 or more."
    if min(run.robust_accuracy[-1] for run in comparison.runs) > 0.2:
        largest = comparison.settings.judging.epsilons[-1]
        yield (
            f"No model falls below 20 % at the largest eps, {largest:g}: to see that the "
            "attack works, a larger eps should be among those tried, where nothing can survive."
        )


def _comparing(comparison: Comparison) -> Iterator[str]:
    """What counts as a gain, where there is something to compare with."""
    if _baseline(comparison) is not None:
        images = comparison.runs[0].images
        yield (
            "more robust: by more than the two spreads together; each is the standard deviation over seeds and the "
            f"sampling error of accuracy p on n = {images} images, sqrt(p (1 - p) / n), in quadrature"
        )


def _baseline(comparison: Comparison) -> TrainingLoss | None:
    return next((loss for loss in comparison.losses if loss.name == BASELINE), None)


def _against(comparison: Comparison, loss: TrainingLoss, baseline: TrainingLoss) -> Iterator[str]:
    ours, theirs = (accuracies(comparison.of(some)) for some in (loss, baseline))
    images = comparison.runs[0].images
    no_gain = [
        name
        for name, a, b in zip(eps_names(comparison.settings.judging.epsilons), ours[1:], theirs[1:], strict=True)
        if a.mean - b.mean <= _spread(a, images) + _spread(b, images)
    ]
    if no_gain:
        at = ", ".join(no_gain)
        yield f"{loss} is no more robust than {baseline}, within the spread of seeds and images, at eps {at}."
    if ours[0].mean < theirs[0].mean - 0.01:
        yield f"{loss} costs clean accuracy: {ours[0].percent()} % where {baseline} has {theirs[0].percent()} %."


def _spread(value: MeanStd, images: int) -> float:
    """Over seeds, and over draws of so many images: that of a binomial distribution."""
    return math.hypot(value.std or 0.0, math.sqrt(value.mean * (1 - value.mean) / images))


def _markdown(page: _Page) -> str:
    lines = [f"# {page.title}", ""]
    if page.sober:
        lines += ["What to keep in mind first:", "", *(f"- {words}" for words in page.sober), ""]
    lines += markdown_table(page.head, page.rows)
    lines += ["", "In %, but for the last lines.", "", *(f"- {words}" for words in page.meaning), ""]
    for heading, said in _lists(page):
        lines += [f"## {heading}", "", *(f"- {words}" for words in said), ""]
    if page.detection:
        lines += [f"## {_DETECTION}", "", *markdown_table(page.detection[0], page.detection[1:]), ""]
        lines += [*(f"- {words}" for words in page.detected), ""]
    for name in PICTURES:
        lines += [f"![{page.captions[name]}]({name})", ""]
    return "\n".join(lines)


def _lists(page: _Page) -> list[tuple[str, list[str]]]:
    """Headings, and what stands below them."""
    both = [("What broke the images", page.felled), ("Are the figures to be believed?", page.checks)]
    return [(heading, said) for heading, said in both if said]


def _html(page: _Page, folder: Path) -> str:
    figures = "".join(html_figure(folder / name, page.captions[name]) for name in PICTURES)
    lists = "".join(f"<h2>{escape(heading)}</h2>{html_list(said)}" for heading, said in _lists(page))
    if page.detection:
        table = html_table(page.detection[0], page.detection[1:])
        lists += f"<h2>{escape(_DETECTION)}</h2>{table}{html_list(page.detected)}"
    sober = f"<p>What to keep in mind first:</p>{html_list(page.sober)}" if page.sober else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>'
        f"{escape(page.title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(page.title)}</h1>\n{sober}\n"
        f"{html_table(page.head, page.rows)}\n<p>In %, but for the last lines.</p>\n"
        f"{html_list(page.meaning)}\n{lists}\n{figures}\n</body></html>\n"
    )
