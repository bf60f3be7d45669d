"""The command `drsl attack` where it cannot work: wrong options, checkpoints and images, full disks, odd paths.

Relies on the checkpoints of test_lab_attack_command.py, which has the command at work.
"""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lab_attack_command import Pair, checkpoint, drsl_attack, trained

from drsl_kernels.robustness import TrainingLoss
from drsl_kernels.robustness.checkpoint import load_model, save_checkpoint
from drsl_kernels.robustness.models import make_model

pytestmark = pytest.mark.usefixtures("one_thread")

__all__ = ["trained"]  # fixture


class TestFailures:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                ["--attacks", "hinge"],
                "unknown attack 'hinge'; choose from fgsm, pgd, pgd-t, transfer, fourier, apgd-ce",
            ),
            (
                ["--attacks", "pgd:hinge"],
                "unknown loss in attack 'pgd:hinge'; choose from log_odds, ce, margin, dlr, ",
            ),
            (["--attacks", "square:ce"], "attack 'square' has a loss of its own, got 'square:ce'"),
            (["--attacks", ""], "unknown attack ''"),
            (["--attacks", "transfer"], "the attack 'transfer' needs --transfer-from CHECKPOINT"),
            (["--attacks", "fgsm", "--norm", "l2"], "fgsm is an attack in the norm linf, not l2"),
            (["--eps", "-1"], "'-1' is not 0 or more and finite"),
            (["--eps", "inf"], "'inf' is not 0 or more and finite"),
            (["--eps", "8"], "'8' is not from 0 to 1, as pixels are"),
            (["--eps", "8/"], "'8/' is neither a number such as 0.1 nor a fraction such as 8/255"),
            (["--norm", "l1"], "'l1' is not one of 'linf', 'l2'"),
            (["--steps", "0"], "0 is not in the range x>=1"),
            (["--restarts", "0"], "0 is not in the range x>=1"),
            (["--queries", "0"], "0 is not in the range x>=1"),
            (["--samples", "0"], "0 is not in the range x>=1"),
            (["--batch-size", "0"], "0 is not in the range x>=1"),
            (["--check-samples", "-1"], "-1 is not in the range x>=0"),
            (["--device", "abacus"], "cannot use 'abacus' here"),
            (["--transfer-from", "nowhere.pt"], "cannot load nowhere.pt: "),
            (["--norm", "l2", "--eps", "1e308"], "'1e+308' is not from 0 to 1e+06, no two images are as far apart"),
            (["--attacks", "pgd", "--queries", "7"], "--queries needs one of square among --attacks"),
            (["--attacks", "square", "--iterations", "7"], "--iterations needs one of apgd-ce, apgd-dlr, apgd-t, fab,"),
            (["--attacks", "pgd", "--targets", "9"], "--targets needs one of pgd-t, apgd-t, fab-t among --attacks"),
            (["--data-dir", "data"], "--data-dir needs a checkpoint of a data set with files, which digits has not"),
            (["--attacks", "fgsm", "--steps", "20"], "--steps needs one of pgd, pgd-t, transfer among --attacks"),
            (["--attacks", "fgsm", "--restarts", "1"], "--restarts needs one of pgd, pgd-t, transfer among --attacks"),
        ],
    )
    def test_bad_options(self, trained: Pair, tmp_path: Path, options: list[str], message: str) -> None:
        result = drsl_attack(trained[0], *options, "--out", tmp_path / "never")
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.replace("│", " ").split())
        assert not (tmp_path / "never").exists()

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "letter.pt").write_text("Dear model,")
        for arguments, message in (
            ([], "Missing argument 'CHECKPOINT...'"),
            ([tmp_path / "absent.pt"], "absent.pt: No such file or directory"),
            ([tmp_path / "letter.pt"], "letter.pt is no checkpoint of drsl train"),
            ([tmp_path], "Is a directory"),
        ):
            result = drsl_attack(*arguments, "--out", tmp_path / "never")
            assert result.exit_code == 2, result.output
            assert message in " ".join(result.output.replace("│", " ").split())

    @pytest.mark.parametrize("model", [None, [1], {1: torch.ones(1)}, {"weight": torch.ones(1)}])
    def test_a_model_of_another_kind(self, trained: Pair, tmp_path: Path, model: object) -> None:
        path = tmp_path / "other.pt"
        save_checkpoint(path, torch.load(trained[0], weights_only=True) | {"model": model})
        result = drsl_attack(path, "--out", tmp_path / "never")
        assert result.exit_code == 2, result.output
        assert f"cannot load {path}: " in " ".join(result.output.replace("│", " ").split())

    @pytest.mark.parametrize("content", ['{"my": "results"}', "[]", "", '{"summary": [], "runs": []}'])
    def test_results_of_others(self, trained: Pair, tmp_path: Path, content: str) -> None:
        (tmp_path / "results.json").write_text(content)
        result = drsl_attack(trained[0], "--out", tmp_path)
        assert result.exit_code == 2, result.output
        message = f"Invalid value for --out: {tmp_path / 'results.json'} is not of drsl attack, which would replace it"
        assert message in " ".join(result.output.replace("│", " ").split())
        assert (tmp_path / "results.json").read_text() == content
        assert os.listdir(tmp_path) == ["results.json"]

    def test_models_that_do_not_fit(self, trained: Pair, tmp_path: Path) -> None:
        path = tmp_path / "three" / "best.pt"
        path.parent.mkdir(parents=True)
        content = torch.load(trained[0], weights_only=True)
        model = make_model("small_cnn", shape=(1, 8, 8), classes=3, seed=0)
        save_checkpoint(path, content | {"about": content["about"] | {"classes": 3}, "model": model.state_dict()})
        for options, message in (
            ([path, "--attacks", "pgd-t:dlr"], "pgd-t:dlr needs 4 classes or more"),
            ([trained[0], "--transfer-from", path], "in 3 classes"),
        ):
            result = drsl_attack(*options, "--out", tmp_path / "never")
            assert result.exit_code == 2, result.output
            assert message in " ".join(result.output.replace("│", " ").split())

    def test_a_model_is_no_stranger_to_itself(self, trained: Pair, tmp_path: Path) -> None:
        tiny = ["--steps", "2", "--restarts", "1", "--samples", "20", "--check-samples", "0", "--eps", "0.1"]
        itself = [trained[0], "--transfer-from", trained[0], *tiny]
        result = drsl_attack(*itself, "--attacks", "transfer", "--out", tmp_path / "never")
        assert result.exit_code == 2
        assert "for a model is no stranger to itself" in " ".join(result.output.replace("│", " ").split())
        assert not (tmp_path / "never").exists()
        result = drsl_attack(*itself, "--attacks", "pgd,transfer", "--out", tmp_path)
        assert result.exit_code == 0, result.output
        note = f"{trained[0]}: nothing is transferred from {trained[0]}, which is the same model."
        assert note in result.output.replace("\n", " ")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"dataset": "letters"}, "name must be one of digits, fashion_mnist"),
            ({"dataset": None}, "'dataset' is None"),
            ({"model": "giant"}, "name must be one of small_cnn"),
            ({"classes": "ten"}, "'classes' is 'ten'"),
            ({"seed": None}, "'seed' is None"),
            ({"mean": 0.5}, "'mean' is 0.5"),
            ({"mean": ["a"]}, ""),
            ({"shape": [1, 9, 9]}, "'shape' must be [1, 8, 8] for digits, got [1, 9, 9]"),
            ({"loss": {"name": "hinge", "tau": 0.0}}, "unknown loss 'hinge'"),
            ({"loss": {"name": "ce"}}, "'loss' must have name and tau, got {'name': 'ce'}"),
            ({"loss": {"name": "kl", "tau": "1"}}, ""),
            ({"recipe": {"label_smoothing": "much"}}, "label_smoothing must be a number, got 'much'"),
            ({"data_dir": 7}, "'data_dir' is 7"),
        ],
    )
    def test_a_checkpoint_that_does_not_tell_what_it_is(
        self, trained: Pair, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        content = torch.load(trained[0], weights_only=True)
        path = tmp_path / "damaged.pt"
        save_checkpoint(path, content | {"about": content["about"] | change})
        with pytest.raises(ValueError, match=r"damaged\.pt does not tell what model it holds: ") as error:
            load_model(path)
        assert message in str(error.value)
        for about in ({name: content["about"][name] for name in content["about"] if name not in change}, [1]):
            save_checkpoint(path, content | {"about": about})
            if change.keys() <= {"recipe", "data_dir"} and isinstance(about, dict):
                load_model(path)  # files may do without
                continue
            result = drsl_attack(path, "--out", tmp_path / "never")
            assert result.exit_code == 2
            assert "does not tell what model it holds: 'about'" in " ".join(result.output.replace("│", " ").split())

    def test_damaged_images(self, tmp_path: Path) -> None:
        path = checkpoint(tmp_path / "a" / "best.pt", TrainingLoss("ce"))
        content = torch.load(path, weights_only=True)
        model = make_model("mlp", shape=(1, 28, 28), classes=10, seed=0)
        about = content["about"] | {"dataset": "mnist", "model": "mlp", "shape": [1, 28, 28]}
        save_checkpoint(path, content | {"about": about, "model": model.state_dict()})
        for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
            (tmp_path / f"{name}-ubyte").write_bytes(b"\0\0")
        result = drsl_attack(path, "--data-dir", tmp_path, "--out", tmp_path / "out")
        assert (result.exit_code, type(result.exception)) == (1, SystemExit)
        assert "not an IDX file" in result.output

    def test_a_full_disk(self, trained: Pair, tmp_path: Path, monkeypatch: Any) -> None:
        def full(*_: object) -> None:
            raise OSError("No space left on device")

        tiny = ["--attacks", "fgsm", "--samples", "20", "--check-samples", "0"]
        for place in ("attack_parts.write_json", "attack_report.write_json"):
            with monkeypatch.context() as patch:
                patch.setattr(f"drsl_kernels.robustness.{place}", full)
                result = drsl_attack(trained[0], *tiny, "--out", tmp_path)
            assert (result.exit_code, type(result.exception)) == (1, SystemExit)
            assert "Error: " in result.output
            assert "No space left on device" in result.output

    def test_paths_that_are_long_or_no_text(self, trained: Pair, tmp_path: Path) -> None:
        deep = tmp_path / ("a" * 200) / ("b" * 200)
        deep.mkdir(parents=True)
        shutil.copy(trained[1], deep / "best.pt")
        mine = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.pt")
        shutil.copy(trained[0], mine)
        sources = ["--transfer-from", deep / "best.pt", "--transfer-from", mine]
        tiny = ["--samples", "20", "--check-samples", "0", "--steps", "2", "--restarts", "1", "--eps", "0.1"]
        for again in (False, True):
            result = drsl_attack(mine, "--attacks", "pgd,transfer", *sources, *tiny, "--out", tmp_path / "out")
            assert result.exit_code == 0, (result.output, result.exception)
            assert ("used again: 2 attacks" in result.output) == again
        assert "caf\\udce9.pt" in result.output
        with (tmp_path / "out" / "results.csv").open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        assert lines[0]["checkpoint"].endswith("caf\\udce9.pt")
        assert lines[2]["attack"] == f"transfer:log_odds from {deep / 'best.pt'}"
