"""Worst case over attacks, training, data, timing, storage and the command line `drsl`."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

from drsl_kernels.robustness import (
    Attack,
    Recipe,
    TrainingLoss,
    commands,
    experiment,
    second_largest_softmax,
    storage,
    train,
    worst_case,
)
from drsl_kernels.robustness.cli import main
from drsl_kernels.robustness.commands import drsl
from drsl_kernels.robustness.data import digits
from drsl_kernels.robustness.losses import LOSS_NAMES
from drsl_kernels.robustness.models import small_cnn
from drsl_kernels.robustness.pictures import PICTURES
from drsl_kernels.robustness.timing import time_epochs


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are tiny, and threads that wait for one another make busy machines very slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Steps(nn.Module):
    """Class 1 where the only value of x is above 0.5, class 0 elsewhere; the distance from there is the margin."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return torch.cat([0.5 - x, x - 0.5], dim=1)


class TestWorstCase:
    X = torch.tensor([[0.1], [0.42], [0.47], [0.56], [0.9], [0.7]])
    Y = torch.tensor([0, 0, 0, 1, 1, 0])  # the last is misclassified without an attack
    ATTACKS = (Attack("margin", steps=8, restarts=2), Attack("log_odds", steps=8, restarts=1))

    def judge(self, *epsilons: float, **options: Any) -> Any:
        arguments = {"attacks": self.ATTACKS, "generator": seeded()} | options
        return worst_case(Steps(), self.X, self.Y, epsilons=epsilons, **arguments)

    def test_counts_by_hand(self) -> None:
        found = self.judge(0.05, 0.1, 0.2)
        assert found.clean_correct.tolist() == [True, True, True, True, True, False]
        assert found.robust.tolist() == [
            [True, True, False, True, True, False],
            [True, False, False, False, True, False],
            [True, False, False, False, True, False],
        ]
        assert found.clean_accuracy() == pytest.approx(5 / 6)
        assert found.robust_accuracy() == pytest.approx((4 / 6, 2 / 6, 2 / 6))

    def test_order_of_radii_does_not_matter(self) -> None:
        assert self.judge(0.2, 0.05, 0.1, 0.1).epsilons == (0.05, 0.1, 0.2)
        assert torch.equal(self.judge(0.2, 0.05).robust, self.judge(0.05, 0.2).robust)

    def test_at_zero_it_is_clean(self) -> None:
        found = self.judge(0.0, 0.1)
        assert torch.equal(found.robust[0], found.clean_correct)
        assert torch.equal(found.points[0], self.X)

    def test_points_are_inside_and_prove_the_count(self) -> None:
        found = self.judge(0.05, 0.1)
        for eps, robust, points in zip(found.epsilons, found.robust, found.points, strict=True):
            assert (points - self.X).abs().max() <= eps + 1e-6
            assert torch.equal(Steps()(points).argmax(1) == self.Y, robust)
        assert torch.equal(found.points[:, -1], self.X[-1:].expand(2, 1))

    def test_a_useless_attack_takes_nothing_back(self) -> None:
        def in_favour_of_the_label(logits: Tensor, y: Tensor) -> Tensor:
            return logits.gather(1, y.unsqueeze(1)).squeeze(1)

        attacks = [Attack("margin", steps=8), Attack(in_favour_of_the_label, steps=8)]
        found = self.judge(0.1, attacks=attacks)
        assert found.points[0, 0].item() == pytest.approx(0.2)
        assert found.points[0, 4].item() == pytest.approx(0.8)

    def test_a_broken_sample_is_not_attacked_again(self) -> None:
        def rows(epsilons: tuple[float, ...]) -> int:
            model = Steps()
            worst_case(model, self.X, self.Y, epsilons=epsilons, attacks=self.ATTACKS, generator=seeded())
            return model.rows

        per_restart = 8 + 1 + 1  # gradients, the last point, its margin
        # At 0.5 the first restart meets five samples and breaks those four that are within reach: 0.9 stays.
        assert rows((0.35,)) == 6 + per_restart * (5 + 2 + 2)
        assert rows((0.35, 0.36)) == rows((0.35,)) + per_restart * (2 + 2 + 2)

    def test_batches_change_nothing_for_a_deterministic_outcome(self) -> None:
        assert torch.equal(self.judge(0.1, batch_size=2).robust, self.judge(0.1).robust)

    def test_reports_every_restart(self) -> None:
        seen: list[tuple[float, object]] = []
        self.judge(0.1, 0.45, on_restart=lambda eps, attack: seen.append((eps, attack.loss)))
        assert seen == [(eps, loss) for eps in (0.1, 0.45) for loss in ("margin", "margin", "log_odds")]

    def test_never_rises_with_eps(self) -> None:
        split = digits().first(60)
        model = small_cnn(0)
        train(model, split.train_x, split.train_y, TrainingLoss("ce"), Recipe(epochs=15), generator=seeded())
        attacks = [Attack("ce", steps=1, restarts=1)]  # too weak to break at 0.3 all that it breaks at 0.1
        epsilons = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4)
        found = worst_case(model, split.train_x, split.train_y, epsilons=epsilons, attacks=attacks, generator=seeded())
        assert (found.robust[1:] <= found.robust[:-1]).all()
        assert (found.robust[0] <= found.clean_correct).all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epsilons": ()}, "epsilons and attacks must not be empty"),
            ({"attacks": ()}, "epsilons and attacks must not be empty"),
            ({"epsilons": (0.1, -1)}, "epsilons must be 0 or more and finite"),
            ({"epsilons": (math.nan,)}, "epsilons must be 0 or more and finite"),
            ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ],
    )
    def test_bad_input(self, options: dict[str, Any], message: str) -> None:
        arguments = {"epsilons": (0.1,), "attacks": self.ATTACKS} | options
        with pytest.raises(ValueError, match=message):
            worst_case(Steps(), self.X, self.Y, **arguments)

    @pytest.mark.parametrize("options", [{"steps": 0}, {"restarts": 0}])
    def test_bad_attack(self, options: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="must be 1 or more, got 0"):
            Attack(**options)


