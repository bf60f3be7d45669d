"""Training runs in a folder: files, validation, the best epoch, several processes, the command."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import seeded
from click.testing import CliRunner
from torch import Tensor, nn

from drsl_kernels.robustness import engine, train, train_command
from drsl_kernels.robustness.checkpoint import load_checkpoint, load_model
from drsl_kernels.robustness.commands import drsl
from drsl_kernels.robustness.data import Split, digits, load
from drsl_kernels.robustness.distributed import World
from drsl_kernels.robustness.engine import Silent, run
from drsl_kernels.robustness.losses import TrainingLoss
from drsl_kernels.robustness.models import small_cnn
from drsl_kernels.robustness.recipe import Adversarial, Recipe
from drsl_kernels.robustness.settings import TrainingSettings, default_settings
from drsl_kernels.robustness.train import train_epoch
from drsl_kernels.robustness.validation import Validation, validate

pytestmark = pytest.mark.usefixtures("one_thread")

CE = TrainingLoss("ce")
QUICK = TrainingSettings(recipe=Recipe(epochs=3, batch_size=16), samples=70)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class TestRuns:
    def test_files(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        outcome = run(QUICK, tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt", "metrics.csv", "settings.json", "tensorboard"]
        with (tmp_path / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
        assert [float(row["train_loss"]) for row in rows] == [row.train_loss for row in outcome.rows]
        assert rows[0]["train_distance"] == rows[0]["validation_robust_accuracy"] == ""
        assert float(rows[0]["learning_rate"]) == 2e-3

    def test_validation_by_hand(self, tmp_path: Path) -> None:
        row = run(QUICK, tmp_path, tensorboard=False).rows[-1]
        split = digits("validation").first(70)
        logits = load_model(tmp_path / "last.pt").model(split.held_out_x)
        assert row.validation_accuracy == (logits.argmax(1) == split.held_out_y).double().mean().item()
        expected = F.cross_entropy(logits, split.held_out_y).item()
        assert row.validation_cross_entropy == pytest.approx(expected, rel=1e-5)

    def test_tensorboard(self, tmp_path: Path) -> None:
        reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        outcome = run(QUICK, tmp_path)
        events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert "train/loss" in events.Tags()["scalars"]
        values = [(event.step, event.value) for event in events.Scalars("validation/accuracy")]
        expected = [(row.epoch, pytest.approx(row.validation_accuracy)) for row in outcome.rows]
        assert values == expected

    def test_without_tensorboard(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        notes: list[str] = []
        listener = Silent()
        listener.note = notes.append  # type: ignore[method-assign]
        run(QUICK, tmp_path, progress=listener)
        assert notes == ["No TensorBoard curves: the package tensorboard is not installed."]
        assert not (tmp_path / "tensorboard").exists()

    @pytest.mark.parametrize("robust", [False, True])
    def test_the_best_epoch_is_the_first_of_the_highest_score(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, robust: bool
    ) -> None:
        scores = iter([0.5, 0.7, 0.6, 0.7])
        snapshots: list[Tensor] = []

        def validate(model: nn.Module, *_: Any, **__: Any) -> Validation:
            snapshots.append(weights(model))
            score = next(scores)
            return Validation(1.0, 1 - score, score) if robust else Validation(1.0, score, None)

        monkeypatch.setattr(engine, "validate", validate)
        outcome = run(replace(QUICK, recipe=Recipe(epochs=4)), tmp_path, tensorboard=False)
        assert outcome.best.epoch == 2
        best = load_model(tmp_path / "best.pt")
        assert best.about["epoch"] == 2
        assert torch.equal(weights(best.model), snapshots[1])
        assert torch.equal(weights(load_model(tmp_path / "last.pt").model), snapshots[3])

    def test_the_test_images_are_never_loaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        parts: list[str] = []

        def watched(name: str, *, held_out: Any, **options: Any) -> Split:
            parts.append(held_out)
            return load(name, held_out=held_out, **options)

        monkeypatch.setattr(engine, "load", watched)
        run(QUICK, tmp_path, tensorboard=False)
        assert parts == ["validation"]

    def test_label_noise_is_in_training_alone(self) -> None:
        settings = replace(QUICK, samples=None, recipe=Recipe(label_noise=0.4))
        clean = digits("validation")

        def loaded(seed: int) -> Split:
            return engine._load(replace(settings, seed=seed), engine.dataset_info("digits"))

        noisy = loaded(0)
        assert torch.equal(noisy.held_out_y, clean.held_out_y)
        assert (noisy.train_y != clean.train_y).float().mean().item() == pytest.approx(0.4, abs=0.05)
        assert torch.equal(loaded(0).train_y, noisy.train_y)
        assert not torch.equal(loaded(1).train_y, noisy.train_y)

    def test_a_loss_that_is_not_finite(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """From the second epoch on an image is NaN. The checkpoints of the first stay."""
        split = digits("validation").first(70)
        monkeypatch.setattr(engine, "load", lambda *_, **__: split)

        class Poison(Silent):
            def begin(self, settings: TrainingSettings, epoch: int, batches: int, batch: int) -> None:
                if epoch == 2:
                    split.train_x[7] = math.nan

        orders = seeded()
        torch.randperm(70, generator=orders)
        batch = int((torch.randperm(70, generator=orders) == 7).nonzero()) // 16 + 1
        with pytest.raises(FloatingPointError, match=f"the loss is nan in epoch 2, batch {batch};"):
            run(QUICK, tmp_path, tensorboard=False, checkpoint_batches=1, progress=Poison())
        last = load_checkpoint(tmp_path / "last.pt")
        assert all(value.isfinite().all() for value in last["model"].values())
        assert len(last["state"]["rows"]) == 1
        assert load_checkpoint(tmp_path / "best.pt")["about"]["epoch"] == 1

    def test_weights_that_are_not_finite(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The last step of an epoch breaks the model: no later loss would tell."""

        def broken(model: nn.Module, *arguments: Any, **options: Any) -> Any:
            log = train_epoch(model, *arguments, **options)
            next(model.parameters()).data[0] = math.nan
            return log

        monkeypatch.setattr(engine, "train_epoch", broken)
        with pytest.raises(FloatingPointError, match=r"after epoch 1, batch 5: the cross-entropy .* is nan"):
            run(QUICK, tmp_path, tensorboard=False)
        monkeypatch.setattr(engine, "validate", lambda *_, **__: Validation(1.0, 0.5, None))
        with pytest.raises(FloatingPointError, match=r"the weights .* are not finite after epoch 1, batch 5"):
            run(QUICK, tmp_path, resume=True, tensorboard=False)
        assert not (tmp_path / "last.pt").exists()

    def test_puts_back_what_it_sets(self, tmp_path: Path) -> None:
        torch.set_num_threads(2)
        before = torch.get_rng_state()
        run(QUICK, tmp_path, tensorboard=False)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.equal(torch.get_rng_state(), before)

    def test_robust_validation(self, split: Split) -> None:
        model = small_cnn(0)
        train(model, split.train_x, split.train_y, CE, Recipe(25, 16), generator=seeded())

        def judged(eps: float, images: int = 70) -> Validation:
            arguments: Any = {"robust_images": images, "seed": 0, "world": World()}
            return validate(model, split.train_x, split.train_y, adversarial=Adversarial(eps=eps), **arguments)

        assert judged(1e-9).robust_accuracy == judged(1e-9).accuracy == 1
        assert judged(0.1).score == judged(0.1).robust_accuracy
        assert 0 < judged(0.1).score < 1
        assert judged(0.5).robust_accuracy == 0
        assert judged(0.1, 7).score in [k / 7 for k in range(8)]


