"""Absum and L1 in training: the proximal step after each step of the optimizer, in recipes, folders and commands."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import seeded
from click.testing import CliRunner
from torch import Tensor, nn

from drsl_kernels import absum_penalty, absum_step, l1_penalty, l1_step
from drsl_kernels.robustness import compare_command, experiment, train, train_command
from drsl_kernels.robustness.checkpoint import load_checkpoint
from drsl_kernels.robustness.commands import drsl
from drsl_kernels.robustness.data import Split
from drsl_kernels.robustness.engine import run
from drsl_kernels.robustness.losses import TrainingLoss
from drsl_kernels.robustness.models import MLP, small_cnn
from drsl_kernels.robustness.optimisation import learning_rate_at, make_optimizer
from drsl_kernels.robustness.recipe import Adversarial, Recipe
from drsl_kernels.robustness.report import training_in_words
from drsl_kernels.robustness.settings import TrainingSettings, differences
from drsl_kernels.robustness.train import EpochSums, train_epoch

pytestmark = pytest.mark.usefixtures("one_thread")

CE = TrainingLoss("ce")
QUICK = TrainingSettings(recipe=Recipe(epochs=2, batch_size=16), samples=40)
METHODS = {
    "plain": None,
    "madry": Adversarial("madry", 0.05, 0.03, 2),
    "trades": Adversarial("trades", 0.05, 0.03, 2),
}


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class TestTraining:
    @pytest.mark.parametrize(("field", "step"), [("absum", absum_step), ("l1", l1_step)])
    @pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
    def test_is_the_loop_that_anyone_would_write(self, split: Split, field: str, step: Any, optimizer: str) -> None:
        """The rate of each step decides its proximal step, too: here it falls in a cosine."""
        recipe = replace(QUICK.recipe, optimizer=optimizer, learning_rate=0.01, schedule="cosine", weight_decay=0.01)
        model, generator = small_cnn(3), seeded(3)
        by_hand, steps = make_optimizer(model, recipe), 0
        for _ in range(recipe.epochs):
            for rows in torch.split(torch.randperm(len(split.train_y), generator=generator), 16):
                rate = learning_rate_at(recipe, steps, 5)
                by_hand.param_groups[0]["lr"] = rate
                by_hand.zero_grad()
                F.cross_entropy(model(split.train_x[rows]), split.train_y[rows]).backward()
                by_hand.step()
                step(model, rate * 0.3)
                steps += 1
        assert steps == 10
        trained = small_cnn(3)
        recipe = replace(recipe, **{field: 0.3})
        train(trained, split.train_x, split.train_y, CE, recipe, generator=seeded(3))
        assert torch.equal(weights(trained), weights(model))

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("amp", ["none", "bfloat16"])
    def test_after_each_step_of_every_method(self, split: Split, method: str, amp: Any) -> None:
        recipe = replace(QUICK.recipe, adversarial=METHODS[method], amp=amp)
        images = split.train_x, split.train_y
        one, two = small_cnn(0), small_cnn(0)
        absum = replace(recipe, absum=0.2)
        log = train_epoch(one, *images, CE, absum, make_optimizer(one, absum), epoch=1, generator=seeded())

        def after_step(_: EpochSums) -> None:
            absum_step(two, 0.2 * recipe.learning_rate)

        expected = train_epoch(
            two, *images, CE, recipe, make_optimizer(two, recipe), epoch=1, generator=seeded(), on_batch=after_step
        )
        assert torch.equal(weights(one), weights(two))
        assert replace(log, seconds=0) == replace(expected, seconds=0)  # the loss is logged without the penalty

    @pytest.mark.parametrize(("field", "penalty"), [("absum", absum_penalty), ("l1", l1_penalty)])
    def test_what_it_is_for(self, split: Split, field: str, penalty: Any) -> None:
        found = []
        for strength in (0.0, 0.1, 100.0):
            model = small_cnn(0)
            recipe = Recipe(3, 16, 1e-3, **{field: strength})
            train(model, split.train_x, split.train_y, CE, recipe, generator=seeded())
            found.append(penalty(model).item())
        assert found[0] > found[1] > found[2]
        assert found[2] < 1e-3

    def test_a_step_that_a_scaler_skips_has_no_proximal_step(self) -> None:
        model, recipe = small_cnn(0), Recipe(optimizer="sgd", absum=10.0)
        optimizer, scaler = make_optimizer(model, recipe), torch.amp.GradScaler("cpu", init_scale=2.0)
        before = weights(model)
        for factor in (torch.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale(factor * model(torch.rand(4, 1, 8, 8, generator=seeded())).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(weights(model), before) == (factor == torch.inf)
        assert absum_penalty(model) < absum_penalty(small_cnn(0)) / 2

    def test_a_model_without_convolutions(self, split: Split, tmp_path: Path) -> None:
        for field in ("absum", "l1"):
            recipe = replace(QUICK.recipe, **{field: 0.1})
            with pytest.raises(ValueError, match=r"model must have a convolution, .* got MLP"):
                train(MLP(shape=(1, 8, 8)), split.train_x, split.train_y, CE, recipe, generator=seeded())
        command = ["train", "--model", "mlp", "--absum", "0.1", "--samples", "40", "--out", str(tmp_path / "run")]
        result = CliRunner().invoke(drsl, command)
        assert result.exit_code == 1
        assert "Error: model must have a convolution" in result.output
        assert not (tmp_path / "run").exists()


class TestRecipe:
    @pytest.mark.parametrize("field", ["absum", "l1"])
    def test_bad_values(self, field: str) -> None:
        for value in (-1, float("nan"), 1e30):
            with pytest.raises(
                ValueError, match=f"{field} must be 0 or more and below 1e.30, got {re.escape(str(value))}"
            ):
                Recipe(**{field: value})

    def test_one_at_a_time(self) -> None:
        with pytest.raises(ValueError, match=r"one of absum and l1 must be 0, got 0\.1 and 0\.2"):
            Recipe(absum=0.1, l1=0.2)

    def test_through_json(self) -> None:
        for recipe in (Recipe(absum=1e-4), Recipe(l1=2.0)):
            settings = replace(QUICK, recipe=recipe)
            assert TrainingSettings.from_json(json.loads(json.dumps(settings.as_json()))) == settings

    def test_settings_of_before_are_the_same(self) -> None:
        """A run without them is written as it was when there were none."""
        assert not {"absum", "l1"} & QUICK.as_json()["recipe"].keys()
        with_absum = replace(QUICK, recipe=replace(QUICK.recipe, absum=0.1))
        assert differences(QUICK.as_json(), with_absum.as_json()) == ["recipe.absum was not given and is now 0.1"]
        assert differences(with_absum.as_json(), QUICK.as_json()) == ["recipe.absum was 0.1 and is now not given"]


class TestFolder:
    def test_settings_decide(self, tmp_path: Path) -> None:
        absum = replace(QUICK, recipe=replace(QUICK.recipe, absum=0.1))
        run(absum, tmp_path, tensorboard=False)
        assert load_checkpoint(tmp_path / "best.pt")["about"]["recipe"]["absum"] == 0.1
        assert run(absum, tmp_path, resume=True, tensorboard=False).was_finished
        with pytest.raises(ValueError, match=r"cannot resume .*: recipe\.absum was 0\.1 and is now not given"):
            run(QUICK, tmp_path, resume=True, tensorboard=False)


COMPARE = [
    *("compare", "--losses", "ce", "--seeds", "1", "--epochs", "1", "--batch-size", "16", "--samples", "40"),
    *("--eps", "0.1", "--steps", "1", "--restarts", "1", "--check-images", "0"),
]


class TestCommands:
    def settings(self, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, *options: object) -> Any:
        """What the work would be given."""
        seen: list[Any] = []

        def stop(settings: Any, *_: Any, **__: Any) -> None:
            seen.append(settings)
            raise ValueError("far enough")

        monkeypatch.setattr(place, name, stop)
        result = CliRunner().invoke(drsl, [*map(str, options)])
        assert "Error: far enough" in result.output, result.output
        return seen[0]

    def test_train(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        options = ("train", "--out", tmp_path, "--absum", "1e-4", "--weight-decay", "0.1")
        recipe = self.settings(monkeypatch, train_command, "run", *options).recipe
        assert (recipe.absum, recipe.l1, recipe.weight_decay) == (1e-4, 0, 0.1)
        recipe = self.settings(monkeypatch, train_command, "run", "train", "--out", tmp_path, "--l1", "1e-4").recipe
        assert (recipe.absum, recipe.l1) == (0, 1e-4)

    def test_compare(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        options = (*COMPARE, "--absum", "1e-4", "--weight-decay", "0.1", "--out", tmp_path)
        training = self.settings(monkeypatch, compare_command, "compare", *options).training
        assert (training.recipe.absum, training.recipe.weight_decay) == (1e-4, 0.1)
        assert ", weight decay 0.1, Absum 0.0001;" in training_in_words(training)
        training = self.settings(monkeypatch, compare_command, "compare", *COMPARE, "--l1", "2", "--out", tmp_path)
        assert ", L1 2;" in training_in_words(training.training)

    @pytest.mark.parametrize("command", ["train", "compare"])
    def test_not_both(self, tmp_path: Path, command: str) -> None:
        result = CliRunner().invoke(drsl, [command, "--absum", "1", "--l1", "2", "--out", str(tmp_path / "run")])
        assert result.exit_code != 0
        assert "one of absum and l1 must be 0, got 1.0 and 2.0" in result.output

    def test_a_comparison_of_before_is_used_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Trained and judged when a recipe had no such fields: as it stands in the files, which are not changed."""
        monkeypatch.setattr(compare_command, "draw_pictures", lambda *_: None)
        monkeypatch.setattr(compare_command, "write_pages", lambda *_: None)
        monkeypatch.setattr("drsl_kernels.robustness.timing.ROUNDS", 1)
        assert CliRunner().invoke(drsl, [*COMPARE, "--out", str(tmp_path)]).exit_code == 0
        folder = tmp_path / "runs" / "ce-tau0-seed0"
        for name in ("settings.json", "judged.json"):
            assert "absum" not in (folder / name).read_text()
        shutil.copytree(tmp_path, tmp_path.with_name("changed"))
        result = CliRunner().invoke(drsl, [*COMPARE, "--absum", "1", "--out", str(tmp_path.with_name("changed"))])
        assert "was made with other settings and is made anew: recipe.absum was not given and is now 1.0" in (
            result.output.replace("\n", "")
        )
        monkeypatch.setattr(experiment, "judge", None)
        result = CliRunner().invoke(drsl, [*COMPARE, "--absum", "0", "--out", str(tmp_path)])
        assert "used again: 1 of 1 runs" in result.output, result.output
