"""The report of a comparison: what it says first, its pictures, and whether a browser shows them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from drsl_kernels.robustness import pictures
from drsl_kernels.robustness.attack_names import AttackParameters
from drsl_kernels.robustness.data import digits
from drsl_kernels.robustness.experiment import Comparison, Settings
from drsl_kernels.robustness.inside_pictures import (
    attack_correlation,
    feature_planes_picture,
    telling_radius,
)
from drsl_kernels.robustness.insight import PLANE_IMAGES, Plane, feature_planes, wrong_class_distances
from drsl_kernels.robustness.judging import Judging, RunResult
from drsl_kernels.robustness.losses import TrainingLoss
from drsl_kernels.robustness.masking import Check
from drsl_kernels.robustness.mean_std import MeanStd
from drsl_kernels.robustness.models import small_cnn
from drsl_kernels.robustness.page import PAGES, write_pages
from drsl_kernels.robustness.pictures import PICTURES, draw_pictures
from drsl_kernels.robustness.recipe import Adversarial, Recipe
from drsl_kernels.robustness.settings import TrainingSettings
from drsl_kernels.robustness.timing import EpochTime, Timed
from drsl_kernels.robustness.training_logs import EpochRow

CE, DRSL = TrainingLoss("ce"), TrainingLoss("non_target_logits", 0.3)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
IMAGES = 40
PASSED = Check("saturation", "passed", "the softmax is 1 on 0.0 % of 40 images", {"saturated": 0.0})


def run(loss: TrainingLoss, seed: int, robust: tuple[float, float], clean: float = 0.9) -> RunResult:
    """What a run might leave behind; numbers differ a little from seed to seed."""
    random = np.random.default_rng(seed)
    points = tuple((float(a), float(b)) for a, b in random.normal(size=(IMAGES, 2)))
    row = EpochRow(1, 0.002, 1.0, 0.9, None if loss.tau == 0 else 0.3, 0.8, 1.0, 0.7, None, 0.1)
    fell = [(-1, -1, 0), (0, 0, 1), (1, 1, 2), (2, -1, 0)]
    return RunResult(
        loss=loss,
        seed=seed,
        images=IMAGES,
        clean_accuracy=clean + seed / 1000,
        robust_accuracy=(robust[0] + seed / 1000, robust[1] + seed / 1000),
        epochs=(row, replace(row, epoch=2, train_loss=0.8)),
        best_epoch=2,
        fell=tuple(fell[i] for i in random.integers(0, 4, IMAGES)),
        second_largest_before=tuple(random.uniform(0, 0.1, IMAGES).tolist()),
        second_largest_after=tuple(random.uniform(0, 0.5, IMAGES).tolist()),
        distances=tuple((10 ** random.uniform(-6, -1, IMAGES)).tolist()),
        planes=(Plane("PCA", points, points, (0, 1) * (IMAGES // 2)),),
    )


def comparison(ours: tuple[float, float] = (0.6, 0.1), clean: float = 0.9, seeds: int = 3) -> Comparison:
    runs = [run(CE, seed, (0.4, 0.1)) for seed in range(seeds)]
    runs += [run(DRSL, seed, ours, clean) for seed in range(seeds)]
    times = {loss: EpochTime(0.01, 1.0) for loss in (CE, DRSL)}
    settings = Settings(judging=Judging(epsilons=(0.1, 0.3)))
    checks = ((PASSED,),) * len(runs)
    timed, threads = Timed(100, 100, 20), (1,) * len(runs)
    return Comparison(settings, (CE, DRSL), tuple(range(seeds)), tuple(runs), checks, times, timed, 0, threads)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    draw_pictures(comparison(), folder)
    write_pages(comparison(), folder)
    return folder


def with_losses(count: int) -> Comparison:
    losses = tuple(TrainingLoss("non_target_logits", tau + 0.125) for tau in range(count))
    runs = tuple(run(loss, 0, (0.6 - loss.tau / 100, 0.1)) for loss in losses)
    times = {loss: EpochTime(0.01, 1.0) for loss in losses}
    return replace(comparison(), losses=losses, seeds=(0,), runs=runs, checks=((PASSED,),) * count, times=times)


@pytest.mark.parametrize("count", [1, 9, 13])
@pytest.mark.parametrize("draw", [pictures._robust_accuracy, pictures._training_curves])
def test_many_losses_can_be_told_apart(count: int, draw: Callable[[Comparison], Figure]) -> None:
    figure = draw(with_losses(count))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert page.y0 <= box.y0 < box.y1 <= page.y1
    for axes in figure.axes:
        assert not axes.get_visible() or box.y1 < axes.get_tightbbox().y0
        assert axes.get_window_extent().height > 0.4 * page.height
    lines = figure.axes[0].lines
    assert len(legend.legend_handles) == len({(line.get_color(), line.get_marker()) for line in lines}) == count
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == count


@pytest.mark.parametrize(
    "draw",
    [
        pictures._robust_accuracy,
        pictures._second_largest_softmax,
        pictures.distance_and_attack,
        pictures.feature_planes_picture,
        pictures._training_curves,
    ],
)
def test_the_words_of_a_narrow_picture_fit(draw: Callable[[Comparison], Figure]) -> None:
    """One loss, so that there is one column."""
    figure = draw(with_losses(1))
    figure.draw_without_rendering()
    for words in [*figure.texts, *(axes.title for axes in figure.axes if axes.get_visible()), *figure.legends]:
        box, page = words.get_window_extent(), figure.bbox
        assert page.x0 <= box.x0 < box.x1 <= page.x1, words


def test_a_single_epoch_is_drawn() -> None:
    found = comparison()
    short = replace(found, runs=tuple(replace(run, epochs=run.epochs[:1], best_epoch=1) for run in found.runs))
    figure = pictures._training_curves(short)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = np.asarray(canvas.buffer_rgba())[::-1]
    for axes in figure.axes[:2]:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]
        x0, y0, x1, y1 = (round(edge) for edge in axes.get_window_extent().extents)
        assert (page[y0:y1, x0:x1, :3] == (230, 159, 0)).all(-1).any(), "the colour of the second loss"


def markdown(folder: Path, found: Comparison) -> str:
    for name in PICTURES:
        (folder / name).write_bytes(b"")
    write_pages(found, folder)
    return (folder / PAGES[0]).read_text()


def test_table(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert "| trained with | ce | non_target_logits tau=0.3 |" in text
    assert "| robust, eps 0.1 | 40.1 ± 0.1 | 60.1 ± 0.1 |" in text
    for name in PICTURES:
        assert f"]({name})" in text


def test_what_a_loss_does_not_do_comes_first(tmp_path: Path) -> None:
    text = markdown(tmp_path, comparison())
    first = text.index(
        "non_target_logits tau=0.3 is no more robust than ce, within the spread of seeds and images, at eps 0.3."
    )
    assert first < text.index("| trained with |")
    assert "costs clean accuracy" not in text
    assert "costs clean accuracy: 85.1 ± 0.1 % where ce has 90.1 ± 0.1 %" in markdown(tmp_path, comparison(clean=0.85))
    assert "no more robust" not in markdown(tmp_path, comparison(ours=(0.6, 0.3)))
    unbroken = replace(comparison(), runs=(run(CE, 0, (0.9, 0.8)), run(DRSL, 0, (0.9, 0.8))), checks=((), ()))
    assert "a larger eps" in markdown(tmp_path, unbroken)
    assert "a larger eps" not in markdown(tmp_path, comparison())
    assert "say little" in markdown(tmp_path, comparison(seeds=1))


@pytest.mark.parametrize(("images", "gains"), [(300, False), (3000, True)])
def test_a_gain_is_more_than_the_choice_of_images_explains(tmp_path: Path, images: int, gains: bool) -> None:
    """That two seeds agree by chance says nothing of it."""
    found = comparison(ours=(0.597, 0.597), seeds=2)
    runs = tuple(
        replace(run, images=images, robust_accuracy=(0.597, 0.597) if run.loss == DRSL else (0.577, 0.579))
        for run in found.runs
    )
    text = markdown(tmp_path, replace(found, runs=runs))
    same = "non_target_logits tau=0.3 is no more robust than ce, within the spread of seeds and images, at eps"
    assert (same in text) == (not gains)
    assert f"sampling error of accuracy p on n = {images} images, sqrt(p (1 - p) / n), in quadrature" in text


def test_warnings_come_first_with_the_number_of_seeds_and_the_worst_sentence(tmp_path: Path) -> None:
    bad, worse = (
        Check("saturation", "warning", f"the softmax is 1 on {share} %", {"saturated": share / 100}) for share in (2, 7)
    )
    found = replace(comparison(), checks=((PASSED,), (bad,), (worse,), (PASSED,), (PASSED,), (PASSED,)))
    text = markdown(tmp_path, found)
    warning = text.index("- ce, saturation: 2 of 3 seeds warn; the softmax is 1 on 7 %.")
    assert warning < text.index("| trained with |")
    assert f"- passed: {DRSL}, saturation: the softmax is 1 on 0.0 % of 40 images" in text
    assert "warning" not in markdown(tmp_path, comparison())


def test_it_says_what_was_done(tmp_path: Path) -> None:
    attack = Adversarial("trades", 8 / 255, 2 / 255, 7)
    training = TrainingSettings("cifar10", "resnet18", recipe=Recipe(3, label_noise=0.4, adversarial=attack))
    judging = Judging((0.1, 0.3), ("square", "pgd"), AttackParameters(steps=7, restarts=2, queries=50), "validation")
    timed = Timed(128, 45000, 5)
    text = markdown(tmp_path, replace(comparison(), settings=Settings(training, judging), timed=timed))
    for words in (
        "# Accuracy of cifar10 classifiers under attack",
        "resnet18 on cifar10, 3 epochs of adam at 0.002 (constant)",
        "adversarial training (trades) with 7 steps of 0.00784 within eps 0.03137 (linf)",
        "40 % of the training labels wrong, those that choose the epoch all right",
        "PGD with 7 steps and 2 random starts on log_odds, Square with 50 queries",
        "median of 5 rounds over 128 of 45000 training images, scaled to all",
        "These images chose the best epoch of each run, too",
        "what each attack broke after those before it: pgd:log_odds ",
    ):
        assert words in text, words
    assert "These images chose" not in markdown(tmp_path, comparison())


def test_radii_that_are_nearly_alike(tmp_path: Path) -> None:
    found = comparison()
    text = markdown(tmp_path, replace(found, settings=Settings(judging=Judging(epsilons=(0.10001, 0.100012)))))
    assert "| robust, eps 0.10001 |" in text
    assert "| robust, eps 0.100012 |" in text


@pytest.mark.parametrize(("images", "said"), [(40, "all 40 images"), (1001, "the first 1000 of 1001 images")])
def test_what_single_values_are_about(tmp_path: Path, images: int, said: str) -> None:
    found = comparison()
    text = markdown(tmp_path, replace(found, runs=tuple(replace(run, images=images) for run in found.runs)))
    of = f"those of {said} that are right without an attack"
    telling = found.settings.judging.epsilons[telling_radius(found)]
    assert f"| distance and being broken, rank correlation ({of}, eps {telling:g}) |" in text
    assert f"before and after the attack. Of {of}; the attack is within eps 0.1.](second_largest_softmax.png)" in text
    assert f"Of {of}; the attack is within eps {telling:g}, where it broke nearest to half of them.](dist" in text


def test_no_times(tmp_path: Path) -> None:
    text = markdown(tmp_path, replace(comparison(), times={}, timed=None))
    assert "| seconds per epoch | not timed | not timed |" in text


def test_no_baseline(tmp_path: Path) -> None:
    found = comparison()
    alone = replace(found, losses=(DRSL,), runs=found.runs[3:], checks=found.checks[3:])
    assert "no baseline" in markdown(tmp_path, alone)


class Images(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.found.append(dict(attrs))
        assert tag not in ("script", "link", "iframe")


def test_html_holds_all_that_it_shows(written: Path) -> None:
    images = Images()
    images.feed((written / "report.html").read_text())
    assert len(images.found) == len(PICTURES)
    assert (written / "report.html").stat().st_size < 5_000_000
    for image in images.found:
        assert (image["src"] or "").startswith("data:image/png;base64,")
        assert image["alt"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_every_picture(written: Path, tmp_path: Path) -> None:
    """Decoded, and with a size on the page."""
    script = """<script>
      addEventListener("load", () => document.body.dataset.sizes = JSON.stringify(
        [...document.images].map(i => i.complete && i.naturalWidth > 0 ? i.getBoundingClientRect().width : 0)));
    </script></body>"""
    page = tmp_path / "page.html"
    page.write_text((written / "report.html").read_text().replace("</body>", script))
    assert CHROMIUM is not None
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path}/x",
    ]
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    sizes = json.loads(done.stdout.partition('data-sizes="')[2].partition('"')[0])
    assert len(sizes) == len(PICTURES)
    assert min(sizes) > 200


def test_correlation() -> None:
    """Of the images that are right before, each seed on its own, at the radius that breaks half of them."""
    found = comparison(seeds=1)
    survives, falls, wrong = (2, -1, 0), (0, 0, 1), (-1, -1, 0)
    ce = replace(found.runs[0], distances=tuple(i / 100 for i in range(IMAGES)), fell=(survives,) * 20 + (falls,) * 20)
    assert attack_correlation(replace(found, runs=(ce,)), CE) == MeanStd(pytest.approx(0.866, abs=1e-3), None)
    alike = replace(ce, fell=(survives,) * IMAGES)
    assert attack_correlation(replace(found, runs=(alike,)), CE) is None

    half = replace(ce, distances=ce.distances[:20], fell=(survives, falls, falls, survives) * 5)
    more = replace(ce, distances=(*half.distances, *(0.0, 0.3) * 10), fell=(*half.fell, *(wrong,) * 20))
    expected, got = (attack_correlation(replace(found, runs=(run,)), CE) for run in (half, more))
    assert got == expected

    moved = replace(ce, seed=1, distances=tuple(1 + d for d in ce.distances))  # apart, but each within itself as before
    both = attack_correlation(replace(found, seeds=(0, 1), runs=(ce, moved)), CE)
    assert both == MeanStd(pytest.approx(0.866, abs=1e-3), pytest.approx(0))

    radii = replace(found.settings, judging=Judging(epsilons=(0.1, 0.3)))
    late = replace(ce, fell=((1, 0, 1),) * 20 + (survives,) * 20)
    assert telling_radius(replace(found, settings=radii, runs=(late,))) == 1
    assert telling_radius(replace(found, settings=radii, runs=(ce,))) == 0


def test_pictures_leave_out_what_is_wrong_without_an_attack() -> None:
    some = comparison(seeds=1).runs[0]
    wrong = tuple(at < 0 for at, _, _ in some.fell)
    assert 0 < sum(wrong) < IMAGES
    told_apart = tuple(0.49 if is_wrong else 0.01 for is_wrong in wrong)
    marked = replace(some, second_largest_before=told_apart, second_largest_after=told_apart)
    found = replace(comparison(seeds=1), losses=(CE,), runs=(marked,))

    (axes,) = pictures._second_largest_softmax(found).axes
    corners = np.concatenate([np.asarray(patch.get_xy()).reshape(-1, 2) for patch in axes.patches])
    assert {round(x, 2) for x, height in corners if height > 1} == {0.0, 0.02}

    (axes,) = feature_planes_picture(found).axes
    assert sum(len(points.get_offsets()) for points in axes.collections) == 2 * (IMAGES - sum(wrong))


def test_nothing_is_right_without_an_attack(tmp_path: Path) -> None:
    found = comparison(seeds=1)
    wrong = replace(found, runs=tuple(replace(run, fell=((-1, -1, 0),) * IMAGES) for run in found.runs))
    draw_pictures(wrong, tmp_path)
    write_pages(wrong, tmp_path)
    assert attack_correlation(wrong, CE) is None


def test_distances() -> None:
    x, y = torch.randn(7, 3), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    model = nn.Linear(3, 4)
    p = torch.cat([model(some) for some in x.split(3)]).double().softmax(1)  # bits depend on the size
    want = [sum((p[i, k] - (1 - p[i, y[i]]) / 3) ** 2 for k in range(4) if k != y[i]) for i in range(7)]
    got = wrong_class_distances(model, x, y, batch_size=3)
    torch.testing.assert_close(got, torch.stack(want).detach(), rtol=1e-9, atol=0)


def test_planes() -> None:
    x, y = digits().held_out_x[:200], digits().held_out_y[:200]
    model = small_cnn(0).train()
    planes = feature_planes(model, x, x + 0.1, y)
    assert model.training
    assert [plane.method for plane in planes] == ["PCA", "t-SNE"]
    for plane in planes:
        assert len(plane.clean) == len(plane.attacked) == len(plane.labels) == PLANE_IMAGES
        assert np.isfinite(plane.clean).all()
    assert feature_planes(model, x, x + 0.1, y) == planes
    assert feature_planes(model, x[:3], x[:3], y[:3]) == ()
