"""The command line `drsl`: options, output, files, and what is used again."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from drsl_kernels.robustness import compare_command
from drsl_kernels.robustness.cli import main
from drsl_kernels.robustness.command_parts import prepare_folder
from drsl_kernels.robustness.commands import drsl
from drsl_kernels.robustness.judging import Judging
from drsl_kernels.robustness.loss_names import ALL_LOSSES
from drsl_kernels.robustness.page import PAGES
from drsl_kernels.robustness.pictures import PICTURES

pytestmark = pytest.mark.usefixtures("one_thread")


def drsl_compare(*options: str) -> Any:
    return CliRunner().invoke(drsl, ["compare", *options])


TINY = [
    *("--losses", "ce,non_target_logits", "--seeds", "1", "--epochs", "2", "--samples", "40"),
    *("--eps", "0.05,8/255", "--steps", "2", "--restarts", "1", "--check-images", "20"),
]
RUNS = ["ce-tau0-seed0", "non_target_logits-tau0.3-seed0"]
FILES = ["best.pt", "checks.json", "judged.json", "last.pt", "metrics.csv", "settings.json"]


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

    def test_files(self, finished: tuple[Path, str]) -> None:
        folder, _ = finished
        assert sorted(os.listdir(folder)) == sorted(["results.json", "results.csv", "runs", *PICTURES, *PAGES])
        assert sorted(os.listdir(folder / "runs")) == RUNS
        for run in RUNS:
            assert sorted(os.listdir(folder / "runs" / run)) == FILES
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
        assert "per-sample worst case over PGD with 2 steps and 1 random start on log_odds, margin, ce" in flat
        assert "percent of 40 test images, a single seed" in flat
        assert "small_cnn on digits, at most 40 training images, 2 epochs of adam at 0.002 (constant)" in flat
        assert re.search(r"masking checks: \d+ of 18 warn, \d+ pass, \d+ cannot tell", flat)

    def test_json(self, finished: tuple[Path, str]) -> None:
        content = json.loads((finished[0] / "results.json").read_text())
        assert content["meaning"]["robust"].startswith("per-sample worst case over PGD with 2 steps")
        assert content["settings"]["epsilons"] == [8 / 255, 0.05]
        assert content["settings"]["held_out"] == "test"
        assert content["settings"]["training"]["recipe"]["epochs"] == 2
        assert content["environment"]["torch"] == torch.__version__
        assert [(line["loss"], line["tau"]) for line in content["summary"]] == [
            ("ce", 0.0),
            ("non_target_logits", 0.3),
        ]
        for line, run in zip(content["summary"], content["runs"], strict=True):
            assert line["clean_accuracy"] == {"mean": run["clean_accuracy"], "std": None}
            assert [value["eps"] for value in line["robust_accuracy"]] == [8 / 255, 0.05]
            assert line["robust_accuracy"][0]["mean"] == run["robust_accuracy"][0]["accuracy"]
            assert [row["epoch"] for row in run["epochs"]] == [1, 2]
            best = max(row["validation_accuracy"] for row in run["epochs"])
            assert run["epochs"][run["best_epoch"] - 1]["validation_accuracy"] == best
            left = [round(40 * run["clean_accuracy"]), *(round(40 * v["accuracy"]) for v in run["robust_accuracy"])]
            felled = [sum(row["images"] for row in run["felled_by"] if row["eps"] == eps) for eps in (8 / 255, 0.05)]
            assert felled == [left[0] - left[1], left[1] - left[2]]
            assert {check["name"] for check in run["checks"]} >= {"gradients", "large eps", "black box", "restarts"}
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

    def test_several_taus_and_seeds(self, tmp_path: Path) -> None:
        result = drsl_compare(*TINY, "--losses", "kl", "--tau", "kl=0.1,2", "--seeds", "2", "--out", str(tmp_path))
        assert result.exit_code == 0, result.output
        assert sorted(os.listdir(tmp_path / "runs")) == [
            f"kl-tau{tau}-seed{seed}" for tau in ("0.1", "2") for seed in (0, 1)
        ]
        assert "standard deviation over 2 seeds" in " ".join(result.output.split())
        summary = json.loads((tmp_path / "results.json").read_text())["summary"]
        assert [line["tau"] for line in summary] == [0.1, 2.0]
        assert all(line["clean_accuracy"]["std"] is not None for line in summary)

    def test_default_is_the_comparison_of_the_paper_with_cross_entropy(self) -> None:
        judging = Judging()
        assert 0.1 in judging.epsilons
        assert set(judging.attacks) == {"pgd:ce", "pgd:log_odds", "pgd:margin"}
        assert (judging.parameters.steps, judging.parameters.restarts) == (20, 5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                ["--tau", "uniform=1", "--tau", "ce+drsl=2"],
                "uniform is given twice; several values look like uniform=0.1,1",
            ),
            (["--losses", "hinge"], f"unknown loss 'hinge'; the losses are {', '.join(ALL_LOSSES)}"),
            (["--losses", ""], "unknown loss ''"),
            (["--attacks", "log_odds"], "unknown attack 'log_odds'; choose from fgsm, pgd"),
            (["--attacks", "pgd:hinge"], "unknown loss in attack 'pgd:hinge'"),
            (["--attacks", "pgd,transfer"], "transfer is an attack of drsl attack"),
            (["--train-eps", "0.1"], "--train-eps needs --adversarial madry or trades"),
            (["--adversarial", "madry", "--train-eps", "0"], "eps must be above 0 and finite, got 0.0"),
            (["--label-noise", "2"], "label_noise must be from 0 to 1, got 2.0"),
            (["--losses", "gce", "--tau", "gce=1"], "tau of gce must be 0"),
            (["--losses", "label_smoothing", "--tau", "label_smoothing=1"], "tau of label_smoothing must be below 1"),
            (["--check-images", "-1"], "-1 is not in the range x>=0"),
            (["--train-images", "0"], "0 is not in the range x>=1"),
            (["--test-images", "0"], "0 is not in the range x>=1"),
            (["--eps", "-0.1"], "'-0.1' is not from 0 to 1"),
            (["--eps", "nan"], "'nan' is not from 0 to 1"),
            (["--eps", "8"], "'8' is not from 0 to 1"),
            (["--eps", "1/0"], "'1/0' is neither a number such as 0.1 nor a fraction such as 8/255"),
            (["--eps", "0.1/"], "'0.1/' is neither a number"),
            (["--eps", "0.1,,"], "'' is neither a number"),
            (["--tau", "uniform"], "'uniform' must look like non_target_logits=0.3"),
            (["--tau", "uniform=nan"], "tau of uniform must be 0 or more and finite, got nan"),
            (["--tau", "uniform=-1"], "tau of uniform must be 0 or more and finite, got -1"),
            (["--tau", "uniform=big"], "'big' must be a number"),
            (["--tau", "hinge=1"], "unknown loss 'hinge'"),
            (["--tau", "ce=1"], "tau of ce must be 0"),
            (["--tau", "kl=1"], "'kl' is not among --losses"),
            (["--seeds", "0"], "0 is not in the range 1<=x<="),
            (["--seed", "99999999999999999999"], "is not in the range 0<=x<="),
            (["--seed", "18446744073709551615", "--seeds", "2"], "is not in the range 0<=x<="),
            (["--seed", "-1"], "-1 is not in the range 0<=x<="),
            (["--epochs", "0"], "0 is not in the range x>=1"),
            (["--steps", "0"], "0 is not in the range x>=1"),
            (["--restarts", "0"], "0 is not in the range x>=1"),
            (["--samples", "0"], "0 is not in the range x>=1"),
            (["--threads", "0"], "0 is not in the range 1<=x<=1024"),
            (["--threads", "100000000000"], "is not in the range 1<=x<=1024"),
            (["--held-out", "train"], "'train' is not one of 'test', 'validation'"),
            (["--device", "abacus"], "cannot use 'abacus' here"),
            (["--device", "meta"], "cannot use 'meta' here"),
            (["--data-dir", "data"], "--data-dir needs a --dataset with files, which digits has not, or --detect"),
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
            assert ("it is a file, not a folder" in " ".join(result.output.split())) == (folder.name == "file")
        assert (tmp_path / "file").read_text() == "in the way"

    @pytest.mark.parametrize(
        ("name", "is_folder"),
        [
            ("runs", False),
            (f"runs/{RUNS[0]}", False),
            (f"runs/{RUNS[0]}/best.pt", True),
            ("results.json", True),
            (PICTURES[0], True),
        ],
    )
    def test_what_is_in_the_way_is_found_before_the_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_folder: bool
    ) -> None:
        monkeypatch.setattr(compare_command, "compare", None)  # no work may begin
        monkeypatch.setenv("COLUMNS", "1000")
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir() if is_folder else place.touch()
        result = drsl_compare(*TINY, "--out", str(tmp_path))
        assert result.exit_code == 2, result.output
        assert str(place) in "".join(result.output.split("\n"))
        assert ("it is a folder, not a file" if is_folder else "it is a file, not a folder") in result.output

    @pytest.mark.parametrize("command", ["compare", "lm"])
    @pytest.mark.parametrize("content", [{"my": "results"}, {"meaning": {}, "settings": {}, "checkpoints": []}])
    def test_results_of_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, content: dict[str, Any]
    ) -> None:
        monkeypatch.setenv("COLUMNS", "1000")
        file = tmp_path / "results.json"
        file.write_text(json.dumps(content))
        result = CliRunner().invoke(drsl, [command, "--out", str(tmp_path)])
        assert result.exit_code == 2, result.output
        assert f"Invalid value for --out: {file} is not of drsl {command}, which would replace it" in result.output
        assert os.listdir(tmp_path) == ["results.json"]

    def test_no_name_for_the_folder(self) -> None:
        result = drsl_compare(*TINY, "--out", "")
        assert result.exit_code == 2
        assert "the name of the folder is empty" in result.output

    @pytest.mark.parametrize("command", ["compare", "attack"])
    def test_several_processes_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        paths = ["best.pt"] if command == "attack" else []
        result = CliRunner().invoke(drsl, [command, *paths, "--out", str(tmp_path / "never")])
        assert result.exit_code == 2
        said = " ".join(result.output.split())
        assert f"drsl {command} is one process, and torchrun started 2; it is for drsl train" in said
        assert not (tmp_path / "never").exists()

    def test_results_of_killed_commands_are_cleared(self, tmp_path: Path) -> None:
        for folder in (tmp_path, tmp_path / "parts"):
            folder.mkdir(exist_ok=True)
            (folder / ".unfinished-1-results.json").touch()
            os.utime(folder / ".unfinished-1-results.json", (0, 0))
        prepare_folder(tmp_path, [tmp_path / "results.json", tmp_path / "parts" / "any.json"])
        assert not list(tmp_path.rglob(".unfinished-*"))

    def test_last_seed(self) -> None:
        torch.Generator().manual_seed(compare_command._LARGEST_SEED + compare_command._MOST_SEEDS - 1)


class TestCommand:
    def test_help(self) -> None:
        runner = CliRunner()
        assert "compare" in runner.invoke(drsl, ["--help"]).output
        text = " ".join(runner.invoke(drsl, ["compare", "--help"]).output.split())
        for option in ("--losses", "--tau", "--seeds", "--eps", "--held-out", "--out", "--fresh"):
            assert option in text
        assert "non_target_logits=0.3" in text

    @pytest.mark.parametrize("command", ["compare", "train"])
    def test_help_says_which_labels_choose_the_epoch(self, command: str) -> None:
        text = " ".join(CliRunner().invoke(drsl, [command, "--help"]).output.split())
        assert "The labels that choose the best epoch stay right" in text

    def test_as_a_module(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["python", "--version"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("drsl_kernels.robustness", run_name="__main__")
        assert stop.value.code == 0
        assert capsys.readouterr().out.startswith("drsl, version ")

    def test_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("commands", "compare_command", "command_parts"):
            monkeypatch.delitem(sys.modules, f"drsl_kernels.robustness.{name}")
        monkeypatch.setitem(sys.modules, "rich.console", None)  # as if rich were not installed
        with pytest.raises(SystemExit, match=re.escape("'rich': pip install 'drsl_kernels[lab]'")):
            main()

    def test_other_import_errors_are_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("commands", "compare_command"):
            monkeypatch.delitem(sys.modules, f"drsl_kernels.robustness.{name}")
        monkeypatch.setitem(sys.modules, "drsl_kernels.robustness.pictures", None)
        with pytest.raises(ModuleNotFoundError, match="pictures"):
            main()

    def test_attacks_need_torch_alone(self) -> None:
        """And the losses not even its compiler, which takes as long to import as all the rest of it."""
        program = (
            "import sys\n"
            "for name in ('click', 'rich', 'sklearn', 'matplotlib'): sys.modules[name] = None\n"
            "import drsl_kernels\n"
            "assert 'torch._dynamo' not in sys.modules\n"
            "import drsl_kernels.robustness\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True)
