"""Training: recipes, schedules, crops, adversarial examples, validation, files, several processes, the command."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

from drsl_kernels.robustness import engine, pgd, train, train_command
from drsl_kernels.robustness.adversarial import adversarial_examples, batch_result, draw_starts
from drsl_kernels.robustness.augmentation import crop_and_flip, draw_crops
from drsl_kernels.robustness.checkpoint import load_checkpoint, load_model
from drsl_kernels.robustness.commands import drsl
from drsl_kernels.robustness.data import Split, digits, load
from drsl_kernels.robustness.distributed import World
from drsl_kernels.robustness.engine import Silent, run
from drsl_kernels.robustness.losses import LOSS_NAMES, TrainingLoss
from drsl_kernels.robustness.models import small_cnn
from drsl_kernels.robustness.optimisation import learning_rate_at, make_optimizer
from drsl_kernels.robustness.recipe import Adversarial, Recipe
from drsl_kernels.robustness.settings import TrainingSettings, default_settings
from drsl_kernels.robustness.train import train_epoch
from drsl_kernels.robustness.validation import Validation, validate

CE = TrainingLoss("ce")
QUICK = TrainingSettings(recipe=Recipe(epochs=3, batch_size=16), samples=70)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are tiny, and threads that wait for one another make busy machines very slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def split() -> Split:
    return digits().first(70)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


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


class TestRecipe:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Recipe(epochs=0), "epochs must be 1 or more, got 0"),
            (lambda: Recipe(learning_rate=math.inf), "learning_rate must be above 0 and finite, got inf"),
            (lambda: Recipe(optimizer="lamb"), "optimizer must be one of 'sgd', 'adam', 'adamw', got 'lamb'"),
            (lambda: Recipe(weight_decay=-1), "weight_decay must be 0 or more and finite, got -1"),
            (lambda: Recipe(momentum=1), "momentum must be 0 or more and below 1, got 1"),
            (lambda: Recipe(schedule="step"), "schedule must be one of 'constant', 'cosine', 'multistep', 'onecycle'"),
            (lambda: Recipe(schedule="multistep"), "milestones must be given with schedule 'multistep'"),
            (lambda: Recipe(milestones=(3,)), "and with no other, got .3,. with 'constant'"),
            (lambda: Recipe(schedule="multistep", milestones=(5, 3)), r"milestones must ascend, got \(5, 3\)"),
            (lambda: Recipe(schedule="multistep", milestones=(0,)), "milestones must be 1 or more, got 0"),
            (lambda: Recipe(epochs=3, warmup_epochs=3), "warmup_epochs must be 0 or more and below 3, got 3"),
            (lambda: Recipe(schedule="onecycle", warmup_epochs=1), "warmup_epochs must be 0 with schedule 'onecycle'"),
            (lambda: Recipe(clip_norm=0), "clip_norm must be above 0 and finite, got 0"),
            (lambda: Recipe(label_smoothing=1), "label_smoothing must be 0 or more and below 1, got 1"),
            (lambda: Recipe(label_noise=1.5), "label_noise must be from 0 to 1, got 1.5"),
            (lambda: Recipe(label_noise=math.nan), "label_noise must be 0 or more and finite, got nan"),
            (lambda: Recipe(augmentation="mixup"), "augmentation must be one of 'none', 'crop_flip', got 'mixup'"),
            (lambda: Recipe(amp="half"), "amp must be one of 'none', 'bfloat16', 'float16', got 'half'"),
            (lambda: Adversarial("fgsm"), "method must be one of 'madry', 'trades', got 'fgsm'"),
            (lambda: Adversarial(eps=0), "eps must be above 0 and finite, got 0"),
            (lambda: Adversarial(alpha=-1), "alpha must be above 0 and finite, got -1"),
            (lambda: Adversarial(steps=0), "steps must be 1 or more, got 0"),
            (lambda: Adversarial(norm="l1"), "norm must be one of 'linf', 'l2', got 'l1'"),
            (lambda: Adversarial(loss="dlr"), "loss must be one of 'ce', 'log_odds', 'margin', 'training', got 'dlr'"),
            (lambda: Adversarial(beta=-1), "beta must be 0 or more and finite, got -1"),
            (lambda: Adversarial(mode="frozen"), "mode must be one of 'train', 'eval', got 'frozen'"),
            (lambda: TrainingSettings(samples=0), "samples must be 1 or more, got 0"),
            (lambda: TrainingSettings(seed=-1), "seed must be from 0 to"),
        ],
    )
    def test_bad_values(self, make: Callable[[], object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()

    @pytest.mark.parametrize("name", ["epochs", "batch_size"])
    def test_whole_numbers(self, name: str) -> None:
        with pytest.raises(TypeError, match=f"{name} must be an int, got 1.5"):
            Recipe(**{name: 1.5})

    def test_through_json(self) -> None:
        recipe = Recipe(schedule="multistep", milestones=(2, 4), adversarial=Adversarial("trades", eps=0.2, norm="l2"))
        settings = replace(QUICK, recipe=recipe, data_dir=Path("here"), loss=TrainingLoss("kl", 0.2))
        assert TrainingSettings.from_json(json.loads(json.dumps(settings.as_json()))) == settings

    def test_mode_of_the_papers(self) -> None:
        assert (Adversarial("madry").mode, Adversarial("trades").mode) == ("train", "eval")
        assert Adversarial("madry", mode="eval").mode == "eval"


class TestOptimisation:
    STEPS = 7  # per epoch

    def rates(self, recipe: Recipe) -> list[float]:
        return [learning_rate_at(recipe, step, self.STEPS) for step in range(recipe.epochs * self.STEPS)]

    def rates_of_torch(self, make: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler = make(optimizer)
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    @pytest.mark.parametrize("epochs", [1, 6])
    def test_schedules_are_those_of_torch(self, epochs: int) -> None:
        schedulers, steps = torch.optim.lr_scheduler, epochs * self.STEPS
        recipes: dict[str, Callable[[Any], Any]] = {
            "constant": lambda optimizer: schedulers.ConstantLR(optimizer, factor=1),
            "cosine": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=steps),
            "onecycle": lambda optimizer: schedulers.OneCycleLR(
                optimizer, max_lr=0.1, total_steps=steps, cycle_momentum=False
            ),
            "multistep": lambda optimizer: schedulers.MultiStepLR(optimizer, [2 * self.STEPS, 4 * self.STEPS]),
        }
        for name, make in recipes.items():
            milestones = (2, 4) if name == "multistep" else ()
            recipe = Recipe(epochs=epochs, learning_rate=0.1, schedule=name, milestones=milestones)
            # OneCycleLR allows one step more than it gives rates for.
            assert self.rates(recipe) == pytest.approx(self.rates_of_torch(make, steps), rel=1e-9, abs=1e-15), name

    def test_warm_up_rises_to_where_the_schedule_begins(self) -> None:
        rates = self.rates(Recipe(epochs=3, learning_rate=0.1, schedule="cosine", warmup_epochs=1))
        assert rates[:8] == pytest.approx([0.1 * k / 8 for k in range(1, 9)])
        rest = [0.05 * (1 + math.cos(math.pi * k / 14)) for k in range(14)]
        assert rates[7:] == pytest.approx(rest)

    def test_the_rate_reaches_the_steps(self, split: Split) -> None:
        """Plain SGD on a model of constant gradient: its weight moves by the sum of the rates."""

        class Constant(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(1))

            def forward(self, x: Tensor) -> Tensor:
                return torch.cat([self.weight.expand(len(x), 1), 0 * self.weight.expand(len(x), 1)], 1)

        recipe = Recipe(
            epochs=2, batch_size=10, learning_rate=1e-4, optimizer="sgd", momentum=0, schedule="cosine", warmup_epochs=1
        )
        model = Constant()
        train(model, split.train_x, torch.zeros(70, dtype=torch.int64), CE, recipe, generator=seeded())
        assert model.weight.item() == pytest.approx(0.5 * sum(self.rates(recipe)), rel=1e-3)

    def test_optimizers(self) -> None:
        def made(**options: Any) -> torch.optim.Optimizer:
            return make_optimizer(linear(), Recipe(**options))

        sgd = made(optimizer="sgd", learning_rate=0.3, momentum=0.8, weight_decay=0.02)
        assert isinstance(sgd, torch.optim.SGD)
        group = sgd.param_groups[0]
        assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.3, 0.8, True, 0.02)
        assert not made(optimizer="sgd", momentum=0).param_groups[0]["nesterov"]
        for name, kind in {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.items():
            optimizer = made(optimizer=name, learning_rate=0.3, weight_decay=0.02)
            assert type(optimizer) is kind
            assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.3, 0.02)

    def test_clipping(self, split: Split) -> None:
        """A step of plain SGD with rate 1 is the gradient."""
        lengths = []
        for clip_norm in (None, 0.1):
            model = small_cnn(0)
            before = weights(model)
            recipe = Recipe(1, 70, 1.0, "sgd", momentum=0, clip_norm=clip_norm)
            train(model, split.train_x, split.train_y, CE, recipe, generator=seeded())
            lengths.append(torch.linalg.vector_norm(weights(model) - before).item())
        assert lengths[0] > 0.2
        assert lengths[1] == pytest.approx(0.1, rel=1e-4)


class TestPlainTraining:
    """With the default recipe: Adam at a constant rate, and nothing else."""

    def by_hand(self, split: Split, loss: Callable[[Tensor, Tensor], Tensor], epochs: int) -> Tensor:
        model, generator = small_cnn(3), seeded(3)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(split.train_y), generator=generator), 16):
                optimizer.zero_grad()
                loss(model(split.train_x[rows]), split.train_y[rows]).backward()
                optimizer.step()
        return weights(model)

    @pytest.mark.parametrize("name", ["ce", "kl"])
    def test_is_the_loop_that_anyone_would_write(self, split: Split, name: str) -> None:
        loss = TrainingLoss(name, 0.0 if name == "ce" else 0.3)
        model = small_cnn(3)
        train(model, split.train_x, split.train_y, loss, QUICK.recipe, generator=seeded(3))
        assert torch.equal(weights(model), self.by_hand(split, lambda z, y: loss(z, y).loss, 3))

    def test_a_run_in_a_folder_gives_the_same(self, tmp_path: Path) -> None:
        run(replace(QUICK, seed=3), tmp_path, tensorboard=False)
        split = digits("validation").first(70)
        assert torch.equal(weights(load_model(tmp_path / "last.pt").model), self.by_hand(split, F.cross_entropy, 3))

    def test_the_order_does_not_depend_on_the_recipe(self, split: Split) -> None:
        def seen(recipe: Recipe, loss: TrainingLoss) -> list[Tensor]:
            model, images = linear(10), []
            model.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0]))
            train(model, split.train_x, split.train_y, loss, recipe, generator=seeded())
            return images

        plain = seen(Recipe(2, 16), CE)
        other = seen(Recipe(2, 16, adversarial=Adversarial("trades", 0.1, 0.1, 1)), TrainingLoss("kl", 1))
        assert all(
            torch.equal(*pair) for pair in zip(plain, other[2::4], strict=True)
        )  # clean, one step, clean, attacked

    def test_the_global_random_state_is_neither_used_nor_changed(self, split: Split) -> None:
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Dropout(0.5), linear(10))
            before = torch.get_rng_state()
            train(model, split.train_x, split.train_y, CE, QUICK.recipe, generator=seeded())
            assert torch.equal(torch.get_rng_state(), before)
            results.append(weights(model))
        assert torch.equal(*results)

    @pytest.mark.parametrize("name", LOSS_NAMES)
    def test_label_smoothing(self, name: str) -> None:
        logits = torch.randn(7, 5, generator=seeded()).double()
        y = torch.randint(5, (7,), generator=seeded(1))
        loss = TrainingLoss(name, 0.0 if name == "ce" else 0.7)
        plain, smooth = loss(logits, y), loss(logits, y, label_smoothing=0.2)
        distance = 0 if smooth.distance is None else smooth.distance / 7
        expected = F.cross_entropy(logits, y, label_smoothing=0.2) + loss.tau * distance
        assert smooth.loss.item() == pytest.approx(expected.item())
        assert smooth.cross_entropy.item() == pytest.approx(F.cross_entropy(logits, y, reduction="sum").item())
        assert smooth.correct == plain.correct

    @pytest.mark.parametrize(("name", "q"), [("gce", 0.7), ("mae", 1.0)])
    def test_losses_for_noisy_labels(self, split: Split, name: str, q: float) -> None:
        logits = torch.randn(7, 5, generator=seeded()).double()
        y = torch.randint(5, (7,), generator=seeded(1))
        p = logits.softmax(1).gather(1, y[:, None])
        result = TrainingLoss(name)(logits, y)
        assert result.loss.item() == pytest.approx(((1 - p**q) / q).mean().item() * (2 if name == "mae" else 1))
        assert result.cross_entropy.item() == pytest.approx(-p.log().sum().item())
        assert result.distance is None
        (log,) = train(linear(10), split.train_x, split.train_y, TrainingLoss(name), Recipe(1), generator=seeded())
        assert log.distance is None
        assert str(TrainingLoss(name)) == name
        with pytest.raises(ValueError, match=f"tau of {name} must be 0: it has no penalty; got 1"):
            TrainingLoss(name, 1)
        with pytest.raises(ValueError, match="label_smoothing"):
            TrainingLoss(name)(logits, y, label_smoothing=0.1)

    def test_label_smoothing_reaches_training(self, split: Split) -> None:
        recipe = replace(QUICK.recipe, label_smoothing=0.3)
        model = small_cnn(3)
        train(model, split.train_x, split.train_y, CE, recipe, generator=seeded(3))
        expected = self.by_hand(split, lambda z, y: F.cross_entropy(z, y, label_smoothing=0.3), 3)
        assert torch.equal(weights(model), expected)

    def test_bfloat16(self, split: Split) -> None:
        model, dtypes = small_cnn(0), set()
        model.register_forward_hook(lambda _, __, logits: dtypes.add(logits.dtype))
        recipe = replace(QUICK.recipe, epochs=8, amp="bfloat16", adversarial=Adversarial("trades", 0.05, 0.05, 1))
        logs = train(model, split.train_x, split.train_y, TrainingLoss("kl", 0.1), recipe, generator=seeded())
        assert dtypes == {torch.bfloat16}
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert logs[-1].accuracy > 0.5 > logs[0].accuracy

    def test_float16_needs_a_gpu(self, split: Split) -> None:
        with pytest.raises(ValueError, match="amp 'float16' needs a CUDA device, got cpu"):
            train(small_cnn(0), split.train_x, split.train_y, CE, Recipe(amp="float16"), generator=seeded())


class TestAugmentation:
    def test_against_slices(self) -> None:
        x = torch.rand(40, 3, 6, 5, generator=seeded())
        before = x.clone()
        crops = draw_crops(40, seeded(1))
        found = crop_and_flip(x, crops)
        padded = F.pad(x, (4, 4, 4, 4))
        for image, (down, right, mirrored) in enumerate(crops.tolist()):
            expected = padded[image, :, down : down + 6, right : right + 5]
            assert torch.equal(found[image], expected.flip(2) if mirrored else expected)
        assert torch.equal(x, before)

    def test_the_middle_is_the_image(self) -> None:
        x = torch.rand(3, 1, 8, 8, generator=seeded())
        assert torch.equal(crop_and_flip(x, torch.tensor([[4, 4, 0]] * 3)), x)

    def test_draws_cover_all_places(self) -> None:
        crops = draw_crops(2000, seeded())
        for column, values in ((0, 9), (1, 9), (2, 2)):
            counts = torch.bincount(crops[:, column])
            assert len(counts) == values
            assert counts.min() > 0.75 * 2000 / values

    def test_reaches_training_each_epoch_anew(self, split: Split) -> None:
        model, images = linear(10), []
        model.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0]))
        recipe = Recipe(2, 70, augmentation="crop_flip")
        train(model, split.train_x, split.train_y, CE, recipe, generator=seeded())
        orders = seeded()
        for seen in images:
            batch = split.train_x[torch.randperm(70, generator=orders)]
            assert not torch.equal(seen, batch)
            assert (seen.flatten(1).sum(1) <= batch.flatten(1).sum(1) + 1e-4).all()  # a crop, padded with 0


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
            assert (length**3).mean().item() == pytest.approx(0.5 * 0.3**3, rel=0.5 if norm == "linf" else 0.05)
        found = self.crafted(linear(), adversarial)
        change = (found - self.X).flatten(1)
        size = change.abs().amax(1) if norm == "linf" else torch.linalg.vector_norm(change, dim=1)
        assert size.max() <= 0.3 + 1e-6
        assert size.min() > 0
        assert found.min() >= 0
        assert found.max() <= 1

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


class TestRuns:
    def test_files(self, tmp_path: Path) -> None:
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
            *("--beta", "2", "--craft-mode", "eval", "--seed", "5", "--samples", "50", "--threads", "2"),
            *("--data-dir", "somewhere"),
        )
        attack = Adversarial("madry", 8 / 255, 0.01, 3, "l2", False, "training", 2.0, "eval")
        recipe = Recipe(
            *(7, 9, 0.3, "sgd", 0.01, 0.5, "multistep", (2, 4), 0.5, 3.0, 0.1, 0.2, "crop_flip", "bfloat16", attack)
        )
        assert self.settings(monkeypatch, tmp_path, *options) == TrainingSettings(
            *("digits", "small_cnn", TrainingLoss("non_target_logits", 0.3), recipe, 5, "cpu", 2, 50),
            data_dir=Path("somewhere"),
        )

    def test_attacks_have_the_defaults_of_the_data(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        attack = self.settings(monkeypatch, tmp_path, "--adversarial", "trades", "--steps", "3").recipe.adversarial
        assert attack == Adversarial("trades", 0.1, 0.025, 3)

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (["--eps", "0.1"], 2, "--eps needs --adversarial madry or trades"),
            (["--adversarial", "trades", "--eps", "8"], 2, "'8' is not from 0 to 1"),
            (["--adversarial", "trades", "--eps", "0.1,0.2"], 2, "'0.1,0.2' must be one number"),
            (["--milestones", "a"], 2, "'a' must be epochs such as 75,90"),
            (["--tau", "1"], 1, "tau of ce must be 0"),
            (["--lr", "0"], 1, "learning_rate must be above 0 and finite, got 0"),
            (["--schedule", "multistep"], 1, "milestones must be given with schedule 'multistep'"),
            (["--amp", "float16"], 1, "amp 'float16' needs a CUDA device"),
            (["--device", "abacus"], 2, "cannot use 'abacus' here"),
            (["--loss", "hinge"], 2, "'hinge' is not one of"),
            (["--resume"], 2, "holds no training run to resume; to begin one there, give --dataset"),
        ],
    )
    def test_bad_options(self, tmp_path: Path, options: list[str], code: int, message: str) -> None:
        result = self.invoke(*options, "--out", str(tmp_path / "never"))
        assert result.exit_code == code, result.output
        flat = " ".join(result.output.replace("│", " ").split())
        assert message in flat
        assert not (tmp_path / "never").exists()

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
