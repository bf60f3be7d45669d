"""A comparison as a set of training runs: killed and resumed, filled by others, shared; its options; its checks."""

from __future__ import annotations

import ctypes
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from drsl_kernels.robustness import command_parts, compare_command, engine, experiment
from drsl_kernels.robustness.attack_names import AttackParameters
from drsl_kernels.robustness.cascade_checks import black_box_after_gradients, last_attack, late_starts
from drsl_kernels.robustness.commands import drsl
from drsl_kernels.robustness.judging import Judging, RunResult
from drsl_kernels.robustness.loss_names import ALL_LOSSES, DEFAULT_TAUS
from drsl_kernels.robustness.losses import TrainingLoss
from drsl_kernels.robustness.masking import Check
from drsl_kernels.robustness.models import small_cnn
from drsl_kernels.robustness.run_checks import findings
from drsl_kernels.robustness.settings import TrainingSettings, default_settings
from drsl_kernels.robustness.timing import plan_timing
from drsl_kernels.robustness.train import Recipe
from drsl_kernels.robustness.training_logs import EpochRow

pytestmark = pytest.mark.usefixtures("one_thread")

CE, DRSL = TrainingLoss("ce"), TrainingLoss("non_target_logits", 0.3)
NUMBERS = ["--epochs", "3", "--batch-size", "8", "--samples", "40", "--eps", "0.05", "--steps", "2", "--restarts", "1"]
TINY = ["--losses", "ce,non_target_logits", "--seeds", "1", *NUMBERS, "--check-images", "10"]
RUNS = ["ce-tau0-seed0", "non_target_logits-tau0.3-seed0"]


