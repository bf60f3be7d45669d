"""Recipes, schedules, plain training against a loop written out, crops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import seeded
from torch import Tensor, nn

from drsl_kernels.robustness import train
from drsl_kernels.robustness.attack_losses import per_sample
from drsl_kernels.robustness.augmentation import crop_and_flip, draw_crops
from drsl_kernels.robustness.checkpoint import load_model
from drsl_kernels.robustness.data import Split, digits
from drsl_kernels.robustness.engine import run
from drsl_kernels.robustness.loss_names import LOSS_NAMES
from drsl_kernels.robustness.losses import TrainingLoss
from drsl_kernels.robustness.models import small_cnn
from drsl_kernels.robustness.optimisation import learning_rate_at, make_optimizer
from drsl_kernels.robustness.recipe import Adversarial, Recipe
from drsl_kernels.robustness.settings import TrainingSettings

pytestmark = pytest.mark.usefixtures("one_thread")

CE = TrainingLoss("ce")
QUICK = TrainingSettings(recipe=Recipe(epochs=3, batch_size=16), samples=70)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def linear(classes: int = 2) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(classes, 64, generator=seeded(1)))
        model[1].bias.copy_(torch.randn(classes, generator=seeded(2)))
    return model


class TestRecipe:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Recipe(epochs=0), "epochs must be 1 or more, got 0"),
            (lambda: Recipe(learning_rate=math.inf), "learning_rate must be above 0 and below 1e.30, got inf"),
            (lambda: Recipe(optimizer="lamb"), "optimizer must be one of 'sgd', 'adam', 'adamw', got 'lamb'"),
            (lambda: Recipe(weight_decay=-1), "weight_decay must be 0 or more and below 1e.30, got -1"),
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

    def test_log_odds(self, split: Split) -> None:
        logits = torch.randn(7, 5, generator=seeded()).double()
        y = torch.randint(5, (7,), generator=seeded(1))
        p = logits.softmax(1).gather(1, y[:, None])
        result = TrainingLoss("log_odds")(logits, y)
        assert result.loss.item() == pytest.approx(((1 - p).log() - p.log()).mean().item())
        assert result.cross_entropy.item() == pytest.approx(-p.log().sum().item())
        (log,) = train(
            linear(10), split.train_x, split.train_y, TrainingLoss("log_odds"), Recipe(1), generator=seeded()
        )
        assert log.distance is None
        with pytest.raises(ValueError, match="tau of log_odds must be 0: it has no penalty; got 1"):
            TrainingLoss("log_odds", 1)

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

    def test_label_smoothing_by_name(self) -> None:
        logits, y = torch.randn(7, 5, generator=seeded()), torch.arange(7) % 5
        loss = TrainingLoss("label_smoothing", 0.2)
        named, asked = loss(logits, y), CE(logits, y, label_smoothing=0.2)
        assert torch.equal(named.loss, asked.loss)
        assert torch.equal(named.cross_entropy, asked.cross_entropy)
        assert named.distance is None
        assert str(loss) == "label_smoothing tau=0.2"
        torch.testing.assert_close(per_sample(loss)(logits, y).mean(), named.loss)
        for ask in (
            lambda: loss(logits, y, label_smoothing=0.1),
            lambda: per_sample(loss, label_smoothing=0.1),
            lambda: replace(QUICK, loss=loss, recipe=replace(QUICK.recipe, label_smoothing=0.1)),
        ):
            with pytest.raises(ValueError, match=r"label_smoothing must be 0 with loss .* tau=0\.2, got 0\.1"):
                ask()

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
        train(model, split.train_x[:1].repeat(70, 1, 1, 1), split.train_y, CE, recipe, generator=seeded())
        assert not torch.equal(images[0], images[1])
        images.clear()
        train(model, split.train_x, split.train_y, CE, recipe, generator=seeded())
        orders = seeded()
        for seen in images:
            batch = split.train_x[torch.randperm(70, generator=orders)]
            assert not torch.equal(seen, batch)
            assert (seen.flatten(1).sum(1) <= batch.flatten(1).sum(1) + 1e-4).all()  # a crop, padded with 0
