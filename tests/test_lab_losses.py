"""The losses of the lab that are not cross-entropy with a distance: what they are, over training, and in attacks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import random_labels, random_logits
from click.testing import CliRunner
from torch import Tensor

from drsl_kernels import gce_loss, isce_loss, softmax_loss
from drsl_kernels.robustness import Recipe, TrainingLoss, compare_command
from drsl_kernels.robustness.attack_losses import per_sample
from drsl_kernels.robustness.commands import drsl
from drsl_kernels.robustness.loss_names import ALL_LOSSES, DEFAULT_TAUS, LossName, canonical_loss, default_taus
from drsl_kernels.robustness.settings import TrainingSettings

Z, Y = random_logits(12, 5), random_labels(12, classes=5)

# Each loss as its function of the library, on the rows
FUNCTIONS: dict[str, Any] = {
    "truncated_gce": lambda tau: gce_loss(Z, Y, 0.7, threshold=tau, reduction="none"),
    "isce": lambda tau: isce_loss(Z, Y, tau, reduction="none"),
    "sigsoftmax": lambda tau: softmax_loss(Z, Y, activation="sigsoftmax", reduction="none"),
    "gce": lambda tau: gce_loss(Z, Y, 0.7, reduction="none"),
    "uniform": lambda tau: softmax_loss(Z, Y, distance="uniform", tau=tau, reduction="none"),
    "gce:0.3": lambda tau: gce_loss(Z, Y, 0.3, reduction="none"),
    "truncated_gce:0.3": lambda tau: gce_loss(Z, Y, 0.3, threshold=tau, reduction="none"),
    "gce:0.3+kl": lambda tau: softmax_loss(Z, Y, truth="gce", q=0.3, distance="kl", tau=tau, reduction="none"),
    "mae+uniform": lambda tau: softmax_loss(Z, Y, truth="mae", distance="uniform", tau=tau, reduction="none"),
    "sigsoftmax+conditional": lambda tau: softmax_loss(
        Z, Y, activation="sigsoftmax", distance="conditional", tau=tau, reduction="none"
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_trained_is_what_is_attacked(name: str) -> None:
    loss = TrainingLoss(name, default_taus(name)[-1])
    rows: Tensor = FUNCTIONS[name](loss.tau)
    torch.testing.assert_close(loss(Z, Y).loss, rows.mean())
    torch.testing.assert_close(per_sample(loss)(Z, Y), rows)
    assert loss(Z, Y).correct == (Z.argmax(1) == Y).sum()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("kl", "kl"),
        ("ce+kl", "kl"),
        ("drsl", "uniform"),
        ("gce+drsl", "gce+uniform"),
        ("gce:0.70", "gce"),
        ("gce:5e-1", "gce:0.5"),
        ("gce:0.30000000000000004", "gce:0.30000000000000004"),
        ("truncated_gce:1", "truncated_gce:1"),
        ("gce:.5+ce", None),
        ("gce+", None),
        ("+kl", None),
        ("", None),
    ],
)
def test_names(text: str, name: str | None) -> None:
    if name is None:
        with pytest.raises(ValueError, match=re.escape(f"unknown loss {text!r}; the losses are ce, uniform, ")):
            canonical_loss(text)
    else:
        assert canonical_loss(text) == canonical_loss(name) == name
        assert TrainingLoss(text, default_taus(text)[-1]) == TrainingLoss(name, default_taus(name)[-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl+uniform", "kl takes no distance, got 'kl+uniform'"),
        ("isce+kl", "isce takes no distance"),
        ("gm+kl", "gm takes no distance"),
        ("mae:0.5", "mae takes no exponent, got 'mae:0.5'"),
        ("kl:0.5", "kl takes no exponent, got"),
        ("isce:0.5", "isce takes no exponent (what it takes is tau, as in isce tau=0.5), got 'isce:0.5'"),
    ],
)
def test_what_a_loss_does_not_take(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LossName.parse(text)


@pytest.mark.parametrize("q", ["", "x", "0", "1e-31", "1.5", "nan", "-0.5"])
def test_bad_exponents(q: str) -> None:
    with pytest.raises(ValueError, match=f"q of 'gce:{q}' must be .*, got "):
        LossName.parse(f"gce:{q}")


def test_a_loss_is_no_number() -> None:
    with pytest.raises(ValueError, match="unknown loss 3; the losses are"):
        TrainingLoss(3)  # type: ignore[arg-type]


def test_truncation_begins_with_the_same_exponent() -> None:
    assert TrainingLoss("truncated_gce:0.3", 0.5).at(0, 9) == TrainingLoss("gce:0.3")


def test_exponents_and_distances_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for drawing in ("draw_pictures", "write_pages"):
        monkeypatch.setattr(compare_command, drawing, lambda *_: None)
    options = ["--epochs", "1", "--samples", "20", "--eps", "0.1", "--steps", "1", "--restarts", "1", "--seeds", "1"]
    options += ["--losses", "gce:0.30,gce+kl", "--tau", "gce+kl=1", "--check-images", "0", "--out", str(tmp_path)]
    result = CliRunner().invoke(drsl, ["compare", *options])
    assert result.exit_code == 0, result.output
    assert sorted(run.name for run in (tmp_path / "runs").iterdir()) == ["gce+kl-tau1-seed0", "gce-q0.3-tau0-seed0"]
    found = json.loads((tmp_path / "results.json").read_text())["summary"]
    assert [(row["loss"], row["tau"]) for row in found] == [("gce:0.3", 0), ("gce+kl", 1)]
    best = str(tmp_path / "runs" / "gce+kl-tau1-seed0" / "best.pt")
    options = ["--attacks", "pgd:training", "--eps", "0.1", "--samples", "20", "--check-samples", "0"]
    result = CliRunner().invoke(drsl, ["attack", best, *options, "--out", str(tmp_path / "attack")])
    assert result.exit_code == 0, result.output
    assert "gce+kl tau=1" in result.output


def test_labels_are_dropped_when_the_model_knows_something() -> None:
    """Before that nearly all would be: of ten classes each has a tenth, and the threshold is a half."""
    loss = TrainingLoss("truncated_gce", 0.5)
    flat = torch.zeros(4, 10, requires_grad=True)
    y = torch.arange(4)
    for step, moves in ((0, True), (32, True), (33, True), (34, False), (99, False)):
        (grad,) = torch.autograd.grad(loss.at(step, 100)(flat, y).loss, flat)
        assert bool(grad.abs().sum() > 0) == moves, step


def test_the_margin_and_sigsoftmax_go_with_smoothed_labels_and_truncation_does_not() -> None:
    for name in ("isce", "sigsoftmax"):
        loss = TrainingLoss(name, DEFAULT_TAUS[name][-1])
        arguments: dict[str, Any] = loss.arguments()
        want = softmax_loss(Z, Y, label_smoothing=0.1, **arguments)
        torch.testing.assert_close(loss(Z, Y, label_smoothing=0.1).loss, want)
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 with loss truncated_gce tau=0.5, got 0.1"):
        TrainingSettings(loss=TrainingLoss("truncated_gce", 0.5), recipe=Recipe(label_smoothing=0.1))


@pytest.mark.parametrize(
    ("name", "tau", "message"),
    [
        ("sigsoftmax", 1.0, "tau of sigsoftmax must be 0"),
        ("truncated_gce", 1.0, "tau of truncated_gce must be below 1, got 1.0"),
        ("isce", -1.0, "tau of isce must be 0 or more"),
        ("truncated_gce:0.5", 1.0, "tau of truncated_gce:0.5 must be below 1, got 1.0"),
        ("gce:0.5", 0.1, "tau of gce:0.5 must be 0"),
    ],
)
def test_errors(name: str, tau: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingLoss(name, tau)


@pytest.mark.parametrize("tau", ["0.3", torch.tensor(0.3), None, True])
def test_tau_is_a_number(tau: Any) -> None:
    with pytest.raises(TypeError, match=r"tau of kl must be a number, got ('0\.3'|tensor\(0\.3|None|True)"):
        TrainingLoss("kl", tau)


def test_names_say_what_they_need() -> None:
    assert str(TrainingLoss("isce", 0.5)) == "isce tau=0.5"
    assert str(TrainingLoss("sigsoftmax")) == "sigsoftmax"
    assert DEFAULT_TAUS.keys() == set(ALL_LOSSES)


def test_one_command_compares_the_family(tmp_path: Path) -> None:
    options = [
        "--losses",
        "ce,gce,drsl,isce,gm",
        "--tau",
        "drsl=0.3",
        "--samples",
        "40",
        "--epochs",
        "1",
        "--seeds",
        "1",
    ]
    options += ["--eps", "0.1", "--restarts", "1", "--steps", "2", "--check-images", "0", "--out", str(tmp_path)]
    done = CliRunner().invoke(drsl, ["compare", *options])
    assert done.exit_code == 0, done.output
    report = (tmp_path / "report.md").read_text()
    for name in ("ce", "gce", "uniform tau=0.3", "isce tau=1", "gm tau=1"):
        assert name in report


def test_a_loss_may_be_named_as_the_paper_names_it(tmp_path: Path) -> None:
    options = ["--loss", "drsl", "--samples", "40", "--epochs", "1", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(drsl, ["train", *options])
    assert done.exit_code == 0, done.output
    assert '"name": "uniform"' in (tmp_path / "run" / "settings.json").read_text()


def test_sigsoftmax_learns_what_the_softmax_learns() -> None:
    """Gradient descent on logits alone: both end with the labels on top."""
    for name in ("ce", "sigsoftmax"):
        z = torch.zeros(6, 4, requires_grad=True)
        y = random_labels(6, classes=4)
        for _ in range(50):
            (grad,) = torch.autograd.grad(TrainingLoss(name)(z, y).loss, z)
            z = (z - 5 * grad).detach().requires_grad_()
        assert torch.equal(z.argmax(1), y)
        assert F.cross_entropy(z, y) < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["compare", "--queries", "10"], "--queries needs one of square among --attacks"),
        (["compare", "--attacks", "square", "--steps", "3"], "--steps needs one of pgd, pgd-t, transfer"),
    ],
)
def test_what_would_do_nothing_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(drsl, [*options, "--out", str(tmp_path / "out")], env={"COLUMNS": "200"})
    assert done.exit_code != 0
    assert message in done.output
