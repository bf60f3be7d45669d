"""The single Fourier attack in `drsl attack` and `drsl compare`: what is said and kept of the worst wave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_lab_attack_command import checkpoint
from torch import Tensor

from drsl_kernels.robustness import FourierAttack, TrainingLoss, attack_run, fourier_direction
from drsl_kernels.robustness.attack_table import run_attack
from drsl_kernels.robustness.commands import drsl
from drsl_kernels.robustness.fourier_pictures import heat_map

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A checkpoint, the folder of an attack on it, and what was printed."""
    folder = tmp_path_factory.mktemp("fourier")
    path = checkpoint(folder / "ce" / "best.pt", TrainingLoss("ce"))
    return path, folder / "out", drsl_attack(path, "--out", folder / "out")


def drsl_attack(path: Path, *options: object) -> str:
    command = ["attack", path, "--attacks", "fourier,pgd", "--eps", "0.1,0.2", "--steps", "2", "--restarts", "1"]
    command += ["--samples", "60", "--check-samples", "0", *options]
    result = CliRunner().invoke(drsl, [*map(str, command)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


class TestCommands:
    def test_the_worst_wave_is_said(self, attacked: tuple[Path, Path, str]) -> None:
        _, folder, text = attacked
        content = json.loads((folder / "results.json").read_text())["checkpoints"][0]
        lines = [line for line in content["attacks"] if line["attack"] == "fourier"]
        correct = round(60 * content["clean_accuracy"])
        for line, eps in zip(lines, ("0.1", "0.2"), strict=True):
            wave = line["worst_wave"]
            k, m = wave["frequency"]
            sign = "+" if wave["sign"] == 1 else "-"
            assert wave["samples"] == correct
            assert round(60 * line["accuracy"]) == correct - round(wave["fooling_rate"] * correct)
            assert (
                f"fourier, eps {eps}: worst is {sign} the wave (l, m) = ({k}, {m}), which fools "
                f"{100 * wave['fooling_rate']:.1f} % of the {correct} images classified correctly"
            ) in text
        assert lines[1]["worst_wave"]["fooling_rate"] > 0
        assert not any("worst_wave" in line for line in content["attacks"] if line["attack"] != "fourier")
        assert "the wave that fools most of the images attacked, the same for all of them (fourier)" in text

    def test_the_picture(self, attacked: tuple[Path, Path, str]) -> None:
        _, folder, text = attacked
        (picture,) = folder.glob("fourier-best-*.png")
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"results.json, results.csv, {picture.name}" in text

    def test_is_used_again(
        self, attacked: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, folder, text = attacked
        shutil.copytree(folder / "parts", tmp_path / "parts")
        monkeypatch.setattr(attack_run, "run_attack", None)
        again = drsl_attack(path, "--out", tmp_path)
        assert "used again: 4 attacks" in again
        assert [line for line in again.splitlines() if "worst is" in line] == [
            line for line in text.splitlines() if "worst is" in line
        ]
        (before,), (after,) = (place.glob("fourier-best-*.png") for place in (folder, tmp_path))
        assert before.name == after.name

    def test_a_part_of_before(self, attacked: tuple[Path, Path, str], tmp_path: Path) -> None:
        """Attacks that were kept when there was nothing to choose say so."""
        path, folder, _ = attacked
        shutil.copytree(folder / "parts", tmp_path / "parts")
        for part in (tmp_path / "parts").glob("*pgd*"):
            content = json.loads(part.read_text())
            assert content["result"].pop("found") is None
            part.write_text(json.dumps(content))
        assert "used again: 4 attacks" in drsl_attack(path, "--out", tmp_path)
        for part in (tmp_path / "parts").glob("*fourier*eps0.1*"):
            content = json.loads(part.read_text())
            content["result"]["found"] = "damaged"
            part.write_text(json.dumps(content))
        assert "used again: 3 attacks" in drsl_attack(path, "--out", tmp_path)

    def test_no_picture_without_it(self, attacked: tuple[Path, Path, str], tmp_path: Path) -> None:
        text = drsl_attack(attacked[0], "--attacks", "pgd", "--out", tmp_path)
        assert not list(tmp_path.glob("*.png"))
        assert "Written to" in text
        assert ".png" not in text

    def test_l2(self, attacked: tuple[Path, Path, str], tmp_path: Path) -> None:
        command = ["attack", attacked[0], "--attacks", "fourier", "--norm", "l2", "--out", tmp_path]
        result = CliRunner().invoke(drsl, [*map(str, command)])
        assert result.exit_code == 2
        assert "fourier is an attack in the norm linf, not l2" in result.output

    def test_the_commands_of_the_documentation(self, tmp_path: Path) -> None:
        train = ["train", "--absum", "0.1", "--epochs", "1", "--samples", "40", "--no-tensorboard", "--out"]
        trained = CliRunner().invoke(drsl, [*train, str(tmp_path / "absum")])
        assert trained.exit_code == 0, trained.output
        attack = [
            "attack",
            str(tmp_path / "absum" / "best.pt"),
            "--attacks",
            "fourier",
            "--eps",
            "0.1",
            "--samples",
            "40",
        ]
        attacked = CliRunner().invoke(drsl, [*attack, "--out", str(tmp_path / "waves")])
        assert attacked.exit_code == 0, attacked.output
        content = json.loads((tmp_path / "waves" / "results.json").read_text())
        assert content["checkpoints"][0]["about"]["recipe"]["absum"] == 0.1
        assert list((tmp_path / "waves").glob("fourier-best-*.png"))

    def test_compare(self, tmp_path: Path) -> None:
        command = ["compare", "--losses", "ce", "--seeds", "1", "--epochs", "1", "--samples", "40", "--absum", "0.001"]
        command += ["--eps", "0.1,0.3", "--attacks", "fourier,pgd", "--steps", "1", "--restarts", "1"]
        command += ["--check-images", "0", "--out", str(tmp_path)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("drsl_kernels.robustness.timing.ROUNDS", 1)
            result = CliRunner().invoke(drsl, command)
        assert result.exit_code == 0, result.output
        run = json.loads((tmp_path / "results.json").read_text())
        assert run["settings"]["attacks"] == ["pgd:log_odds", "fourier"]  # without gradients comes last
        assert [line["attack"] for line in run["runs"][0]["felled_by"]] == ["pgd:log_odds", "fourier"] * 2
        assert "Absum 0.001" in (tmp_path / "report.md").read_text()


class TestPicture:
    def test_heat_map(self) -> None:
        """Frequency 0 is in the middle, the worst in a ring, one scale for all panels."""

        def model(points: Tensor) -> Tensor:
            score = (points * fourier_direction(-1, 2, 4, 6)).sum((1, 2, 3)) + 1
            return torch.stack([score, torch.zeros_like(score)], 1)

        x, y = torch.full((8, 1, 4, 6), 0.5), torch.zeros(8, dtype=torch.int64)
        x += torch.linspace(-0.05, 0.2, 8).view(-1, 1, 1, 1) * fourier_direction(-1, 2, 4, 6)
        outcomes = [run_attack(model, x, y, FourierAttack(), eps) for eps in (0.1, 0.2)]
        figure = heat_map(outcomes, "ce/best.pt")
        panels = [axes for axes in figure.axes if axes.images]
        assert len(panels) == 2
        for axes, outcome in zip(panels, outcomes, strict=True):
            (image,), (ring,) = axes.images, axes.lines
            data = np.asarray(image.get_array())
            assert data.shape == (4, 6)
            assert outcome.found is not None
            rates = 100 * np.array(outcome.found["fooled"]) / 8
            assert data[2, 3] == rates[0, 0]
            assert data[1, 5] == rates[-1, 2] == rates.max()  # row of l = -1, column of m = 2
            assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (2, -1)
            assert tuple(image.get_extent()) == (-3.5, 2.5, 1.5, -2.5)
            assert image.get_clim() == (0, 100 * max(max(map(max, o.found["fooled"])) for o in outcomes if o.found) / 8)
        assert "ce/best.pt" in figure.get_suptitle()
