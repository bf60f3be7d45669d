"""Training on attacked images: where they lie, the losses of both methods, the mode of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import seeded
from torch import Tensor, nn

from drsl_kernels.robustness import pgd, train
from drsl_kernels.robustness.adversarial import adversarial_examples, batch_result, draw_starts
from drsl_kernels.robustness.data import Split
from drsl_kernels.robustness.losses import TrainingLoss
from drsl_kernels.robustness.models import small_cnn
from drsl_kernels.robustness.recipe import Adversarial, Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

CE = TrainingLoss("ce")


def linear(classes: int = 2) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(classes, 64, generator=seeded(1)))
        model[1].bias.copy_(torch.randn(classes, generator=seeded(2)))
    return model


class Watched(nn.Module):
    """A model with batch normalisation that notes in which mode it is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.rest = linear(10)
        self.modes: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append("train" if self.training else "eval")
        logits: Tensor = self.rest(self.norm(x))
        return logits


class TestAdversarialExamples:
    X = torch.rand(12, 1, 8, 8, generator=seeded(5))
    Y = torch.arange(12) % 2

    def crafted(self, model: nn.Module, adversarial: Adversarial, loss: TrainingLoss = CE) -> Tensor:
        """The images that a batch of Madry training descends on."""
        seen: list[Tensor] = []
        with model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            starts = draw_starts(adversarial, self.X, seeded())
            batch_result(model, self.X, self.Y, starts, loss, Recipe(adversarial=adversarial))
        return seen[-1]

    @pytest.mark.parametrize("loss", ["ce", "log_odds", "margin", "training"])
    @pytest.mark.parametrize("random_start", [True, False])
    def test_reaches_the_corner_of_a_linear_model(self, loss: Any, random_start: bool) -> None:
        model = linear()
        adversarial = Adversarial("madry", 0.2, 0.1, 8, random_start=random_start, loss=loss)
        direction = (model[1].weight[1 - self.Y] - model[1].weight[self.Y]).view_as(self.X)
        best = (self.X + 0.2 * direction.sign()).clamp(0, 1)
        torch.testing.assert_close(self.crafted(model, adversarial), best, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_steps_are_those_of_pgd(self, norm: Any) -> None:
        """On a linear model each step of cross-entropy is better than the last, so the best point is the last one."""
        model = linear()
        adversarial = Adversarial("madry", 0.5, 0.07, 4, norm=norm, random_start=False)
        expected = pgd(model, self.X, self.Y, eps=0.5, alpha=0.07, steps=4, norm=norm, loss="ce", random_start=False)
        torch.testing.assert_close(self.crafted(model, adversarial), expected, rtol=0, atol=1e-6)

    def test_training_loss_with_its_distance(self) -> None:
        """A distance so heavy that it decides the direction, and not the cross-entropy."""
        model, loss = linear(10), TrainingLoss("non_target_logits", 1000.0)
        adversarial = Adversarial("madry", 0.05, 0.01, 8, loss="training")

        def distance(x: Tensor) -> float:
            result = loss(model(x), self.Y)
            assert result.distance is not None
            return result.distance.item()

        found = distance(self.crafted(model, adversarial, loss))
        by_ce = distance(self.crafted(model, replace(adversarial, loss="ce"), loss))
        assert found > by_ce > 0
        assert found > distance(self.X)

    @pytest.mark.parametrize("method", ["madry", "trades"])
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_starts_and_examples_are_in_the_ball(self, norm: Any, method: Any) -> None:
        adversarial = Adversarial(method, 0.3, 0.2, 3, norm=norm)
        starts = draw_starts(adversarial, torch.zeros(4000, 3), seeded())
        assert starts is not None
        length = starts.abs().amax(1) if norm == "linf" else torch.linalg.vector_norm(starts, dim=1)
        if method == "trades":
            assert starts.std().item() == pytest.approx(0.001, rel=0.05)
        else:
            assert 0.29 < length.max() <= 0.3 + 1e-6
            assert starts.mean().item() == pytest.approx(0, abs=0.01)
            assert starts.min().item() < -0.25
            assert (length**3).mean().item() == pytest.approx(0.5 * 0.3**3, rel=0.5 if norm == "linf" else 0.05)
        found = self.crafted(linear(), adversarial)
        change = (found - self.X).flatten(1)
        size = change.abs().amax(1) if norm == "linf" else torch.linalg.vector_norm(change, dim=1)
        assert size.max() <= 0.3 + 1e-6
        assert size.min() > 0
        assert found.min() >= 0
        assert found.max() <= 1

    @pytest.mark.parametrize("random_start", [True, False])
    def test_starts_reach_training_each_epoch_anew(self, split: Split, random_start: bool) -> None:
        model, seen = linear(10), []
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        recipe = Recipe(2, 70, adversarial=Adversarial(eps=0.1, alpha=0.1, steps=1, random_start=random_start))
        image = split.train_x[:1].repeat(70, 1, 1, 1)
        train(model, image, split.train_y, CE, recipe, generator=seeded())
        for start in seen[::2]:
            assert (start - image).abs().max() <= 0.1 + 1e-6
            assert torch.equal(start, image) != random_start
        assert torch.equal(seen[0], seen[2]) != random_start

    def test_parameters_accumulate_nothing(self) -> None:
        model = linear()
        adversarial_examples(model, self.X, Adversarial(), lambda logits: logits.sum(), None)
        assert all(parameter.grad is None for parameter in model.parameters())


class TestMadryAndTrades:
    X, Y = TestAdversarialExamples.X, torch.arange(12) % 10

    def result(self, model: nn.Module, adversarial: Adversarial, loss: TrainingLoss = CE) -> Any:
        starts = draw_starts(adversarial, self.X, seeded())
        return batch_result(model, self.X, self.Y, starts, loss, Recipe(adversarial=adversarial))

    @pytest.mark.parametrize("loss", [CE, TrainingLoss("kl", 0.3)])
    def test_trades_is_its_formula(self, loss: TrainingLoss) -> None:
        model, seen = linear(10), []
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        result = self.result(model, Adversarial("trades", 0.1, 0.05, 3, beta=4.0), loss)
        result.loss.backward()
        gradient = model[1].weight.grad
        assert gradient is not None
        model.zero_grad()
        attacked = seen[-1]
        p, q = model(self.X).softmax(1), model(attacked).softmax(1)
        clean = loss(model(self.X), self.Y).loss
        expected = clean + 4.0 * (p * (p / q).log()).sum(1).mean()
        assert result.loss.item() == pytest.approx(expected.item(), rel=1e-4)
        expected.backward()
        torch.testing.assert_close(gradient, model[1].weight.grad, rtol=1e-3, atol=1e-5)
        assert result.correct == (p.argmax(1) == self.Y).sum()

    def test_trades_ascends_the_divergence(self) -> None:
        """From the image itself the gradient is 0: the start by noise is what makes it move."""
        model, seen = linear(10), []
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

        def divergence(steps: int) -> float:
            self.result(model, Adversarial("trades", 0.1, 0.05, steps))
            p, q = model(self.X).softmax(1), model(seen[-2]).softmax(1)
            return (p * (p / q).log()).sum().item()

        def moved() -> float:
            return (seen[-1] - self.X).abs().max().item()

        one, five = divergence(1), divergence(5)
        assert five > one > 0
        self.result(model, Adversarial("trades", 0.1, 0.05, 1, random_start=False))
        assert moved() < 0.06

    def test_madry_is_the_loss_of_the_attacked(self) -> None:
        model, seen = linear(10), []
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        result = self.result(model, Adversarial("madry", 0.1, 0.05, 3), TrainingLoss("uniform", 0.5))
        expected = TrainingLoss("uniform", 0.5)(model(seen[-1]), self.Y)
        assert result.loss.item() == pytest.approx(expected.loss.item())
        assert result.cross_entropy > CE(model(self.X), self.Y).cross_entropy

    @pytest.mark.parametrize(
        ("method", "mode", "looks"),
        [
            ("madry", None, ["train"] * 3 + ["train"]),
            ("madry", "eval", ["eval"] * 3 + ["train"]),
            ("trades", None, ["eval"] + ["eval"] * 3 + ["train"] * 2),
            ("trades", "train", ["train"] + ["train"] * 3 + ["train"] * 2),
        ],
    )
    def test_modes(self, split: Split, method: Any, mode: Any, looks: list[str]) -> None:
        model = Watched().eval()
        recipe = Recipe(1, 35, adversarial=Adversarial(method, 0.1, 0.05, 3, mode=mode))
        train(model, split.train_x, split.train_y, CE, recipe, generator=seeded())
        assert model.modes == 2 * looks
        assert model.norm.num_batches_tracked == 2 * looks.count("train")
        assert model.training

    @pytest.mark.parametrize("method", ["madry", "trades"])
    def test_makes_robust(self, split: Split, method: Any) -> None:
        def robust(adversarial: Adversarial | None) -> float:
            model = small_cnn(0)
            recipe = Recipe(25, 16, adversarial=adversarial)
            train(model, split.train_x, split.train_y, CE, recipe, generator=seeded())
            found = pgd(model, split.train_x, split.train_y, eps=0.15, alpha=0.05, steps=8, generator=seeded())
            return (model(found).argmax(1) == split.train_y).float().mean().item()

        assert robust(Adversarial(method, 0.15, 0.05, 4)) > robust(None) + 0.2
