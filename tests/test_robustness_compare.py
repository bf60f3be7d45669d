"""The command line `drsl`: options, output, files, and what is used again."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from drsl_kernels.robustness import commands, experiment, train
from drsl_kernels.robustness.cli import main
from drsl_kernels.robustness.commands import drsl
from drsl_kernels.robustness.losses import LOSS_NAMES, TrainingLoss
from drsl_kernels.robustness.page import PAGES
from drsl_kernels.robustness.pictures import PICTURES


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are tiny, and threads that wait for one another make busy machines very slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
        monkeypatch.setattr(commands, "write_pages", lambda *_: None)

    @pytest.fixture
    def copy(self, finished: tuple[Path, str], tmp_path: Path) -> Path:
        for name in RUNS:
            (tmp_path / "runs").mkdir(exist_ok=True)
            (tmp_path / "runs" / name).write_bytes((finished[0] / "runs" / name).read_bytes())
        return tmp_path

    def test_files(self, finished: tuple[Path, str]) -> None:
        folder, _ = finished
        assert sorted(os.listdir(folder)) == sorted(["results.json", "results.csv", "runs", *PICTURES, *PAGES])
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

    @pytest.mark.parametrize(
        "change",
        [
            None,
            {},
            {"robust_accuracy": []},
            {"clean_accuracy": "x"},
            {"seed": 1},
            {"epochs": [None, None]},
            {"second_largest_after": [0.1]},
        ],
    )
    def test_malformed_results_are_not_trusted(self, copy: Path, change: Any) -> None:
        path = copy / "runs" / RUNS[0]
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"result": content["result"] | change if change else change}))
        assert experiment._load(path, content["identity"]) is None
        path.write_text(json.dumps(content))
        assert experiment._load(path, content["identity"]) is not None

    def test_nearly_equal_taus_have_files_and_labels_of_their_own(self) -> None:
        losses = [TrainingLoss("uniform", tau) for tau in (0.3, 0.30000001, 30.0)]
        assert [str(loss) for loss in losses] == ["uniform tau=0.3", "uniform tau=0.30000001", "uniform tau=30"]
        assert len({experiment.run_path(Path(), loss, 0) for loss in losses}) == 3

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
        [("runs", False), (f"runs/{RUNS[0]}", True), ("results.json", True), (PICTURES[0], True)],
    )
    def test_what_is_in_the_way_is_found_before_the_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_folder: bool
    ) -> None:
        monkeypatch.setattr(commands, "compare", None)  # no work may begin
        monkeypatch.setenv("COLUMNS", "1000")
        place = tmp_path / name
        place.parent.mkdir(exist_ok=True)
        place.mkdir() if is_folder else place.touch()
        result = drsl_compare(*TINY, "--out", str(tmp_path))
        assert result.exit_code == 2, result.output
        assert str(place) in "".join(result.output.split("\n"))
        assert ("it is a folder, not a file" if is_folder else "it is a file, not a folder") in result.output

    def test_no_name_for_the_folder(self) -> None:
        result = drsl_compare(*TINY, "--out", "")
        assert result.exit_code == 2
        assert "the name of the folder is empty" in result.output

    def test_last_seed(self) -> None:
        torch.Generator().manual_seed(commands._LARGEST_SEED + commands._MOST_SEEDS - 1)


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
