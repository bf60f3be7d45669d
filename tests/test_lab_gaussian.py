"""The loss "gm" in the lab: its margin, its head, its checkpoints, and runs that are interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

from drsl_kernels import GaussianMixtureHead, gaussian_mixture_loss
from drsl_kernels.robustness import train
from drsl_kernels.robustness.attack_losses import per_sample
from drsl_kernels.robustness.checkpoint import load_checkpoint, load_model, save_checkpoint
from drsl_kernels.robustness.commands import drsl
from drsl_kernels.robustness.engine import Silent, run
from drsl_kernels.robustness.losses import TrainingLoss
from drsl_kernels.robustness.models import MODELS, make_model
from drsl_kernels.robustness.recipe import Adversarial, Recipe
from drsl_kernels.robustness.settings import TrainingSettings

pytestmark = pytest.mark.usefixtures("one_thread")

GM = TrainingLoss("gm", 0.1)
TINY = TrainingSettings(loss=GM, recipe=Recipe(epochs=2, batch_size=10), samples=70, robust_images=10)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class TestLoss:
    @pytest.mark.parametrize(
        ("step", "alpha"),
        [(0, 0.1), (4999, 0.1), (5000, 0.2), (9999, 0.2), (10000, 0.3), (119999, 0.3), (200000, 0.3)],
    )
    def test_the_margin_is_that_of_the_authors(self, step: int, alpha: float) -> None:
        """0.1, doubled every 5000 of 120000 steps, at most 0.3."""
        z, y = -torch.rand(5, 3), torch.randint(3, (5,))
        loss = GM.at(step, 120000)(z, y, label_smoothing=0.1).loss
        assert torch.equal(loss, gaussian_mixture_loss(z, y, alpha=alpha, likelihood=0.1, label_smoothing=0.1))

    def test_other_losses_have_none(self) -> None:
        assert TrainingLoss("ce").at(3, 7) == TrainingLoss("ce")

    def test_the_log_is_without_margin(self) -> None:
        z, y = -torch.rand(5, 3), torch.randint(3, (5,))
        result = GM.at(99, 100)(z.requires_grad_(), y)
        torch.testing.assert_close(result.cross_entropy, F.cross_entropy(z.detach(), y, reduction="sum"))
        assert result.correct == (z.argmax(1) == y).sum()
        assert result.distance is None

    def test_to_attack_with(self) -> None:
        """That of the last steps of training, sample by sample."""
        z, y = -torch.rand(5, 3), torch.randint(3, (5,))
        found = per_sample(GM)(z, y)
        assert found.shape == (5,)
        torch.testing.assert_close(found.mean(), GM.at(99, 100)(z, y).loss)

    def test_in_words(self) -> None:
        assert str(GM) == "gm tau=0.1"

    def test_each_step_of_training_has_its_margin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[float] = []

        def spy(self: TrainingLoss, z: Tensor, y: Tensor, *, label_smoothing: float, alpha: float) -> Any:
            seen.append(alpha)
            return TrainingLoss("ce")(z, y)

        class Spied(TrainingLoss):
            __call__ = spy  # type: ignore[assignment]

        x, y = torch.rand(24, 1, 8, 8), torch.zeros(24, dtype=torch.int64)
        model = make_model("mlp", shape=(1, 8, 8), classes=2, seed=0, head="gaussian")
        train(model, x, y, Spied("gm", 0.1), Recipe(epochs=2, batch_size=2), generator=torch.Generator())
        assert seen == pytest.approx([0.1, 0.2] + [0.3] * 22)  # 24 steps

    def test_another_head_is_refused(self) -> None:
        x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
        model = make_model("mlp", shape=(1, 8, 8), classes=2, seed=0)
        with pytest.raises(ValueError, match=r"loss gm tau=0.1 needs a model with a GaussianMixtureHead, got MLP"):
            train(model, x, y, GM, Recipe(1), generator=torch.Generator())


class TestModel:
    @pytest.mark.parametrize("name", MODELS[:3])
    def test_only_the_head_is_another(self, name: str) -> None:
        linear = make_model(name, shape=(1, 8, 8), classes=7, seed=3)
        before = torch.get_rng_state()
        gaussian = make_model(name, shape=(1, 8, 8), classes=7, seed=3, head="gaussian")
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(weights(gaussian.features), weights(linear.features))
        assert isinstance(linear.head, nn.Linear)
        assert isinstance(gaussian.head, GaussianMixtureHead)
        x = torch.rand(2, 1, 8, 8)
        gaussian.eval()
        assert torch.equal(gaussian(x), gaussian.head(gaussian.features(x)))
        assert gaussian(x).shape == (2, 7)
        again = make_model(name, shape=(1, 8, 8), classes=7, seed=3, head="gaussian")
        assert torch.equal(weights(again), weights(gaussian))

    def test_unknown_head(self) -> None:
        with pytest.raises(ValueError, match="head must be one of 'linear', 'gaussian', got 'cosine'"):
            make_model("mlp", shape=(1, 8, 8), classes=2, seed=0, head="cosine")


class StopError(Exception):
    pass


class StopAt(Silent):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def batch(self) -> None:
        self.left -= 1
        if not self.left:
            raise StopError


class TestRuns:
    @pytest.mark.parametrize("adversarial", [None, "madry", "trades"])
    def test_interrupted(self, tmp_path: Path, adversarial: Any) -> None:
        """In the middle of an epoch: the margin goes on where it was."""
        attack = None if adversarial is None else Adversarial(adversarial, 0.05, 0.03, 2, loss="training")
        settings = replace(TINY, recipe=replace(TINY.recipe, adversarial=attack))
        run(settings, tmp_path / "undisturbed", tensorboard=False)
        options: dict[str, Any] = {"resume": True, "tensorboard": False, "checkpoint_batches": 1}
        for _ in range(2):
            with pytest.raises(StopError):
                run(settings, tmp_path / "resumed", progress=StopAt(5), **options)
        run(settings, tmp_path / "resumed", **options)
        found, expected = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("resumed", "undisturbed"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)

    def test_a_checkpoint_tells_its_head(self, tmp_path: Path) -> None:
        run(TINY, tmp_path, tensorboard=False)
        loaded = load_model(tmp_path / "best.pt")
        assert loaded.about["head"] == "gaussian"
        assert isinstance(loaded.model.get_submodule("head"), GaussianMixtureHead)

    def test_checkpoints_of_a_time_when_all_heads_were_linear(self, tmp_path: Path) -> None:
        """They are read, and their run goes on."""
        settings = replace(TINY, loss=TrainingLoss("ce"))
        with pytest.raises(StopError):
            run(settings, tmp_path, tensorboard=False, checkpoint_batches=1, progress=StopAt(9))
        for name in ("best.pt", "last.pt"):
            content = load_checkpoint(tmp_path / name)
            assert content["about"].pop("head") == "linear"
            save_checkpoint(tmp_path / name, content)
        assert isinstance(load_model(tmp_path / "best.pt").model.get_submodule("head"), nn.Linear)
        run(settings, tmp_path, resume=True, tensorboard=False)
        run(settings, tmp_path / "undisturbed", tensorboard=False)
        ends = [load_checkpoint(folder / "last.pt")["model"] for folder in (tmp_path, tmp_path / "undisturbed")]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])

    def test_commands(self, tmp_path: Path) -> None:
        """drsl train, then drsl attack with the loss itself."""

        def invoke(*arguments: object) -> None:
            done = CliRunner().invoke(drsl, [*map(str, arguments)])
            assert done.exit_code == 0, done.output

        out = tmp_path / "run"
        invoke("train", "--loss", "gm", "--epochs", 2, "--samples", 70, "--no-tensorboard", "--out", out)
        numbers = ["--samples", 20, "--eps", 0.1, "--steps", 2, "--restarts", 1, "--check-samples", 10]
        invoke("attack", out / "best.pt", "--attacks", "pgd:training,pgd", *numbers, "--out", tmp_path / "attacked")
        (entry,) = json.loads((tmp_path / "attacked" / "results.json").read_text())["checkpoints"]
        assert 0 <= entry["clean_accuracy"] <= 1