def leave_out_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing and timing take most of the time of a tiny comparison."""
    monkeypatch.setattr(compare_command, "draw_pictures", lambda *_: None)
    monkeypatch.setattr(compare_command, "write_pages", lambda *_: None)
    monkeypatch.setattr("drsl_kernels.robustness.timing.ROUNDS", 1)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_pictures(monkeypatch)


def invoke(command: str, *options: object) -> str:
    result = CliRunner().invoke(drsl, [command, *map(str, options)], env={"COLUMNS": "500"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        leave_out_pictures(patch)
        invoke("compare", *TINY, "--out", folder)
    return folder


def outcome(folder: Path) -> dict[str, Any]:
    """What a comparison left, but for seconds."""
    content = json.loads((folder / "results.json").read_text())
    for run in content["runs"]:
        for row in run["epochs"]:
            del row["seconds"]
    for line in content["summary"]:
        del line["seconds_per_epoch"], line["ratio_to_cross_entropy"]
    return {name: content[name] for name in ("runs", "checks", "summary", "settings")}


KILLED = """
import os, signal, sys
from drsl_kernels.robustness import experiment
from drsl_kernels.robustness.commands import drsl
left = int(sys.argv.pop(1))
def batch(self):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
experiment._CHECKPOINT_SECONDS = 1e-9
experiment.Epochs.batch = batch
drsl(sys.argv[1:])
"""


class TestRuns:
    @pytest.mark.slow
    @pytest.mark.parametrize("batches", [8, 22])  # in the second epoch of the first run and of the second
    def test_killed_in_the_middle_of_an_epoch(
        self, undisturbed: Path, tmp_path: Path, batches: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = [sys.executable, "-c", KILLED, str(batches), "compare", *TINY, "--out", str(tmp_path)]
        done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "results.json").exists()
        begun: list[tuple[int, int]] = []
        begin = experiment.Epochs.begin

        def spy(self: Any, settings: TrainingSettings, epoch: int, batches: int, batch: int) -> None:
            begun.append((epoch, batch))
            begin(self, settings, epoch, batches, batch)

        monkeypatch.setattr(experiment.Epochs, "begin", spy)
        invoke("compare", *TINY, "--out", tmp_path)
        assert begun[0] == (2, 2 if batches == 8 else 1)
        assert outcome(tmp_path) == outcome(undisturbed)
        for run in RUNS:
            best = [(folder / "runs" / run / "best.pt").read_bytes() for folder in (tmp_path, undisturbed)]
            assert best[0] == best[1]

    def test_seeds_and_losses_from_several_commands(
        self, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for loss in ("non_target_logits", "ce"):
            invoke("compare", *TINY, "--losses", loss, "--out", tmp_path)
        monkeypatch.setattr(experiment, "judge", None)
        assert "used again: 2 of 2 runs" in invoke("compare", *TINY, "--out", tmp_path)
        assert outcome(tmp_path) == outcome(undisturbed)

    def test_a_run_of_drsl_train_counts(
        self, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        numbers = ["--epochs", "3", "--batch-size", "8", "--samples", "40", "--no-tensorboard"]
        for run, loss in zip(RUNS, ("ce", "non_target_logits"), strict=True):
            invoke("train", "--loss", loss, *numbers, "--out", tmp_path / "runs" / run)
        monkeypatch.setattr(engine, "train_epoch", None)
        invoke("compare", *TINY, "--out", tmp_path)
        assert outcome(tmp_path) == outcome(undisturbed)

    def test_another_number_of_threads_is_no_other_run(
        self, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
        (tmp_path / "runs" / RUNS[0] / "judged.json").unlink()
        monkeypatch.setattr(engine, "train_epoch", None)
        judged_on: list[int] = []
        judge = experiment.judge

        def spy(*arguments: Any, **options: Any) -> RunResult:
            judged_on.append(torch.get_num_threads())
            return judge(*arguments, **options)

        monkeypatch.setattr(experiment, "judge", spy)
        said = invoke("compare", *TINY, "--threads", "2", "--out", tmp_path)
        assert "used again: 1 of 2 runs" in said
        assert "made anew" not in said
        assert judged_on == [1]
        assert [run["threads"] for run in outcome(tmp_path)["runs"]] == [1, 1]
        assert outcome(tmp_path)["runs"] == outcome(undisturbed)["runs"]

    def test_a_path_is_printed_as_it_is(self, undisturbed: Path, tmp_path: Path) -> None:
        out = tmp_path / "cm[/b]p:+1:"
        shutil.copytree(undisturbed / "runs", out / "runs")
        assert f"Written to {out}: results.json" in invoke("compare", *TINY, "--out", out)

    def test_a_comparison_that_cannot_be_timed(
        self, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def diverges(*arguments: object, **options: object) -> None:
            raise FloatingPointError("the loss is nan")

        shutil.copytree(undisturbed / "runs", tmp_path / "runs")
        monkeypatch.setattr(experiment, "time_epochs", diverges)
        said = invoke("compare", *TINY, "--out", tmp_path)
        assert "not timed: at a constant learning rate training diverged" in said
        lines = json.loads((tmp_path / "results.json").read_text())["summary"]
        assert [(line["seconds_per_epoch"], line["ratio_to_cross_entropy"]) for line in lines] == [(None, None)] * 2
        assert outcome(tmp_path) == outcome(undisturbed)

    def test_drsl_attack_takes_its_checkpoints(self, undisturbed: Path, tmp_path: Path) -> None:
        weights = undisturbed / "runs" / RUNS[1] / "best.pt"
        numbers = ["--samples", "40", "--eps", "0.05", "--steps", "2", "--restarts", "1", "--check-samples", "0"]
        invoke("attack", weights, *numbers, "--attacks", "pgd:training", "--out", tmp_path)
        (entry,) = json.loads((tmp_path / "results.json").read_text())["checkpoints"]
        assert entry["clean_accuracy"] == outcome(undisturbed)["runs"][1]["clean_accuracy"]

    def test_the_best_epoch_is_judged(self, undisturbed: Path) -> None:
        for run in outcome(undisturbed)["runs"]:
            scores = [row["validation_accuracy"] for row in run["epochs"]]
            assert run["best_epoch"] == scores.index(max(scores)) + 1

    def test_every_loss_every_kind_of_attack_and_label_noise(self, tmp_path: Path) -> None:
        names = [name for name in ALL_LOSSES if name not in ("ce", "uniform")]
        options = ["--label-noise", "0.2", "--attacks", "square,fgsm,pgd-t,pgd:training,apgd-t", "--iterations", "2"]
        options += ["--queries", "5", "--targets", "2", "--epochs", "1", "--samples", "20"]
        text = invoke("compare", *TINY, *options, "--losses", ",".join(names), "--out", tmp_path)
        found = outcome(tmp_path)
        assert [run["loss"] for run in found["runs"]] == names
        assert found["settings"]["attacks"] == ["fgsm:log_odds", "pgd-t:margin", "pgd:training", "apgd-t", "square"]
        assert "Square with 5 queries" in text
        for run in found["runs"]:
            outcomes = {check["name"]: check["outcome"] for check in run["checks"]}
            assert outcomes["black box"] in ("passed", "warning")  # gradients and Square have been run
        settings = engine.read_settings(tmp_path / "runs" / "label_smoothing-tau0.1-seed0")
        assert settings is not None
        assert settings.loss == TrainingLoss("label_smoothing", 0.1)


class TestOptions:
    @pytest.fixture
    def settings(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
        """The settings that a command line comes to."""

        class Seen(Exception):  # noqa: N818
            pass

        def compare(settings: experiment.Settings, *_: object, **__: object) -> None:
            raise Seen(settings)

        monkeypatch.setattr(compare_command, "compare", compare)

        def read(*options: str) -> experiment.Settings:
            result = CliRunner().invoke(drsl, ["compare", *options, "--out", str(tmp_path)])
            assert isinstance(result.exception, Seen), result.output
            found: experiment.Settings = result.exception.args[0]
            return found

        return read

    def test_defaults_are_those_of_the_data_set(self, settings: Any) -> None:
        assert settings() == experiment.Settings()
        cifar = settings("--dataset", "cifar10").training
        assert (cifar.model, cifar.recipe.epochs, cifar.recipe.optimizer) == ("resnet18", 100, "sgd")
        assert cifar.threads == torch.get_num_threads()

    def test_quick_try(self, settings: Any) -> None:
        found = settings("--samples", "50")
        assert (found.training.samples, found.judging.images) == (50, 50)
        found = settings("--samples", "50", "--test-images", "20")
        assert (found.training.samples, found.judging.images) == (50, 20)

    @pytest.mark.parametrize(
        ("dataset", "options", "expected"),
        [
            ("digits", [], (0.1, 0.025, 10)),
            ("mnist", [], (0.3, 0.01, 40)),
            ("digits", ["--train-eps", "0.2"], (0.2, 0.05, 10)),
            ("digits", ["--train-steps", "5"], (0.1, 0.05, 5)),
            ("cifar10", ["--train-eps", "4/255", "--train-steps", "20"], (4 / 255, 0.5 / 255, 20)),
        ],
    )
    def test_the_steps_of_adversarial_training_follow_its_radius(
        self, settings: Any, dataset: str, options: list[str], expected: tuple[float, float, int]
    ) -> None:
        attack = settings("--dataset", dataset, "--adversarial", "madry", *options).training.recipe.adversarial
        assert (attack.eps, pytest.approx(attack.alpha), attack.steps) == expected

    def test_attacks_without_gradients_come_last(self) -> None:
        assert Judging(attacks=("square", "pgd", "fgsm")).attacks == ("pgd:log_odds", "fgsm:log_odds", "square")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"epsilons": ()}, "eps must be between 0 and 1"),
            ({"attacks": ()}, "attacks must not be empty"),
            ({"attacks": ("transfer",)}, "needs a checkpoint to transfer from"),
            ({"images": 0}, "images must be 1 or more, got 0"),
        ],
    )
    def test_bad_judging(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Judging(**arguments)


def result(fell: list[tuple[int, int, int]]) -> RunResult:
    row = EpochRow(1, 0.1, 1.0, 1.0, None, 0.5, 1.0, 0.5, None, 1.0)
    return RunResult(CE, 0, len(fell), 0.5, (0.5,), (row,), 1, tuple(fell), (), (), (), ())


STANDS = (2, -1, 0)


class TestCascadeChecks:
    judging = Judging(epsilons=(0.1, 0.2), attacks=("pgd:log_odds", "pgd:ce", "square"))

    def test_black_box(self) -> None:
        nothing = result([(0, 0, 1)] * 5 + [STANDS] * 95)
        assert black_box_after_gradients(nothing, self.judging, 0).outcome == "passed"
        broken = result([(0, 0, 1)] * 5 + [(1, 2, 1)] * 3 + [STANDS] * 92)
        assert black_box_after_gradients(broken, self.judging, 0).outcome == "passed"
        check = black_box_after_gradients(broken, self.judging, 1)
        assert (check.outcome, check.eps) == ("warning", 0.2)
        assert "attacks without gradients break 3.0 % of all images" in check.sentence
        for attacks in (("pgd",), ("square",)):
            assert black_box_after_gradients(nothing, Judging((0.1,), attacks), 0).outcome == "not run"

    @pytest.mark.parametrize(
        ("fell", "expected"),
        [
            ((0, 0, 3), "passed"),  # early: starts 1 to 3 of 5
            ((0, 1, 4), "warning"),  # late, and no attack came after
            ((0, 0, 4), "not run"),  # late, but the next attack might have broken them at its first start
            ((1, 1, 4), "passed"),  # at another radius
            ((-1, -1, 0), "passed"),  # never right
        ],
    )
    def test_late_starts(self, fell: tuple[int, int, int], expected: str) -> None:
        assert late_starts(result([fell] * 2 + [STANDS] * 98), self.judging, 0).outcome == expected
        assert late_starts(result([fell] + [STANDS] * 99), self.judging, 0).outcome == "passed"

    @pytest.mark.parametrize(
        ("fell", "expected"),
        [
            ((0, 1, 1), "warning"),  # to the last attack with gradients
            ((0, 0, 1), "passed"),  # to the first
            ((0, 2, 1), "passed"),  # to the one without gradients
            ((1, 1, 1), "passed"),  # at another radius
            ((-1, -1, 0), "passed"),  # never right
        ],
    )
    def test_last_attack(self, fell: tuple[int, int, int], expected: str) -> None:
        check = last_attack(result([fell] * 2 + [STANDS] * 98), self.judging, 0)
        assert (check.outcome, check.eps, check.numbers["attack"]) == (expected, 0.1, "pgd:ce")
        assert last_attack(result([fell] + [STANDS] * 99), self.judging, 0).outcome == "passed"

    def test_a_weak_last_attack_tells_nothing(self) -> None:
        judging = replace(self.judging, attacks=("pgd:log_odds", "pgd:margin", "pgd:ce"))
        check = last_attack(result([(0, 0, 1)] * 20 + [(0, 1, 1)] * 5 + [STANDS] * 75), judging, 0)
        assert (check.outcome, check.numbers["after_the_first"]) == ("not run", 0.05)
        assert "pgd:ce, the last attack with gradients, still broke 0.0 % of the images" in check.sentence
        few = result([(0, 0, 1)] * 10 + [(0, 1, 1)] * 5 + [(0, 2, 1)] + [STANDS] * 24)
        assert last_attack(few, judging, 0).outcome == "not run"  # one image is no sign, of either

    @pytest.mark.parametrize("attacks", [("pgd:log_odds",), ("pgd:log_odds", "square"), ("pgd:log_odds", "fgsm:ce")])
    def test_one_attack_over_many_steps_tells_nothing(self, attacks: tuple[str, ...]) -> None:
        everything = result([(0, 0, 1), (0, 1, 1), STANDS])
        assert last_attack(everything, Judging((0.1,), attacks), 0).outcome == "not run"

    def test_a_single_start_tells_nothing(self) -> None:
        judging = replace(self.judging, parameters=AttackParameters(restarts=1))
        assert late_starts(result([STANDS]), judging, 0).outcome == "not run"


def test_findings_count_seeds_and_show_the_worst() -> None:
    def check(outcome: Any, late: float | None, eps: float) -> Check:
        return Check("restarts", outcome, f"{late}", {} if late is None else {"broken_by_later_half": late}, eps)

    first = [check("passed", 0.001, 0.1), check("warning", 0.02, 0.2)]
    second = [check("warning", 0.03, 0.1), check("warning", 0.05, 0.2)]
    third = [check("passed", 0.001, 0.1), check("not run", None, 0.0)]
    (found,) = findings(DRSL, [first, second, third])
    assert (found.outcome, found.warns, found.seeds, found.sentence, found.eps) == ("warning", 2, 3, "0.05", 0.2)
    assert found.in_words() == "non_target_logits tau=0.3, restarts, eps 0.2: 2 of 3 seeds warn; 0.05"
    (quiet,) = findings(CE, [third])
    assert (quiet.outcome, quiet.in_words()) == ("passed", "ce, restarts, eps 0.1: 0.001")
    (unsure,) = findings(CE, [[*third, check("not run", 0.04, 0.3)]])
    assert (unsure.outcome, unsure.sentence) == ("not run", "0.04")


class TestMemory:
    def test_what_is_asked_of_glibc(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        class Library:
            def mallopt(self, parameter: int, value: int) -> int:
                asked.append((parameter, value))
                return int(parameter == -1 or value < 2**30)  # as older releases do

        monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
        command_parts.keep_freed_memory()
        assert asked == [(-1, 2**31 - 1), (-3, 2**30), (-3, 2**25)]
        monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
        command_parts.keep_freed_memory()

    @pytest.mark.parametrize("command", ["train", "attack", "compare"])
    def test_every_command_asks(self, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        class AskedError(Exception):
            pass

        def ask() -> None:
            raise AskedError

        monkeypatch.setattr(f"drsl_kernels.robustness.{command}_command.keep_freed_memory", ask)
        options = ["nothing.pt"] if command == "attack" else ["--out", str(tmp_path)]
        assert isinstance(CliRunner().invoke(drsl, [command, *options]).exception, AskedError)

    def test_an_import_asks_for_nothing(self) -> None:
        program = (
            "import ctypes\n"
            "seen = []\n"
            "real = ctypes.CDLL\n"
            "ctypes.CDLL = lambda name, *a, **k: (seen.append(name), real(name, *a, **k))[1]\n"
            "import drsl_kernels.robustness.commands\n"
            "assert None not in seen, seen\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True)


def test_timing_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drsl_kernels.robustness.timing.ROUNDS", 20)
    x, y = torch.rand(100, 1, 8, 8), torch.zeros(100, dtype=torch.int64)
    short = plan_timing(4, lambda: small_cnn(0), x, y, Recipe(batch_size=10))
    assert (short.images, short.rounds) == (100, 20)
    assert short.in_words() == "median of 20 training epochs"
    monkeypatch.setattr("drsl_kernels.robustness.timing._SECONDS", 1e-9)
    bounded = plan_timing(4, lambda: small_cnn(0), x, y, Recipe(batch_size=10))
    assert (bounded.images, bounded.all_images, bounded.rounds) == (10, 100, 5)


def test_the_images_of_training_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def plan(losses: int, make: object, x: torch.Tensor, *rest: object) -> None:
        seen.append(len(x))
        raise FloatingPointError("the loss is nan")

    said: list[str] = []
    monkeypatch.setattr(experiment, "plan_timing", plan)
    progress = SimpleNamespace(note=said.append)
    for images in (None, 40):
        settings = experiment.Settings(replace(default_settings("digits"), samples=images))
        assert experiment._time(settings, [CE], 0, progress) == ({}, None)  # type: ignore[arg-type]
    assert seen == [1000, 40]  # 297 of the 1297 choose the epoch
    assert said == ["The losses are not timed: the loss is nan"] * 2


def test_defaults_cover_every_loss() -> None:
    assert DEFAULT_TAUS.keys() == set(ALL_LOSSES)