@pytest.mark.slow
def test_two_processes_are_as_one_with_the_joint_batch(tmp_path: Path) -> None:
    """Batches of 25 in parts of 13 and 12, and a last one of a single image.

    The attack is that in L2: the signs of the other turn a rounding into a whole step.
    """
    options = (
        *("--dataset", "digits", "--samples", "101", "--batch-size", "25", "--epochs", "2", "--optimizer", "sgd"),
        *("--lr", "0.05", "--clip-norm", "1", "--adversarial", "madry", "--steps", "2", "--norm", "l2"),
        *("--absum", "0.01"),
        *("--augmentation", "crop_flip", "--loss", "kl", "--label-noise", "0.1", "--no-tensorboard", "--out"),
    )
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = (*torchrun, "-m", "drsl_kernels.robustness", "train", *options, str(tmp_path / "two"))
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    words = [line.partition(" ")[0] for line in finished.stdout.splitlines()]
    assert words == ["epoch", "epoch", "Best:"]  # rank 0 alone
    assert CliRunner().invoke(drsl, ["train", *options, str(tmp_path / "one")]).exit_code == 0
    two, one = (load_checkpoint(tmp_path / name / "last.pt") for name in ("two", "one"))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-6)
    assert not torch.equal(one["model"]["head.weight"], small_cnn(0).head.weight)
    for row, expected in zip(two["state"]["rows"], one["state"]["rows"], strict=True):
        assert {**row, "seconds": 0} == pytest.approx({**expected, "seconds": 0}, rel=1e-4)
    assert json.loads((tmp_path / "two" / "settings.json").read_text())["processes"] == 2
    resumed = CliRunner().invoke(drsl, ["train", "--resume", "--out", str(tmp_path / "two")])
    assert "processes was 2 and is now 1" in resumed.output


