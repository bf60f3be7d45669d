"""The command `drsl attack`: options, tables, files, and what is used again. What it says where it cannot work is in
test_lab_attack_failures.py, which takes its checkpoints from here.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_lab_attacks import trained_cnn

from drsl_kernels.robustness import TrainingLoss, attack_run
from drsl_kernels.robustness.attack_names import (
    AttackParameters,
    attacks_in_words,
    canonical_names,
    describe,
    make_attack,
)
from drsl_kernels.robustness.attack_run import AttackSettings
from drsl_kernels.robustness.checkpoint import save_checkpoint
from drsl_kernels.robustness.commands import drsl

pytestmark = pytest.mark.usefixtures("one_thread")


Pair = tuple[Path, Path]  # two checkpoints
Done = tuple[Path, str]  # the folder of the results, and what was printed
Run = Callable[..., Any]


def drsl_attack(*options: object) -> Any:
    return CliRunner().invoke(drsl, ["attack", *map(str, options)], env={"COLUMNS": "200"})


def checkpoint(path: Path, loss: TrainingLoss, **about: object) -> Path:
    """A checkpoint of the small CNN, as `drsl train` writes it."""
    path.parent.mkdir(parents=True)
    content = {
        "format": 1,
        "about": {
            "dataset": "digits",
            "model": "small_cnn",
            "shape": [1, 8, 8],
            "classes": 10,
            "seed": 0,
            "mean": [0.0],
            "std": [1.0],
            "loss": {"name": loss.name, "tau": loss.tau},
            "recipe": {},
            "data_dir": None,
            "drsl_kernels": "0",
            "torch": "0",
        }
        | about,
        "model": trained_cnn(loss, epochs=3).state_dict(),
    }
    save_checkpoint(path, content)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("runs")
    losses = TrainingLoss("ce"), TrainingLoss("non_target_logits", 0.3)
    first, second = (checkpoint(folder / loss.name / "best.pt", loss) for loss in losses)
    return first, second


TINY = [
    *("--attacks", "fgsm:ce,pgd,pgd:training,pgd-t", "--eps", "0.1,8/255", "--steps", "3", "--restarts", "2"),
    *("--samples", "40", "--check-samples", "20"),
]
NAMES = ["fgsm:ce", "pgd:log_odds", "pgd:training", "pgd-t:margin", "transfer:log_odds"]


@pytest.fixture(scope="module")
def finished(trained: Pair, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("attack") / "new" / "folder"
    torch.set_num_threads(2)
    result = drsl_attack(*trained, *TINY, "--transfer-from", trained[0], "--out", folder)
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == 2  # not the 1 of --threads
    torch.set_num_threads(1)
    return folder, result.output


@pytest.fixture
def again(finished: Done, trained: Pair, tmp_path: Path) -> Run:
    """Runs the same once more, with further options, over a copy of what the first run kept."""
    (tmp_path / "parts").mkdir()
    for path in (finished[0] / "parts").iterdir():
        (tmp_path / "parts" / path.name).write_bytes(path.read_bytes())

    def run(*options: object) -> Any:
        result = drsl_attack(*trained, *TINY, "--transfer-from", trained[0], "--out", tmp_path, *options)
        assert result.exit_code == 0, result.output
        return result

    return run


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


class TestOutcome:
    def test_files(self, finished: Done) -> None:
        assert sorted(os.listdir(finished[0])) == ["parts", "results.csv", "results.json"]
        assert not [name for name in os.listdir(finished[0] / "parts") if name.startswith(".")]

    def test_json(self, finished: Done, trained: Pair) -> None:
        content = results(finished[0])
        assert content["settings"]["epsilons"] == [8 / 255, 0.1]
        assert [entry["path"] for entry in content["checkpoints"]] == [str(path) for path in trained]
        first, second = content["checkpoints"]
        assert first["about"]["loss"] == {"name": "ce", "tau": 0.0}
        assert list(dict.fromkeys(line["attack"] for line in second["attacks"])) == NAMES
        # A model is no stranger to itself.
        assert list(dict.fromkeys(line["attack"] for line in first["attacks"])) == NAMES[:-1]
        for entry in (first, second):
            worst = {line["eps"]: line["accuracy"] for line in entry["worst_case"]}
            assert list(worst) == [8 / 255, 0.1]
            assert worst[0.1] <= worst[8 / 255] <= entry["clean_accuracy"]
            for line in entry["attacks"]:
                assert worst[line["eps"]] <= line["accuracy"] <= entry["clean_accuracy"]
                assert line["standing_after_each_start"][-1] == round(40 * line["accuracy"])
                assert len(line["standing_after_each_start"]) == (1 if line["attack"] == "fgsm:ce" else 2)
            assert {(check["name"], check["eps"]) for check in entry["checks"]} >= {
                *((name, None) for name in ("gradients", "saturation", "randomness", "large eps", "growing eps")),
                *((name, eps) for name in ("black box", "restarts", "steps") for eps in (8 / 255, 0.1)),
            }

    def test_csv(self, finished: Done, trained: Pair) -> None:
        with (finished[0] / "results.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == 2 * (1 + 2) + 2 * (4 + 5)
        assert all(int(line["correct"]) == round(40 * float(line["accuracy"])) for line in lines)
        second = [line for line in lines if line["checkpoint"] == str(trained[1])]
        assert [line["attack"] for line in second] == ["none", *NAMES, *NAMES, "worst_case", "worst_case"]
        assert {line["norm"] for line in lines} == {"linf"}

    def test_printed(self, finished: Done) -> None:
        for text in (
            *NAMES,
            *("eps 0.03137", "eps 0.1", "worst case", "best.pt: small_cnn on digits, non_target_logits tau=0.3;"),
            *("percent of 40 test images of digits", "PGD with 3 steps and 2 random starts"),
            *("passed  randomness: the model answers the same when asked twice", "restarts, eps 0.1: "),
            "not run black box, eps 0.1: no Square and no transfer attack was run",
        ):
            assert text in finished[1]


class TestUsedAgain:
    def test_all_of_it(self, again: Run, finished: Done, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(attack_run, "run_attack", None)  # nothing may be attacked
        monkeypatch.setattr("drsl_kernels.robustness.masking.pgd", None)
        result = again()
        assert "used again: 30 attacks and checks" in result.output
        assert results(tmp_path) == results(finished[0])

    def test_the_same_numbers_afresh(self, again: Run, finished: Done, tmp_path: Path) -> None:
        assert "used again" not in again("--fresh").output
        old, new = results(finished[0]), results(tmp_path)
        for content in (old, new):
            for entry in content["checkpoints"]:
                for line in entry["attacks"]:
                    del line["seconds"]
        assert new == old

    def test_one_attack_more_runs_that_alone(self, again: Run, monkeypatch: Any) -> None:
        ran = []
        run_attack = attack_run.run_attack
        monkeypatch.setattr(
            attack_run, "run_attack", lambda *a, **o: (ran.append((a[3].name, a[4])), run_attack(*a, **o))[1]
        )
        again("--attacks", "pgd:margin,pgd,transfer", "--eps", "0.1")
        assert ran == [("pgd:margin", 0.1)] * 2

    def test_the_order_of_attacks_does_not_matter(self, again: Run, finished: Any, tmp_path: Path) -> None:
        again("--fresh", "--attacks", "pgd,transfer", "--eps", "0.1")
        before = [line for line in results(finished[0])["checkpoints"][1]["attacks"] if line["eps"] == 0.1]
        after = results(tmp_path)["checkpoints"][1]["attacks"]
        assert [line["standing_after_each_start"] for line in after] == [
            line["standing_after_each_start"]
            for line in before
            if line["attack"] in ("pgd:log_odds", "transfer:log_odds")
        ]

    @pytest.mark.parametrize(
        ("options", "count"),
        [
            (["--steps", "2"], 4 + 12),  # the single steps, and the checks
            (["--samples", "39"], 0),
            (["--seed", "1"], 0),
            (["--held-out", "validation"], 0),
            (["--batch-size", "30"], 0),
            (["--norm", "l2", "--attacks", "pgd"], 0),
            (["--targets", "2"], 30 - 2 * 2),  # all but pgd-t
        ],
    )
    def test_other_options(self, again: Run, options: list[str], count: int) -> None:
        output = again(*options).output
        assert (f"used again: {count} attacks" in output) if count else ("used again" not in output)

    def test_another_checkpoint_of_the_same_name(self, again: Run, trained: Pair, tmp_path: Path) -> None:
        other = checkpoint(tmp_path / "ce" / "best.pt", TrainingLoss("uniform", 0.1))
        result = drsl_attack(other, *TINY, "--out", tmp_path)
        assert result.exit_code == 0, result.output
        assert "used again" not in result.output

    def test_the_table_of_other_checkpoints_is_kept(self, trained: Pair, tmp_path: Path) -> None:
        options = ("--attacks", "fgsm", "--samples", 20, "--check-samples", 0, "--out", tmp_path)
        kept = tmp_path / "replaced-1"
        assert "kept" not in drsl_attack(trained[0], *options).output
        before = results(tmp_path)
        assert f"are of other checkpoints. They are kept in {kept}" in drsl_attack(trained[1], *options).output
        assert results(kept) == before
        assert sorted(os.listdir(kept)) == ["results.csv", "results.json"]
        assert "kept" not in drsl_attack(*trained, *options).output  # these are among them
        assert [entry["path"] for entry in results(tmp_path)["checkpoints"]] == [str(path) for path in trained]

    @pytest.mark.parametrize("content", ["", "{}", "[]", None])
    def test_what_is_not_whole_is_not_trusted(self, again: Run, tmp_path: Path, content: str | None) -> None:
        paths = sorted((tmp_path / "parts").iterdir())
        for path in paths:
            whole = json.loads(path.read_text())
            whole["result"] = whole["result"] | {"fell": [0, 1]} if "fell" in whole["result"] else {"name": "x"}
            path.write_text(json.dumps(whole) if content is None else content)
        assert "used again" not in again().output

    def test_an_interrupted_run_keeps_what_is_finished(self, trained: Pair, tmp_path: Path, monkeypatch: Any) -> None:
        calls = []
        run_attack = attack_run.run_attack

        def third_fails(*arguments: Any, **options: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 3:
                raise FloatingPointError("the model's logits are NaN; look at its weights")
            return run_attack(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(attack_run, "run_attack", third_fails)
            result = drsl_attack(trained[0], *TINY, "--out", tmp_path)
        assert result.exit_code == 1
        assert f"Error: {trained[0]}: the model's logits are NaN" in result.output
        assert os.listdir(tmp_path) == ["parts"]
        assert len(os.listdir(tmp_path / "parts")) == 2
        result = drsl_attack(trained[0], *TINY, "--out", tmp_path)
        assert "used again: 2 attacks and checks" in result.output


class TestOptions:
    def test_autoattack(self, trained: Pair, tmp_path: Path) -> None:
        pytest.importorskip("pyautoattack")
        options = ["--attacks", "autoattack", "--iterations", "3", "--queries", "20", "--targets", "2"]
        result = drsl_attack(trained[0], *options, "--eps", "0.1", "--samples", "20", "--out", tmp_path)
        assert result.exit_code == 0, result.output
        names = [line["attack"] for line in results(tmp_path)["checkpoints"][0]["attacks"]]
        assert names == ["apgd-ce", "apgd-t", "fab-t", "square"]

    def test_autoattack_is_missing(self, trained: Pair, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setitem(sys.modules, "pyautoattack", None)
        result = drsl_attack(trained[0], "--attacks", "pgd,square", "--out", tmp_path / "never")
        assert result.exit_code == 1
        assert "need the package 'pyautoattack': pip install 'drsl_kernels[autoattack]'" in result.output
        assert not (tmp_path / "never").exists()

    def test_l2_and_no_checks(self, trained: Pair, tmp_path: Path) -> None:
        options = ["--attacks", "pgd:margin", "--norm", "l2", "--steps", "3", "--samples", "20", "--check-samples", "0"]
        result = drsl_attack(trained[0], *options, "--out", tmp_path)
        assert result.exit_code == 0, result.output
        entry = results(tmp_path)["checkpoints"][0]
        assert entry["checks"] == []
        assert [line["eps"] for line in entry["worst_case"]] == [0.5]
        assert entry["worst_case"][0]["accuracy"] < entry["clean_accuracy"]

    def test_a_path_is_printed_as_it_is(self, trained: Pair, tmp_path: Path) -> None:
        """Brackets are no markup: an unopened one is no error, and none is left out."""
        path = tmp_path / "[/x]" / "[bold]:+1:.pt"
        path.parent.mkdir(parents=True)
        shutil.copy(trained[1], path)
        out = tmp_path / "o[/bold]4"
        sources = ("--transfer-from", path, "--transfer-from", trained[0])
        options = ("--attacks", "transfer", "--samples", 3, "--check-samples", 0, "--steps", 1, "--restarts", 1)
        result = CliRunner().invoke(
            drsl, ["attack", *map(str, (trained[0], *sources, *options, "--out", out))], env={"COLUMNS": "1000"}
        )
        assert result.exit_code == 0, result.output
        assert f"transfer:log_odds from {path}" in result.output
        result = drsl_attack(path, "--attacks", "pgd", *options[2:], "--out", out)
        assert result.exit_code == 0, result.output
        assert f"{path}: small_cnn on digits" in result.output
        assert f"Written to {out}: results.json" in result.output

    def test_several_sources_have_names_of_their_own(self, trained: Pair, tmp_path: Path) -> None:
        sources = [option for path in trained for option in ("--transfer-from", path)]
        options = ["--attacks", "transfer:ce", *sources, "--eps", "0.1", "--samples", "20", "--check-samples", "0"]
        result = drsl_attack(trained[0], *options, "--out", tmp_path)
        assert result.exit_code == 0, result.output
        (line,) = results(tmp_path)["checkpoints"][0]["attacks"]
        assert line["attack"] == f"transfer:ce from {trained[1]}"

    def test_help(self) -> None:
        text = " ".join(drsl_attack("--help").output.split())
        for word in ("--attacks", "--transfer-from", "apgd-ce", "8/255", "autoattack", "--check-samples"):
            assert word in text


class TestNames:
    def test_canonical(self) -> None:
        assert canonical_names(["pgd", "pgd:log_odds", "fgsm:ce", "autoattack", "square"]) == (
            *("pgd:log_odds", "fgsm:ce", "apgd-ce", "apgd-t", "fab-t", "square"),
        )

    @pytest.mark.parametrize("name", ["fgsm:ce", "pgd:dlr", "pgd:training", "pgd-t:margin", "apgd-ce", "square"])
    def test_an_attack_has_the_name_that_made_it(self, name: str) -> None:
        def training(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return logits.sum(1)

        attack = make_attack(name, AttackParameters(), training_loss=training)
        assert attack.name == name
        assert json.loads(json.dumps(describe(attack)))["kind"] == type(attack).__name__

    def test_in_words(self) -> None:
        numbers = AttackParameters(iterations=50, targets=3, queries=500)
        assert attacks_in_words(canonical_names(["autoattack"]), numbers) == (
            "APGD-CE and APGD-T (3 targets) with 50 steps, FAB-T (3 targets) with 50 steps, Square with 500 queries"
        )
        assert attacks_in_words(["apgd-ce"], numbers) == "APGD-CE with 50 steps"
        assert attacks_in_words(["apgd-ce", "apgd-dlr", "apgd-t"], AttackParameters(targets=1)) == (
            "APGD-CE, APGD-DLR and APGD-T (1 target) with 100 steps"
        )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"epsilons": ()}, "epsilons must be 0 or more and finite, and at least one, got \\(\\)"),
            ({"epsilons": (-1,)}, "epsilons must be 0 or more and finite"),
            ({"attacks": ()}, "attacks must not be empty"),
            ({"attacks": ("hinge",)}, "unknown attack 'hinge'"),
            ({"samples": 0}, "samples must be 1 or more, got 0"),
            ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
            ({"check_samples": -1}, "check_samples must be 0 or more, got -1"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            AttackSettings(**settings)
        with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
            AttackParameters(steps=0)
        with pytest.raises(TypeError, match=r"queries must be an int, got 2.5"):
            AttackParameters(queries=2.5)  # type: ignore[arg-type]