def test_second_largest_softmax() -> None:
    logits = torch.tensor([[0.0, 0.0, -50.0], [9.0, 0.0, 0.0]])
    expected = [0.5, math.exp(-9) / (1 + 2 * math.exp(-9))]
    assert second_largest_softmax(nn.Identity(), logits, batch_size=1).tolist() == pytest.approx(expected)


@pytest.fixture(scope="module")
def split() -> Any:
    return digits().first(96)


class TestTraining:
    @pytest.mark.parametrize("name", LOSS_NAMES)
    def test_learns_with_every_loss(self, split: Any, name: str) -> None:
        loss = TrainingLoss(name, 0.0 if name == "ce" else 0.05)
        model = small_cnn(0)
        seen: list[Any] = []
        logs = train(
            model,
            split.train_x,
            split.train_y,
            loss,
            Recipe(epochs=12, batch_size=16),
            generator=seeded(),
            on_epoch=seen.append,
        )
        assert seen == logs
        assert [log.epoch for log in logs] == list(range(1, 13))
        assert logs[-1].accuracy > 0.7 > logs[0].accuracy
        assert logs[-1].cross_entropy < logs[0].cross_entropy
        assert (logs[-1].distance is None) == (name == "ce")

    def test_same_seed_same_model(self, split: Any) -> None:
        def weights(seed: int) -> Tensor:
            model = small_cnn(seed)
            loss = TrainingLoss("non_target_logits", 0.3)
            train(model, split.train_x, split.train_y, loss, Recipe(epochs=2), generator=seeded(seed))
            return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

        assert torch.equal(weights(0), weights(0))
        assert not torch.equal(weights(0), weights(1))

    def test_first_weights_depend_on_the_seed_alone(self) -> None:
        first = small_cnn(0).head.weight
        torch.rand(1)
        assert torch.equal(small_cnn(0).head.weight, first)
        assert not torch.equal(small_cnn(1).head.weight, first)

    def test_the_global_random_state_is_left_alone(self) -> None:
        torch.manual_seed(4)
        expected = torch.rand(3)
        torch.manual_seed(4)
        small_cnn(0)
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize("name", LOSS_NAMES)
    def test_a_batch_agrees_with_the_formulas(self, name: str) -> None:
        logits = torch.randn(7, 5, generator=seeded()).double()
        y = torch.randint(5, (7,), generator=seeded(1))
        tau = 0.0 if name == "ce" else 0.7
        result = TrainingLoss(name, tau)(logits, y)
        cross_entropy = F.cross_entropy(logits, y, reduction="sum")
        assert result.cross_entropy.item() == pytest.approx(cross_entropy.item())
        assert int(result.correct) == int((logits.argmax(1) == y).sum())
        distance = 0.0 if result.distance is None else result.distance.item()
        assert result.loss.item() == pytest.approx((cross_entropy.item() + tau * distance) / 7)

    def test_the_penalty_is_the_distance_of_that_name(self) -> None:
        logits = torch.randn(7, 5, generator=seeded()).double()
        y = torch.randint(5, (7,), generator=seeded(1))
        wrong = logits[F.one_hot(y, 5) == 0].view(7, 4)
        spread = (wrong - wrong.mean(1, keepdim=True)).square().sum()
        result = TrainingLoss("non_target_logits", 0.7)(logits, y)
        assert result.distance is not None
        assert result.distance.item() == pytest.approx(spread.item())

    def test_an_epoch_log_holds_means_over_images_not_batches(self, split: Any) -> None:
        """With one batch of 64 and one of 32, of a model that does not change."""
        model = small_cnn(0)
        recipe = Recipe(epochs=1, batch_size=64, learning_rate=1e-30)
        loss = TrainingLoss("uniform", 0.5)
        (log,) = train(model, split.train_x, split.train_y, loss, recipe, generator=seeded())
        with torch.no_grad():
            whole = loss(model(split.train_x), split.train_y)
        assert log.loss == pytest.approx(whole.loss.item(), rel=1e-5)
        assert log.cross_entropy == pytest.approx(whole.cross_entropy.item() / 96, rel=1e-5)
        assert whole.distance is not None
        assert log.distance == pytest.approx(whole.distance.item() / 96, rel=1e-4)
        assert log.accuracy == pytest.approx(whole.correct.item() / 96)

    @pytest.mark.parametrize("name", ["ce", "uniform"])
    def test_a_loss_that_is_not_finite_stops_the_run(self, split: Any, name: str) -> None:
        x = split.train_x.clone()
        x[0] = math.nan
        order = torch.randperm(96, generator=seeded())
        batch = int((order == 0).nonzero()) // 16 + 1
        message = f"training with {name}.*the loss is nan in epoch 1, batch {batch};"
        with pytest.raises(FloatingPointError, match=message):
            train(small_cnn(0), x, split.train_y, TrainingLoss(name), Recipe(batch_size=16), generator=seeded())

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: TrainingLoss("hinge"), f"unknown loss 'hinge'; the losses are {', '.join(LOSS_NAMES)}"),
            (lambda: TrainingLoss("kl", math.nan), "tau of kl must be 0 or more and finite, got nan"),
            (lambda: TrainingLoss("kl", -1), "tau of kl must be 0 or more and finite, got -1"),
            (lambda: TrainingLoss("ce", 1), "tau of ce must be 0"),
            (lambda: Recipe(epochs=0), "epochs must be 1 or more, got 0"),
            (lambda: Recipe(batch_size=0), "batch_size must be 1 or more, got 0"),
            (lambda: Recipe(learning_rate=math.nan), "learning_rate must be above 0 and finite, got nan"),
        ],
    )
    def test_bad_input(self, make: Callable[[], object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()

    def test_timing_covers_the_losses_asked_for(self, split: Any) -> None:
        losses = [TrainingLoss("uniform", 0.3), TrainingLoss("ce")]
        times = time_epochs(losses, lambda: small_cnn(0), split.train_x, split.train_y, Recipe(), rounds=2)
        assert list(times) == losses
        assert times[TrainingLoss("ce")].ratio == 1
        assert all(time.seconds > 0 and time.ratio > 0 for time in times.values())


class TestDigits:
    def test_shapes_and_range(self) -> None:
        split = digits()
        assert split.train_x.shape == (1297, 1, 8, 8)
        assert split.held_out_x.shape == (500, 1, 8, 8)
        assert split.train_x.dtype == torch.float32
        assert split.train_y.dtype == torch.int64
        assert split.train_x.min() == 0
        assert split.train_x.max() == 1

    def test_stratified(self) -> None:
        split = digits()
        shares = [torch.bincount(y, minlength=10) / len(y) for y in (split.train_y, split.held_out_y)]
        torch.testing.assert_close(shares[0], shares[1], rtol=0, atol=0.004)

    def test_always_the_same(self) -> None:
        assert torch.equal(digits().train_x, digits().train_x)

    def test_validation_comes_from_the_training_images(self) -> None:
        def images(x: Tensor) -> set[tuple[float, ...]]:
            return {tuple(image) for image in x.flatten(1).tolist()}

        whole, part = digits(), digits("validation")
        assert len(part.train_y) == 1000
        assert len(part.held_out_y) == 297
        assert images(part.train_x) | images(part.held_out_x) == images(whole.train_x)
        assert not images(part.train_x) & images(part.held_out_x)
        assert not images(whole.held_out_x) & images(whole.train_x)

    def test_unknown_part(self) -> None:
        with pytest.raises(ValueError, match="held_out must be 'test' or 'validation', got 'train'"):
            digits("train")  # type: ignore[arg-type]


class TestStorage:
    def test_a_failure_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "numbers.json"
        storage.write_json(path, [1, 2])

        def fail(temporary: Path) -> None:
            temporary.write_text("[3, ")
            raise RuntimeError("the disk is full")

        with pytest.raises(RuntimeError, match="the disk is full"):
            storage.write_atomically(path, fail)
        assert storage.read_json(path) == [1, 2]
        assert os.listdir(tmp_path) == ["numbers.json"]

    def test_the_temporary_file_is_beside_the_target(self, tmp_path: Path) -> None:
        path = tmp_path / "picture.png"
        seen: list[Path] = []
        storage.write_atomically(path, lambda temporary: (seen.append(temporary), temporary.touch())[1])
        assert seen[0].parent == tmp_path
        assert seen[0].suffix == ".png"
        assert seen[0] != path
        assert os.listdir(tmp_path) == ["picture.png"]

    def test_nan_is_not_json(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            storage.write_json(tmp_path / "numbers.json", [math.nan])
        assert os.listdir(tmp_path) == []

    def test_absent_or_partial_is_none(self, tmp_path: Path) -> None:
        assert storage.read_json(tmp_path / "absent.json") is None
        (tmp_path / "partial.json").write_text('{"a": [1, 2')
        assert storage.read_json(tmp_path / "partial.json") is None


def drsl_compare(*options: str) -> Any:
    return CliRunner().invoke(drsl, ["compare", *options])


TINY = [
    *("--losses", "ce,non_target_logits", "--seeds", "1", "--epochs", "2", "--samples", "40"),
    *("--eps", "0.05,8/255", "--steps", "2", "--restarts", "1"),
]
RUNS = ["ce-tau0-seed0.json", "non_target_logits-tau0.3-seed0.json"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("compare") / "new" / "folder"
    torch.set_num_threads(2)
    result = drsl_compare(*TINY, "--out", str(folder))
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == 2  # not the 1 of --threads
    torch.set_num_threads(1)
    return folder, result.output


class TestCompare:
    """A tiny comparison from the command line, and what it leaves behind."""

    @pytest.fixture
    def no_pictures(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Drawing takes most of the time of a tiny comparison."""
        monkeypatch.setattr(commands, "draw_pictures", lambda *_: None)

    @pytest.fixture
    def copy(self, finished: tuple[Path, str], tmp_path: Path) -> Path:
        for name in RUNS:
            (tmp_path / "runs").mkdir(exist_ok=True)
            (tmp_path / "runs" / name).write_bytes((finished[0] / "runs" / name).read_bytes())
        return tmp_path

    def test_files(self, finished: tuple[Path, str]) -> None:
        folder, _ = finished
        assert sorted(os.listdir(folder)) == sorted(["results.json", "results.csv", "runs", *PICTURES])
        assert sorted(os.listdir(folder / "runs")) == RUNS
        for name in PICTURES:
            assert (folder / name).read_bytes().startswith(b"\x89PNG")

    def test_table(self, finished: tuple[Path, str]) -> None:
        table = finished[1]
        for text in (
            *("trained with", "ce", "non_target_logits", "tau=0.3", "clean", "robust, eps 0.03137"),
            *("robust, eps 0.05", "seconds per epoch", "F.cross_entropy"),
        ):
            assert text in table
        flat = " ".join(table.split())
        assert "per-sample worst case over PGD-2 on log_odds, margin, ce, 1 restart each" in flat
        assert "percent of 40 test images, a single seed" in flat

    def test_json(self, finished: tuple[Path, str]) -> None:
        content = json.loads((finished[0] / "results.json").read_text())
        assert content["meaning"]["robust"].startswith("per-sample worst case over PGD-2 on log_odds")
        assert content["settings"]["epsilons"] == [8 / 255, 0.05]
        assert content["settings"]["held_out"] == "test"
        assert content["environment"]["torch"] == torch.__version__
        assert [(line["loss"], line["tau"]) for line in content["summary"]] == [
            ("ce", 0.0),
            ("non_target_logits", 0.3),
        ]
        for line, run in zip(content["summary"], content["runs"], strict=True):
            assert line["clean_accuracy"] == {"mean": run["clean_accuracy"], "std": None}
            assert [value["eps"] for value in line["robust_accuracy"]] == [8 / 255, 0.05]
            assert line["robust_accuracy"][0]["mean"] == run["robust_accuracy"][0]["accuracy"]
            assert [log["epoch"] for log in run["epochs"]] == [1, 2]
        assert content["summary"][0]["ratio_to_cross_entropy"] == 1

    def test_csv(self, finished: tuple[Path, str]) -> None:
        runs = json.loads((finished[0] / "results.json").read_text())["runs"]
        with (finished[0] / "results.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert [(line["loss"], float(line["eps"])) for line in lines] == [
            (loss, eps) for loss in ("ce", "non_target_logits") for eps in (0.0, 8 / 255, 0.05)
        ]
        assert float(lines[0]["accuracy"]) == runs[0]["clean_accuracy"]
        assert float(lines[4]["accuracy"]) == runs[1]["robust_accuracy"][0]["accuracy"]
        assert all(int(line["correct"]) == 40 * float(line["accuracy"]) for line in lines)

    @pytest.mark.usefixtures("no_pictures")
    def test_second_run_uses_the_first(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(experiment, "train", None)  # nothing may be trained
        result = drsl_compare(*TINY, "--out", str(copy))
        assert result.exit_code == 0, result.output
        assert "used again: 2 of 2 runs" in " ".join(result.output.split())

    @pytest.mark.usefixtures("no_pictures")
    def test_same_numbers_afresh(self, finished: tuple[Path, str], copy: Path) -> None:
        result = drsl_compare(*TINY, "--out", str(copy), "--fresh")
        assert result.exit_code == 0, result.output
        assert "used again" not in result.output
        assert (copy / "results.csv").read_bytes() == (finished[0] / "results.csv").read_bytes()
        for name in RUNS:
            before, after = (json.loads((folder / "runs" / name).read_text()) for folder in (finished[0], copy))
            for log in before["result"]["epochs"] + after["result"]["epochs"]:
                del log["seconds"]
            assert after == before

    @pytest.mark.usefixtures("no_pictures")
    @pytest.mark.parametrize(
        "options",
        [
            ["--epochs", "1"],
            ["--restarts", "2"],
            ["--steps", "1"],
            ["--eps", "0.05"],
            ["--samples", "41"],
            ["--held-out", "validation"],
            ["--attacks", "margin,ce"],
            ["--seed", "1"],
        ],
    )
    def test_other_options_other_runs(self, copy: Path, options: list[str]) -> None:
        result = drsl_compare(*TINY, *options, "--losses", "ce", "--out", str(copy))
        assert result.exit_code == 0, result.output
        assert "used again" not in result.output

    @pytest.mark.usefixtures("no_pictures")
    def test_unfinished_runs_are_not_trusted(self, copy: Path) -> None:
        whole = (copy / "runs" / RUNS[0]).read_text()
        (copy / "runs" / RUNS[0]).write_text(whole[: len(whole) // 2])
        (copy / "runs" / RUNS[1]).write_text("{}")
        (copy / "runs" / ".unfinished-1-x.json").write_text(whole)
        result = drsl_compare(*TINY, "--out", str(copy))
        assert result.exit_code == 0, result.output
        assert "used again" not in result.output
        after = json.loads((copy / "runs" / RUNS[0]).read_text())["result"]
        assert after["clean_accuracy"] == json.loads(whole)["result"]["clean_accuracy"]

    def test_an_interrupted_comparison_keeps_what_is_finished(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []

        def second_fails(*args: Any, **options: Any) -> Any:
            calls.append(args)
            if len(calls) == 2:
                raise FloatingPointError("the loss is inf in epoch 2, batch 1")
            return train(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(experiment, "train", second_fails)
            result = drsl_compare(*TINY, "--out", str(tmp_path))
        assert result.exit_code == 1
        assert "Error: the loss is inf in epoch 2, batch 1" in result.output
        assert os.listdir(tmp_path) == ["runs"]
        assert os.listdir(tmp_path / "runs") == RUNS[:1]

    def test_several_taus_and_seeds(self, tmp_path: Path) -> None:
        result = drsl_compare(*TINY, "--losses", "kl", "--tau", "kl=0.1,2", "--seeds", "2", "--out", str(tmp_path))
        assert result.exit_code == 0, result.output
        assert sorted(os.listdir(tmp_path / "runs")) == [
            f"kl-tau{tau}-seed{seed}.json" for tau in ("0.1", "2") for seed in (0, 1)
        ]
        assert "standard deviation over 2 seeds" in " ".join(result.output.split())
        summary = json.loads((tmp_path / "results.json").read_text())["summary"]
        assert [line["tau"] for line in summary] == [0.1, 2.0]
        assert all(line["clean_accuracy"]["std"] is not None for line in summary)

    def test_default_is_the_comparison_of_the_paper_with_cross_entropy(self) -> None:
        settings = experiment.Settings()
        assert 0.1 in settings.epsilons
        assert set(settings.attack_losses) == {"ce", "log_odds", "margin"}
        assert (settings.steps, settings.restarts) == (20, 5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--losses", "hinge"], f"unknown loss 'hinge'; choose from {', '.join(LOSS_NAMES)}"),
            (["--losses", ""], "unknown loss ''"),
            (["--attacks", "square"], "unknown attack 'square'; choose from log_odds, ce, margin"),
            (["--eps", "-0.1"], "'-0.1' is not from 0 to 1"),
            (["--eps", "nan"], "'nan' is not from 0 to 1"),
            (["--eps", "8"], "'8' is not from 0 to 1"),
            (["--eps", "1/0"], "'1/0' is neither a number such as 0.1 nor a fraction such as 8/255"),
            (["--eps", "0.1,,"], "'' is neither a number"),
            (["--tau", "uniform"], "'uniform' must look like non_target_logits=0.3"),
            (["--tau", "uniform=nan"], "tau of uniform must be 0 or more and finite, got nan"),
            (["--tau", "uniform=-1"], "tau of uniform must be 0 or more and finite, got -1"),
            (["--tau", "uniform=big"], "'big' must be a number"),
            (["--tau", "hinge=1"], "unknown loss 'hinge'"),
            (["--tau", "ce=1"], "tau of ce must be 0"),
            (["--tau", "kl=1"], "'kl' is not among --losses"),
            (["--seeds", "0"], "0 is not in the range x>=1"),
            (["--seed", "-1"], "-1 is not in the range x>=0"),
            (["--epochs", "0"], "0 is not in the range x>=1"),
            (["--steps", "0"], "0 is not in the range x>=1"),
            (["--restarts", "0"], "0 is not in the range x>=1"),
            (["--samples", "0"], "0 is not in the range x>=1"),
            (["--threads", "0"], "0 is not in the range x>=1"),
            (["--held-out", "train"], "'train' is not one of 'test', 'validation'"),
            (["--device", "abacus"], "cannot use 'abacus' here"),
        ],
    )
    def test_bad_options(self, tmp_path: Path, options: list[str], message: str) -> None:
        result = drsl_compare(*options, "--out", str(tmp_path / "never"))
        assert result.exit_code == 2
        flat = " ".join(result.output.split())
        assert message in flat
        assert not (tmp_path / "never").exists()

    def test_out_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        for folder in (tmp_path / "file", tmp_path / "file" / "below"):
            result = drsl_compare("--out", str(folder))
            assert result.exit_code == 2
            assert "cannot write to" in " ".join(result.output.split())
        assert (tmp_path / "file").read_text() == "in the way"


class TestCommand:
    def test_help(self) -> None:
        runner = CliRunner()
        assert "compare" in runner.invoke(drsl, ["--help"]).output
        text = " ".join(runner.invoke(drsl, ["compare", "--help"]).output.split())
        for option in ("--losses", "--tau", "--seeds", "--eps", "--held-out", "--out", "--fresh"):
            assert option in text
        assert "non_target_logits=0.3" in text

    def test_as_a_module(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["python", "--version"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("drsl_kernels.robustness", run_name="__main__")
        assert stop.value.code == 0
        assert capsys.readouterr().out.startswith("drsl, version ")

    def test_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "drsl_kernels.robustness.commands")
        monkeypatch.setitem(sys.modules, "rich.console", None)  # as if rich were not installed
        with pytest.raises(SystemExit, match=re.escape("'rich': pip install 'drsl_kernels[lab]'")):
            main()

    def test_other_import_errors_are_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "drsl_kernels.robustness.commands")
        monkeypatch.setitem(sys.modules, "drsl_kernels.robustness.pictures", None)
        with pytest.raises(ModuleNotFoundError, match="pictures"):
            main()

    def test_attacks_need_torch_alone(self) -> None:
        program = (
            "import sys\n"
            "for name in ('click', 'rich', 'sklearn', 'matplotlib'): sys.modules[name] = None\n"
            "import drsl_kernels.robustness\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True)