class TestCommand:
    def invoke(self, *options: str) -> Any:
        return CliRunner().invoke(drsl, ["train", *options])

    def settings(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str) -> TrainingSettings:
        """What a run would be given."""
        seen: list[TrainingSettings] = []

        def stop(settings: TrainingSettings, *_: Any, **__: Any) -> None:
            seen.append(settings)
            raise ValueError("far enough")

        monkeypatch.setattr(train_command, "run", stop)
        result = self.invoke(*options, "--out", str(tmp_path / "run"))
        assert "Error: far enough" in result.output, result.output
        return seen[0]

    def test_trains(self, tmp_path: Path) -> None:
        result = self.invoke("--epochs", "2", "--samples", "40", "--no-tensorboard", "--out", str(tmp_path / "run"))
        assert result.exit_code == 0, result.output
        lines = result.output.splitlines()
        assert [line.partition(",")[0] for line in lines[:2]] == ["epoch 1", "epoch 2"]
        assert "validation accuracy" in lines[-1]
        assert "best.pt" in lines[-1]
        again = self.invoke("--resume", "--out", str(tmp_path / "run"))
        assert "is finished: 2 epochs; nothing is left to do" in again.output
        assert again.exit_code == 0
        other = self.invoke("--resume", "--epochs", "3", "--loss", "kl", "--out", str(tmp_path / "run"))
        assert other.exit_code == 1
        assert "loss.name was 'ce' and is now 'kl'" in other.output
        assert "recipe.epochs was 2 and is now 3" in other.output
        without = self.invoke("--out", str(tmp_path / "run"))
        assert without.exit_code == 1
        assert "holds a training run: resume it" in without.output

    def test_defaults(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert self.settings(monkeypatch, tmp_path) == default_settings("digits") == TrainingSettings()
        cifar = default_settings("cifar10")
        assert (cifar.model, cifar.recipe.optimizer, cifar.recipe.augmentation) == ("resnet18", "sgd", "crop_flip")

    def test_every_option_arrives(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        options = (
            *("--loss", "non_target_logits", "--epochs", "7", "--batch-size", "9", "--optimizer", "sgd", "--lr", "0.3"),
            *("--weight-decay", "0.01", "--momentum", "0.5", "--schedule", "multistep", "--milestones", "2,4"),
            *("--warmup", "0.5", "--clip-norm", "3", "--label-smoothing", "0.1", "--label-noise", "0.2"),
            *("--augmentation", "crop_flip", "--amp", "bfloat16", "--adversarial", "madry", "--eps", "8/255"),
            *("--alpha", "0.01", "--steps", "3", "--norm", "l2", "--no-random-start", "--inner-loss", "training"),
            *("--craft-mode", "eval", "--seed", "5", "--samples", "50", "--threads", "2"),
            *("--dataset", "mnist", "--data-dir", "somewhere", "--robust-images", "64"),
        )
        attack = Adversarial("madry", 8 / 255, 0.01, 3, "l2", False, "training", 6.0, "eval")
        recipe = Recipe(
            *(7, 9, 0.3, "sgd", 0.01, 0.5, "multistep", (2, 4), 0.5, 3.0, 0.1, 0.2, "crop_flip", "bfloat16", attack)
        )
        assert self.settings(monkeypatch, tmp_path, *options) == TrainingSettings(
            *("mnist", "small_cnn", TrainingLoss("non_target_logits", 0.3), recipe, 5, "cpu", 2, 50, 64),
            data_dir=Path("somewhere"),
        )

    def test_attacks_have_the_defaults_of_the_data(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        attack = self.settings(monkeypatch, tmp_path, "--adversarial", "trades", "--steps", "3").recipe.adversarial
        assert attack == Adversarial("trades", 0.1, 0.025, 3)
        attack = self.settings(monkeypatch, tmp_path, "--adversarial", "trades", "--beta", "2").recipe.adversarial
        assert attack == Adversarial("trades", 0.1, 0.025, 10, beta=2.0)

    @pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10"])
    def test_attacks_in_l2(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dataset: str) -> None:
        """All steps together go 2.5 times the radius, unless told otherwise; the radius may exceed 1."""

        def attack(*options: str) -> Adversarial | None:
            given = ("--dataset", dataset, "--adversarial", "madry", "--norm", "l2", *options)
            return self.settings(monkeypatch, tmp_path, *given).recipe.adversarial

        assert attack() == Adversarial("madry", 0.5, 0.125, 10, "l2")
        assert attack("--eps", "2") == Adversarial("madry", 2.0, 0.5, 10, "l2")
        assert attack("--eps", "2", "--steps", "5") == Adversarial("madry", 2.0, 1.0, 5, "l2")
        assert attack("--eps", "2", "--alpha", "1.5") == Adversarial("madry", 2.0, 1.5, 10, "l2")

    def test_a_resumed_attack_in_l2_is_as_it_was(self, tmp_path: Path) -> None:
        attack = Adversarial("madry", 0.3, 0.01, 1, "l2")
        run(replace(QUICK, recipe=Recipe(epochs=1, adversarial=attack)), tmp_path, tensorboard=False)
        result = self.invoke("--resume", "--norm", "l2", "--eps", "0.3", "--out", str(tmp_path))
        assert result.exit_code == 0, result.output

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (["--eps", "0.1"], 2, "--eps needs --adversarial madry or trades"),
            (["--adversarial", "trades", "--eps", "8"], 2, "'8' is not from 0 to 1"),
            (["--adversarial", "trades", "--alpha", "2"], 2, "'2' is not from 0 to 1"),
            (["--adversarial", "trades", "--norm", "l2", "--eps", "1e308"], 2, "'1e+308' is not from 0 to 1e+06"),
            (["--momentum", "0.5"], 2, "--momentum needs --optimizer sgd"),
            (["--robust-images", "5"], 2, "--robust-images needs --adversarial madry or trades"),
            (["--adversarial", "madry", "--beta", "1"], 2, "--beta needs --adversarial trades"),
            (["--adversarial", "trades", "--inner-loss", "ce"], 2, "--inner-loss needs --adversarial madry"),
            (["--milestones", "5"], 1, "milestones must be given with schedule 'multistep' and with no other"),
            (["--schedule", "multistep", "--milestones", "5,40"], 2, "40 is not before the last of 40 epochs"),
            (["--adversarial", "trades", "--eps", "0.1,0.2"], 2, "'0.1,0.2' must be one number"),
            (["--milestones", "a"], 2, "'a' must be epochs such as 75,90"),
            (["--tau", "1"], 1, "tau of ce must be 0"),
            (["--lr", "0"], 1, "learning_rate must be above 0 and below 1e+30, got 0"),
            (["--schedule", "multistep"], 1, "milestones must be given with schedule 'multistep'"),
            (["--amp", "float16"], 1, "amp 'float16' needs a CUDA device"),
            (["--device", "abacus"], 2, "cannot use 'abacus' here"),
            (["--loss", "gce", "--label-smoothing", "0.1"], 1, "label_smoothing must be 0 with loss gce, got 0.1"),
            (["--loss", "hinge"], 2, "unknown loss 'hinge'; the losses are ce, uniform"),
            (["--resume"], 2, "holds no training run to resume; to begin one there, leave out --resume or give other"),
            (["--data-dir", "data"], 2, "--data-dir needs a --dataset with files, which digits has not"),
        ],
    )
    def test_bad_options(self, tmp_path: Path, options: list[str], code: int, message: str) -> None:
        result = self.invoke(*options, "--out", str(tmp_path / "never"))
        assert result.exit_code == code, result.output
        flat = " ".join(result.output.replace("│", " ").split())
        assert message in flat
        assert not (tmp_path / "never").exists()

    def test_killed_before_it_wrote_anything(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """The same command with --resume begins the run; where it had no options, the lock that is left tells."""
        assert self.settings(monkeypatch, tmp_path, "--resume", "--loss", "kl").loss.name == "kl"
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").touch()
        assert self.settings(monkeypatch, tmp_path, "--resume") == TrainingSettings()

    def test_a_file_where_the_folder_should_be(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("COLUMNS", "1000")
        file = tmp_path / "file"
        file.touch()
        for out, what in ((file, "it"), (file / "below", str(file))):
            result = self.invoke("--out", str(out))
            assert result.exit_code == 2
            assert f"Invalid value for --out: cannot write to {out}: {what} is a file, not a folder" in result.output

    def test_missing_data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(*_: Any, **__: Any) -> Split:
            raise FileNotFoundError("expected train-images-idx3-ubyte in data/")

        monkeypatch.setattr(engine, "load", missing)
        result = self.invoke("--out", str(tmp_path / "never"))
        assert result.exit_code == 1
        assert result.output.strip() == "Error: expected train-images-idx3-ubyte in data/"
        assert not (tmp_path / "never").exists()

    def test_help(self) -> None:
        text = " ".join(self.invoke("--help").output.split())
        for word in ("torchrun", "kill -9", "test images are never loaded", "cifar10, cifar100"):
            assert word in text
