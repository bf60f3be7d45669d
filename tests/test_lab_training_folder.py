"""The folder of a training run: one process at a time, and what a run refuses to go on from."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from drsl_kernels.robustness import compare_command, engine, experiment
from drsl_kernels.robustness.checkpoint import load_checkpoint, save_checkpoint
from drsl_kernels.robustness.commands import drsl
from drsl_kernels.robustness.data import Split, digits
from drsl_kernels.robustness.engine import Silent, run, sole_use
from drsl_kernels.robustness.recipe import Recipe
from drsl_kernels.robustness.settings import TrainingSettings

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = TrainingSettings(recipe=Recipe(epochs=2, batch_size=16), samples=40)
OPTIONS = ["--epochs", "2", "--batch-size", "16", "--samples", "40"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(QUICK, folder, tensorboard=False)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def resume(folder: Path, settings: TrainingSettings = QUICK) -> engine.Outcome:
    return run(settings, folder, resume=True, tensorboard=False)


class TestSoleUse:
    def test_of_two_one_trains(self, tmp_path: Path) -> None:
        class Second(Silent):
            def begin(self, *_: object) -> None:
                (tmp_path / ".unfinished-1-of-the-first").touch()
                with pytest.raises(BlockingIOError, match=f"another process trains in {tmp_path}: wait until it ends"):
                    resume(tmp_path)
                assert (tmp_path / ".unfinished-1-of-the-first").exists()

        run(QUICK, tmp_path, tensorboard=False, progress=Second())
        assert resume(tmp_path).was_finished
        assert not (tmp_path / ".lock").exists()

    def test_a_killed_process_leaves_the_folder_free(self, folder: Path) -> None:
        program = (
            "import os, sys; from pathlib import Path; from drsl_kernels.robustness.training_folder import sole_use\n"
            "with sole_use(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
        )
        assert subprocess.run([sys.executable, "-c", program, str(folder)], check=False).returncode == -9
        assert (folder / ".lock").exists()
        assert resume(folder).was_finished

    def test_the_command_says_so(self, folder: Path) -> None:
        with sole_use(folder):
            result = CliRunner().invoke(drsl, ["train", "--resume", "--out", str(folder)])
        assert result.exit_code == 1
        assert result.output.startswith(f"Error: another process trains in {folder}")

    def test_a_file_that_is_removed_before_it_is_locked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever had it removes it: the lock would be on a file that nobody else finds."""
        flock, calls = fcntl.flock, []

        def removed_first(descriptor: int, operation: int) -> None:
            calls.append(descriptor)
            if len(calls) == 1:
                (tmp_path / ".lock").unlink()
            flock(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", removed_first)
        with sole_use(tmp_path):
            assert len(calls) == 2
            with pytest.raises(BlockingIOError), sole_use(tmp_path):
                pass

    def test_a_file_system_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unsupported(*_: object) -> None:
            raise OSError("no locks available")

        monkeypatch.setattr(fcntl, "flock", unsupported)
        run(QUICK, tmp_path, tensorboard=False)

    def test_nothing_is_left_of_a_run_that_cannot_begin(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="the files of mnist were not found"):
            run(replace(QUICK, dataset="mnist"), tmp_path / "a" / "b", tensorboard=False)
        assert os.listdir(tmp_path) == []


def edit(path: Path, change: dict[str, Any], without: str | None = None) -> None:
    content = json.loads(path.read_text()) | change
    content.pop(without, None)
    path.write_text(json.dumps(content))


class TestRefusals:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "it is empty, or no dictionary in JSON"),
            ("[]", "it is empty, or no dictionary in JSON"),
            ('{"settings": {}, "software": {}}', "it has no 'processes'"),
            ('{"settings": {}, "software": {}, "processes": 1}', "they have no 'loss'"),
        ],
    )
    def test_damaged_settings(self, folder: Path, content: str, message: str) -> None:
        (folder / "settings.json").write_text(content)
        with pytest.raises(ValueError, match=f"settings.json does not hold the settings of a training run: {message}"):
            resume(folder)

    def test_no_recipe(self, folder: Path) -> None:
        settings = QUICK.as_json()
        edit(folder / "settings.json", {"settings": settings | {"recipe": None}})
        with pytest.raises(ValueError, match=r"settings\.json does not hold the settings of a training run"):
            resume(folder)

    def test_a_model_alone(self, folder: Path) -> None:
        shutil.copy(folder / "best.pt", folder / "last.pt")
        with pytest.raises(ValueError, match=r"last\.pt holds a model but no state that training could go on from"):
            resume(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"rows": None}, "holds a model but no state"),
            ({"rows": [{}]}, "holds no state that this training could go on from, TypeError: "),
            ({"order": torch.ones(3)}, "holds no state that this training could go on from, TypeError: "),
            ({"best_epoch": 3}, "holds no state that this training could go on from, ValueError: best_epoch is 3 of 2"),
            ({"optimizer": {}}, "holds no state that this training could go on from, KeyError: "),
        ],
    )
    def test_a_state_of_another_kind(self, folder: Path, change: dict[str, Any], message: str) -> None:
        content = load_checkpoint(folder / "last.pt")
        save_checkpoint(folder / "last.pt", content | {"state": content["state"] | change})
        result = CliRunner().invoke(drsl, ["train", "--resume", "--out", str(folder)])
        assert result.exit_code == 1
        assert f"Error: {folder / 'last.pt'} {message}" in result.output
        assert "train anew in another folder" in result.output

    def test_a_damaged_checkpoint(self, folder: Path) -> None:
        whole = bytearray((folder / "last.pt").read_bytes())
        whole[len(whole) // 2] ^= 1
        (folder / "last.pt").write_bytes(whole)
        result = CliRunner().invoke(drsl, ["train", "--resume", "--out", str(folder)])
        assert result.exit_code == 1
        assert f"Error: {folder / 'last.pt'} is no checkpoint of drsl train: it is damaged" in result.output
        assert "train anew in another folder" in result.output

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (replace(QUICK, seed=1), "seed was 1 and is now 0"),
            (replace(QUICK, model="mlp"), "model was 'mlp' and is now 'small_cnn'"),
            (replace(QUICK, recipe=Recipe(epochs=1)), "recipe.batch_size was 128 and is now 16"),
        ],
    )
    def test_the_checkpoint_of_another_run(
        self, folder: Path, tmp_path: Path, other: TrainingSettings, message: str
    ) -> None:
        run(other, tmp_path / "other", tensorboard=False)
        shutil.copy(tmp_path / "other" / "last.pt", folder / "last.pt")
        with pytest.raises(ValueError, match=f"last.pt is of another run than settings.json: {message}"):
            resume(folder)

    def test_the_best_model_is_gone(self, folder: Path) -> None:
        (folder / "best.pt").unlink()
        before = (folder / "last.pt").read_bytes()
        with pytest.raises(FileNotFoundError, match=r"best\.pt is gone, the model of the best epoch: train anew"):
            resume(folder)
        assert (folder / "last.pt").read_bytes() == before

    def test_other_images(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        split = digits("validation")
        other = Split(split.train_x, split.train_y.flip(0), split.held_out_x, split.held_out_y)
        monkeypatch.setattr(engine, "load", lambda *_, **__: other)
        with pytest.raises(ValueError, match="images or labels of the data set are not those it began with"):
            resume(folder)
        edit(folder / "settings.json", {}, without="images")  # as older runs wrote it
        assert resume(folder).was_finished

    def test_a_full_disk(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """torch reports it as a RuntimeError."""
        content = load_checkpoint(folder / "best.pt")
        opened = Path.open

        def full(path: Path, *arguments: Any, **options: Any) -> Any:
            return opened(Path("/dev/full") if "unfinished" in path.name else path, *arguments, **options)

        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(OSError, match="No space left on device"):
            save_checkpoint(folder / "best.pt", content)
        monkeypatch.undo()

        def fails(*_: object) -> None:
            raise RuntimeError("[enforce fail] unexpected pos 64 vs 0\nframe 1")

        monkeypatch.setattr(torch, "save", fails)
        with pytest.raises(OSError, match=r"cannot write .*best\.pt: is the disk full\? .* unexpected pos 64 vs 0$"):
            save_checkpoint(folder / "best.pt", content)

    def test_rates_that_no_optimizer_takes(self) -> None:
        for name in ("learning_rate", "weight_decay"):
            with pytest.raises(ValueError, match=rf"{name} must be .* below 1e\+30, got 1e\+300"):
                Recipe(**{name: 1e300})

    def test_a_batch_of_one_image(self, tmp_path: Path) -> None:
        """ResNet-18 takes 8x8 pixels down to one, where batch normalisation needs two images."""
        settings = replace(QUICK, model="resnet18", samples=17)
        with pytest.raises(ValueError, match=r"batch_size must be such that .* got 16 with 17 images"):
            run(settings, tmp_path / "never", tensorboard=False)
        assert not (tmp_path / "never").exists()


class TestCompare:
    @pytest.fixture(autouse=True)
    def no_pictures(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compare_command, "draw_pictures", lambda *_: None)
        monkeypatch.setattr(compare_command, "write_pages", lambda *_: None)
        monkeypatch.setattr("drsl_kernels.robustness.timing.ROUNDS", 1)

    @pytest.fixture
    def made(self, finished: Path, tmp_path: Path) -> Path:
        """A comparison of the finished run alone."""
        shutil.copytree(finished, tmp_path / "runs" / "ce-tau0-seed0")
        assert self.compare(tmp_path).exit_code == 0
        return tmp_path

    def compare(self, folder: Path, *options: str) -> Any:
        attacks = ["--eps", "0.05", "--steps", "2", "--restarts", "1", "--check-images", "10"]
        command = ["compare", "--losses", "ce", "--seeds", "1", *OPTIONS, *attacks, "--out", str(folder), *options]
        return CliRunner().invoke(drsl, command, env={"COLUMNS": "500"})

    def test_a_lost_model_is_trained_anew(self, made: Path) -> None:
        best = made / "runs" / "ce-tau0-seed0" / "best.pt"
        before = best.read_bytes()
        best.unlink()
        result = self.compare(made)
        assert result.exit_code == 0, result.output
        assert "has lost best.pt and is made anew" in result.output
        assert best.read_bytes() == before

    def test_a_run_at_work_is_left_alone(self, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with sole_use(made / "runs" / "ce-tau0-seed0"):
            assert "used again: 1 of 1 runs" in self.compare(made).output  # to read what is finished needs no leave
            for options in (["--steps", "3"], ["--fresh"], ["--check-images", "9"]):
                result = self.compare(made, *options)
                assert result.exit_code == 1
                assert "Error: another process trains in" in result.output
        assert self.compare(made, "--steps", "3").exit_code == 0

    def test_a_run_is_held_while_it_is_judged(self, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        judge = experiment.judge

        def look(*arguments: Any, **options: Any) -> Any:
            with pytest.raises(BlockingIOError), sole_use(made / "runs" / "ce-tau0-seed0"):
                pass
            return judge(*arguments, **options)

        monkeypatch.setattr(experiment, "judge", look)
        result = self.compare(made, "--steps", "3")
        assert result.exit_code == 0, result.output
