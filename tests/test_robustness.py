"""Worst case over attacks, training, data, timing and storage."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import seeded
from torch import Tensor, nn

from drsl_kernels.robustness import (
    Attack,
    Recipe,
    TargetedAttack,
    TrainingLoss,
    second_largest_softmax,
    storage,
    train,
    worst_case,
)
from drsl_kernels.robustness.data import digits
from drsl_kernels.robustness.loss_names import ALL_LOSSES, LOSS_NAMES
from drsl_kernels.robustness.models import small_cnn
from drsl_kernels.robustness.timing import time_epochs

pytestmark = pytest.mark.usefixtures("one_thread")


class Steps(nn.Module):
    """Class 1 where the only value of x is above 0.5, class 0 elsewhere; the distance from there is the margin."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return torch.cat([0.5 - x, x - 0.5], dim=1)


class TestWorstCase:
    X = torch.tensor([[0.1], [0.42], [0.47], [0.56], [0.9], [0.7]])
    Y = torch.tensor([0, 0, 0, 1, 1, 0])  # the last is misclassified without an attack
    ATTACKS = (Attack("margin", steps=8, restarts=2), Attack("log_odds", steps=8, restarts=1))

    def judge(self, *epsilons: float, **options: Any) -> Any:
        arguments = {"attacks": self.ATTACKS, "generator": seeded()} | options
        return worst_case(Steps(), self.X, self.Y, epsilons=epsilons, **arguments)

    def test_counts_by_hand(self) -> None:
        found = self.judge(0.05, 0.1, 0.2)
        assert found.clean_correct.tolist() == [True, True, True, True, True, False]
        assert found.robust.tolist() == [
            [True, True, False, True, True, False],
            [True, False, False, False, True, False],
            [True, False, False, False, True, False],
        ]
        assert found.clean_accuracy() == pytest.approx(5 / 6)
        assert found.robust_accuracy() == pytest.approx((4 / 6, 2 / 6, 2 / 6))
        assert found.fell.tolist() == [[3, -1, 0], [1, 0, 1], [0, 0, 1], [1, 0, 1], [3, -1, 0], [-1, -1, 0]]

    def test_what_felled_a_sample(self) -> None:
        class Nothing:
            name, norm, restarts, black_box = "nothing", "linf", 2, True

            def start(self, model: Any, x: Tensor, y: Tensor, **_: Any) -> Tensor:
                return x.clone()

        found = self.judge(0.05, 0.1, 0.2, attacks=[Nothing(), Attack("margin", steps=8, restarts=2)])
        radius, attack, start = found.fell.unbind(1)
        for index, robust in enumerate(found.robust):
            assert torch.equal(radius > index, robust)
        assert attack.tolist() == [-1, 1, 1, 1, -1, -1]
        assert start.tolist() == [0, 1, 1, 1, 0, 0]

    def test_order_of_radii_does_not_matter(self) -> None:
        assert self.judge(0.2, 0.05, 0.1, 0.1).epsilons == (0.05, 0.1, 0.2)
        assert torch.equal(self.judge(0.2, 0.05).robust, self.judge(0.05, 0.2).robust)

    def test_at_zero_it_is_clean(self) -> None:
        found = self.judge(0.0, 0.1)
        assert torch.equal(found.robust[0], found.clean_correct)
        assert torch.equal(found.points[0], self.X)

    def test_points_are_inside_and_prove_the_count(self) -> None:
        found = self.judge(0.05, 0.1)
        for eps, robust, points in zip(found.epsilons, found.robust, found.points, strict=True):
            assert (points - self.X).abs().max() <= eps + 1e-6
            assert torch.equal(Steps()(points).argmax(1) == self.Y, robust)
        assert torch.equal(found.points[:, -1], self.X[-1:].expand(2, 1))

    def test_a_useless_attack_takes_nothing_back(self) -> None:
        def in_favour_of_the_label(logits: Tensor, y: Tensor) -> Tensor:
            return logits.gather(1, y.unsqueeze(1)).squeeze(1)

        attacks = [Attack("margin", steps=8), Attack(in_favour_of_the_label, steps=8)]
        found = self.judge(0.1, attacks=attacks)
        assert found.points[0, 0].item() == pytest.approx(0.2)
        assert found.points[0, 4].item() == pytest.approx(0.8)

    def test_a_broken_sample_is_not_attacked_again(self) -> None:
        def rows(epsilons: tuple[float, ...]) -> int:
            model = Steps()
            worst_case(model, self.X, self.Y, epsilons=epsilons, attacks=self.ATTACKS, generator=seeded())
            return model.rows

        per_restart = 8 + 1 + 1  # gradients, the last point, its margin
        # At 0.5 the first restart meets five samples and breaks those four that are within reach: 0.9 stays.
        assert rows((0.35,)) == 6 + per_restart * (5 + 2 + 2)
        assert rows((0.35, 0.36)) == rows((0.35,)) + per_restart * (2 + 2 + 2)

    def test_batches_change_nothing_for_a_deterministic_outcome(self) -> None:
        assert torch.equal(self.judge(0.1, batch_size=2).robust, self.judge(0.1).robust)

    def test_reports_every_restart(self) -> None:
        seen: list[tuple[float, object]] = []
        self.judge(0.1, 0.45, on_restart=lambda eps, attack: seen.append((eps, attack.loss)))
        assert seen == [(eps, loss) for eps in (0.1, 0.45) for loss in ("margin", "margin", "log_odds")]

    def test_never_rises_with_eps(self) -> None:
        split = digits().first(60)
        model = small_cnn(0)
        train(model, split.train_x, split.train_y, TrainingLoss("ce"), Recipe(epochs=15), generator=seeded())
        attacks = [Attack("ce", steps=1, restarts=1)]  # too weak to break at 0.3 all that it breaks at 0.1
        epsilons = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4)
        found = worst_case(model, split.train_x, split.train_y, epsilons=epsilons, attacks=attacks, generator=seeded())
        assert (found.robust[1:] <= found.robust[:-1]).all()
        assert (found.robust[0] <= found.clean_correct).all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epsilons": ()}, r"epsilons must not be empty, got \(\)"),
            ({"attacks": ()}, r"attacks must not be empty, got \(\)"),
            ({"epsilons": (0.1, -1)}, "epsilons must be 0 or more and finite"),
            ({"epsilons": (math.nan,)}, "epsilons must be 0 or more and finite"),
            ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
            ({"y": Y[:4]}, r"y must have shape \(N,\) = \(6,\), got \(4,\)"),
            ({"y": -Y}, "y must hold classes 0 or more, got -1"),
            ({"x": 2 * X, "epsilons": (0.0,)}, "x must lie within bounds"),
            ({"x": X[:0], "y": Y[:0]}, "x must hold one sample or more, got none"),
        ],
    )
    def test_bad_input(self, options: dict[str, Any], message: str) -> None:
        arguments = {"x": self.X, "y": self.Y, "epsilons": (0.1,), "attacks": self.ATTACKS} | options
        with pytest.raises(ValueError, match=message):
            worst_case(Steps(), **arguments)

    def test_a_label_that_no_class_has(self) -> None:
        with pytest.raises(IndexError, match="y holds label 2, outside"):
            worst_case(Steps(), self.X, 2 * self.Y, epsilons=(0.1,), attacks=self.ATTACKS)

    @pytest.mark.parametrize("kind", [Attack, TargetedAttack])
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"steps": 0}, ValueError, "steps must be 1 or more, got 0"),
            ({"restarts": 0}, ValueError, "restarts must be 1 or more, got 0"),
            ({"steps": 2.5}, TypeError, "steps must be an int, got 2.5"),
            ({"loss": "hinge"}, ValueError, "loss must be one of .* got 'hinge'"),
            ({"norm": "l7"}, ValueError, "norm must be one of 'linf', 'l2', got 'l7'"),
            ({"reach": -1}, ValueError, "reach must be above 0 and finite, got -1"),
            ({"reach": math.nan}, ValueError, "reach must be above 0 and finite, got nan"),
        ],
    )
    def test_bad_attack(self, kind: type, options: dict[str, object], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            kind(**options)


def test_second_largest_softmax() -> None:
    logits = torch.tensor([[0.0, 0.0, -50.0], [9.0, 0.0, 0.0]])
    expected = [0.5, math.exp(-9) / (1 + 2 * math.exp(-9))]
    assert second_largest_softmax(nn.Identity(), logits, batch_size=1).tolist() == pytest.approx(expected)


@pytest.fixture(scope="module")
def split() -> Any:
    return digits().first(96)


class TestTraining:
    @pytest.mark.parametrize("name", LOSS_NAMES)
    def test_learns_with_every_loss(self, split: Any, name: str) -> None:
        loss = TrainingLoss(name, 0.0 if name == "ce" else 0.05)
        model = small_cnn(0)
        seen: list[Any] = []
        logs = train(
            model,
            split.train_x,
            split.train_y,
            loss,
            Recipe(epochs=12, batch_size=16),
            generator=seeded(),
            on_epoch=seen.append,
        )
        assert seen == logs
        assert [log.epoch for log in logs] == list(range(1, 13))
        assert logs[-1].accuracy > 0.7 > logs[0].accuracy
        assert logs[-1].cross_entropy < logs[0].cross_entropy
        assert (logs[-1].distance is None) == (name == "ce")

    def test_same_seed_same_model(self, split: Any) -> None:
        def weights(seed: int) -> Tensor:
            model = small_cnn(seed)
            loss = TrainingLoss("non_target_logits", 0.3)
            train(model, split.train_x, split.train_y, loss, Recipe(epochs=2), generator=seeded(seed))
            return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

        assert torch.equal(weights(0), weights(0))
        assert not torch.equal(weights(0), weights(1))

    def test_first_weights_depend_on_the_seed_alone(self) -> None:
        first = small_cnn(0).head.weight
        torch.rand(1)
        assert torch.equal(small_cnn(0).head.weight, first)
        assert not torch.equal(small_cnn(1).head.weight, first)

    def test_the_global_random_state_is_left_alone(self) -> None:
        torch.manual_seed(4)
        expected = torch.rand(3)
        torch.manual_seed(4)
        small_cnn(0)
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize("name", LOSS_NAMES)
    def test_a_batch_agrees_with_the_formulas(self, name: str) -> None:
        logits = torch.randn(7, 5, generator=seeded()).double()
        y = torch.randint(5, (7,), generator=seeded(1))
        tau = 0.0 if name == "ce" else 0.7
        result = TrainingLoss(name, tau)(logits, y)
        cross_entropy = F.cross_entropy(logits, y, reduction="sum")
        assert result.cross_entropy.item() == pytest.approx(cross_entropy.item())
        assert int(result.correct) == int((logits.argmax(1) == y).sum())
        distance = 0.0 if result.distance is None else result.distance.item()
        assert result.loss.item() == pytest.approx((cross_entropy.item() + tau * distance) / 7)

    def test_the_penalty_is_the_distance_of_that_name(self) -> None:
        logits = torch.randn(7, 5, generator=seeded()).double()
        y = torch.randint(5, (7,), generator=seeded(1))
        wrong = logits[F.one_hot(y, 5) == 0].view(7, 4)
        spread = (wrong - wrong.mean(1, keepdim=True)).square().sum()
        result = TrainingLoss("non_target_logits", 0.7)(logits, y)
        assert result.distance is not None
        assert result.distance.item() == pytest.approx(spread.item())

    def test_an_epoch_log_holds_means_over_images_not_batches(self, split: Any) -> None:
        """With one batch of 64 and one of 32, of a model that does not change."""
        model = small_cnn(0)
        recipe = Recipe(epochs=1, batch_size=64, learning_rate=1e-30)
        loss = TrainingLoss("uniform", 0.5)
        (log,) = train(model, split.train_x, split.train_y, loss, recipe, generator=seeded())
        with torch.no_grad():
            whole = loss(model(split.train_x), split.train_y)
        assert log.loss == pytest.approx(whole.loss.item(), rel=1e-5)
        assert log.cross_entropy == pytest.approx(whole.cross_entropy.item() / 96, rel=1e-5)
        assert whole.distance is not None
        assert log.distance == pytest.approx(whole.distance.item() / 96, rel=1e-4)
        assert log.accuracy == pytest.approx(whole.correct.item() / 96)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"y": torch.zeros(3).long()}, ValueError, r"y must have shape \(N,\) = \(6,\), got \(3,\)"),
            ({"x": torch.zeros(0, 1, 8, 8)}, ValueError, "x must hold one image or more, got shape"),
            ({"x": [[0.0]]}, TypeError, r"x must be a Tensor, got \[\[0.0\]\]"),
            ({"y": [0]}, TypeError, r"y must be a Tensor, got \[0\]"),
            ({"generator": None}, TypeError, "generator must be a torch.Generator, got None"),
            ({"generator": 3}, TypeError, "generator must be a torch.Generator, got 3"),
        ],
    )
    def test_what_cannot_be_trained_with(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        good = {"x": torch.zeros(6, 1, 8, 8), "y": torch.zeros(6).long(), "generator": seeded()}
        with pytest.raises(error, match=message):
            train(small_cnn(0), loss=TrainingLoss("ce"), recipe=Recipe(1), **(good | change))

    @pytest.mark.parametrize("name", ["ce", "uniform"])
    def test_a_loss_that_is_not_finite_stops_the_run(self, split: Any, name: str) -> None:
        x = split.train_x.clone()
        x[0] = math.nan
        order = torch.randperm(96, generator=seeded())
        batch = int((order == 0).nonzero()) // 16 + 1
        message = f"training with {name}.*the loss is nan in epoch 1, batch {batch};"
        with pytest.raises(FloatingPointError, match=message):
            train(small_cnn(0), x, split.train_y, TrainingLoss(name), Recipe(batch_size=16), generator=seeded())

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: TrainingLoss("hinge"), f"unknown loss 'hinge'; the losses are {', '.join(ALL_LOSSES)}"),
            (lambda: TrainingLoss("label_smoothing", 1), "tau of label_smoothing must be below 1, got 1"),
            (lambda: TrainingLoss("kl", math.nan), "tau of kl must be 0 or more and finite, got nan"),
            (lambda: TrainingLoss("kl", -1), "tau of kl must be 0 or more and finite, got -1"),
            (lambda: TrainingLoss("ce", 1), "tau of ce must be 0"),
            (lambda: Recipe(epochs=0), "epochs must be 1 or more, got 0"),
            (lambda: Recipe(batch_size=0), "batch_size must be 1 or more, got 0"),
            (lambda: Recipe(learning_rate=math.nan), "learning_rate must be above 0 and below 1e.30, got nan"),
        ],
    )
    def test_bad_input(self, make: Callable[[], object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()

    def test_timing_covers_the_losses_asked_for(self, split: Any) -> None:
        losses = [TrainingLoss("uniform", 0.3), TrainingLoss("ce")]
        times = time_epochs(losses, lambda _: small_cnn(0), split.train_x, split.train_y, Recipe(), rounds=2)
        assert list(times) == losses
        assert times[TrainingLoss("ce")].ratio == 1
        assert all(time.seconds > 0 and time.ratio > 0 for time in times.values())


class TestDigits:
    def test_shapes_and_range(self) -> None:
        split = digits()
        assert split.train_x.shape == (1297, 1, 8, 8)
        assert split.held_out_x.shape == (500, 1, 8, 8)
        assert split.train_x.dtype == torch.float32
        assert split.train_y.dtype == torch.int64
        assert split.train_x.min() == 0
        assert split.train_x.max() == 1

    def test_stratified(self) -> None:
        split = digits()
        shares = [torch.bincount(y, minlength=10) / len(y) for y in (split.train_y, split.held_out_y)]
        torch.testing.assert_close(shares[0], shares[1], rtol=0, atol=0.004)

    def test_always_the_same(self) -> None:
        assert torch.equal(digits().train_x, digits().train_x)

    def test_validation_comes_from_the_training_images(self) -> None:
        def images(x: Tensor) -> set[tuple[float, ...]]:
            return {tuple(image) for image in x.flatten(1).tolist()}

        whole, part = digits(), digits("validation")
        assert len(part.train_y) == 1000
        assert len(part.held_out_y) == 297
        assert images(part.train_x) | images(part.held_out_x) == images(whole.train_x)
        assert not images(part.train_x) & images(part.held_out_x)
        assert not images(whole.held_out_x) & images(whole.train_x)

    def test_unknown_part(self) -> None:
        with pytest.raises(ValueError, match="held_out must be 'test' or 'validation', got 'train'"):
            digits("train")  # type: ignore[arg-type]


class TestStorage:
    def test_a_failure_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "numbers.json"
        storage.write_json(path, [1, 2])

        def fail(temporary: Path) -> None:
            temporary.write_text("[3, ")
            raise RuntimeError("the disk is full")

        with pytest.raises(RuntimeError, match="the disk is full"):
            storage.write_atomically(path, fail)
        assert storage.read_json(path) == [1, 2]
        assert os.listdir(tmp_path) == ["numbers.json"]

    def test_the_temporary_file_is_beside_the_target(self, tmp_path: Path) -> None:
        path = tmp_path / "picture.png"
        seen: list[Path] = []
        storage.write_atomically(path, lambda temporary: (seen.append(temporary), temporary.touch())[1])
        assert seen[0].parent == tmp_path
        assert seen[0].suffix == ".png"
        assert seen[0] != path
        assert os.listdir(tmp_path) == ["picture.png"]

    def test_it_is_on_the_disk_before_it_has_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        done: list[str] = []
        fsync, replace = os.fsync, os.replace

        def sync(descriptor: int) -> None:
            done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "replace", lambda *paths: (done.append("name"), replace(*paths)))
        storage.write_json(tmp_path / "numbers.json", [1])
        assert done == ["file", "name", "folder"]

    def test_what_was_left_behind_is_cleared(self, tmp_path: Path) -> None:
        """Not what another process may be writing at this moment."""
        old, new, result = (tmp_path / name for name in (".unfinished-1-a", ".unfinished-2-a", "a"))
        for path in (old, new, result):
            path.touch()
        for path in (old, result):
            os.utime(path, (0, 0))
        storage.clear_unfinished(tmp_path)
        assert sorted(tmp_path.iterdir()) == [new, result]
        storage.clear_unfinished(tmp_path, sole_use=True)
        assert list(tmp_path.iterdir()) == [result]

    def test_what_others_call_unfinished_stays(self, tmp_path: Path) -> None:
        notes, folder = tmp_path / ".unfinished-notes", tmp_path / ".unfinished-1-folder"
        notes.touch()
        folder.mkdir()
        storage.clear_unfinished(tmp_path, sole_use=True)
        assert sorted(tmp_path.iterdir()) == [folder, notes]

    def test_nan_is_not_json(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            storage.write_json(tmp_path / "numbers.json", [math.nan])
        assert os.listdir(tmp_path) == []

    def test_absent_or_partial_is_none(self, tmp_path: Path) -> None:
        assert storage.read_json(tmp_path / "absent.json") is None
        (tmp_path / "partial.json").write_text('{"a": [1, 2')
        assert storage.read_json(tmp_path / "partial.json") is None
