"""Masking checks: each fires on a model that was made to mask, and stays quiet on an honest one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import seeded
from test_lab_attacks import images, model, trained_cnn
from torch import Tensor, nn

from drsl_kernels.robustness import Attack, TrainingLoss, Transfer, attack_table, masking
from drsl_kernels.robustness.attack_table import AttackOutcome, AttackTable, run_attack

pytestmark = pytest.mark.usefixtures("one_thread")

__all__ = ["images", "model"]  # fixtures

Images = tuple[Tensor, Tensor]


class Scaled(nn.Module):
    """The same decisions from larger logits: the softmax saturates in float32."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.scale * self.model(x)
        return logits


class Quantised(Scaled):
    """Sees x in steps of 1/8: almost nothing is lost, and the gradient is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((8 * x).round() / 8)


class Noisy(Scaled):
    """Sees x through fresh noise of deviation `scale`."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x + self.scale * torch.randn_like(x))
        return logits


class Misled(Scaled):
    """The same logits, but the gradient of every `scale`-th image of a batch points back."""

    def forward(self, x: Tensor) -> Tensor:
        signs = torch.ones(len(x), *[1] * (x.dim() - 1))
        signs[:: int(self.scale)] = -1
        logits: Tensor = self.model(x.detach() + signs * (x - x.detach()))
        return logits


class TestGradients:
    def test_quiet_on_an_honest_model(self, model: nn.Module, images: Images) -> None:
        check = masking.gradients_vanish(model, *images)
        assert check.outcome == "passed"
        assert check.numbers == {"zero_cross_entropy": 0.0, "zero_log_odds": 0.0, "samples": 100}

    def test_large_logits_blind_cross_entropy_alone(self, model: nn.Module, images: Images) -> None:
        check = masking.gradients_vanish(Scaled(model, 100), *images)
        assert check.outcome == "warning"
        assert check.numbers["zero_cross_entropy"] > 0.5
        assert check.numbers["zero_log_odds"] == 0
        assert "believe those on log_odds, margin, dlr" in check.sentence

    @pytest.mark.parametrize("batch_size", [256, 7])
    def test_a_quantised_input_blinds_all(self, model: nn.Module, images: Images, batch_size: int) -> None:
        check = masking.gradients_vanish(Quantised(model, 1), *images, batch_size=batch_size)
        assert check.outcome == "warning"
        assert check.numbers["zero_cross_entropy"] == check.numbers["zero_log_odds"] == 1
        assert "believe Square and transfer attacks alone" in check.sentence

    def test_a_pixel_that_does_not_count_is_no_masking(self, images: Images) -> None:
        linear = nn.Linear(64, 10)
        with torch.no_grad():
            linear.weight[:, :60] = 0
        check = masking.gradients_vanish(linear, images[0].flatten(1), images[1])
        assert check.numbers["zero_log_odds"] == check.numbers["zero_cross_entropy"] == 0

    def test_a_gradient_that_never_arrives_is_zero(self, model: nn.Module, images: Images) -> None:
        check = masking.gradients_vanish(lambda x: model(x.detach()), *images)
        assert check.numbers["zero_log_odds"] == 1

    def test_models_are_left_as_found(self, model: nn.Module, images: Images) -> None:
        model.zero_grad()
        masking.gradients_vanish(model.train(), *images)
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())
        model.eval()


class TestSaturation:
    def test_quiet_on_an_honest_model(self, model: nn.Module, images: Images) -> None:
        check = masking.softmax_saturates(model, *images)
        assert (check.outcome, check.numbers["saturated"]) == ("passed", 0)

    def test_large_logits(self, model: nn.Module, images: Images) -> None:
        check = masking.softmax_saturates(Scaled(model, 100), *images)
        assert check.outcome == "warning"
        assert check.numbers["saturated"] > 0.8
        honest = masking.softmax_saturates(model, *images).numbers["median_margin"]
        assert check.numbers["median_margin"] == pytest.approx(100 * honest, rel=1e-4)

    def test_sure_of_a_wrong_class_is_not_saturated(self) -> None:
        check = masking.softmax_saturates(nn.Identity(), torch.tensor([[99.0, 0.0], [99.0, 0.0]]), torch.tensor([1, 0]))
        assert check.numbers["saturated"] == 0.5


class TestRandomness:
    def test_quiet_on_an_honest_model(self, model: nn.Module, images: Images) -> None:
        assert masking.outputs_vary(model, images[0]).outcome == "passed"

    def test_noise(self, model: nn.Module, images: Images) -> None:
        check = masking.outputs_vary(Noisy(model, 0.01), images[0])
        assert check.outcome == "warning"
        assert "answers differently when asked twice" in check.sentence

    def test_dropout_is_off_in_evaluation(self, model: nn.Module, images: Images) -> None:
        assert masking.outputs_vary(nn.Sequential(nn.Dropout(0.5), model).train(), images[0]).outcome == "passed"
        model.eval()


class TestLargeEps:
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_quiet_on_an_honest_model(self, model: nn.Module, images: Images, norm: Any) -> None:
        check = masking.falls_with_eps(model, *images, norm=norm, generator=seeded())
        assert check.outcome == "passed"
        assert check.numbers["left"] == 0
        assert check.numbers["eps"] == (0.5 if norm == "linf" else 4.0)

    def test_gradients_that_are_zero(self, model: nn.Module, images: Images) -> None:
        check = masking.falls_with_eps(Quantised(model, 1), *images, generator=seeded())
        assert check.outcome == "warning"
        assert check.numbers["left"] > 0.2 > check.numbers["chance"]
        assert "the attack fails, and so it may at smaller eps" in check.sentence

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_gradients_that_mislead_on_few_images(self, model: nn.Module, images: Images, norm: Any) -> None:
        """Fewer survive than there are images of the class that is most frequent, or that grey is."""
        check = masking.falls_with_eps(Misled(model, 19), *images, norm=norm, generator=seeded())
        assert check.outcome == "warning"
        assert 0.01 < check.numbers["left"] < check.numbers["chance"]
        grey = int(model(torch.full((1, 1, 8, 8), 0.5)).argmax())
        assert check.numbers["chance"] == pytest.approx((images[1] == grey).double().mean().item())
        assert f"although the model sees another class in grey (class {grey})" in check.sentence

    def test_what_is_right_on_grey_may_survive(self, images: Images) -> None:
        """A model that knows one class alone is right about that one whatever is done."""
        x, y = images

        def knows_three(points: Tensor) -> Tensor:
            return torch.eye(10)[3] + 0 * points.flatten(1)[:, :10]

        check = masking.falls_with_eps(knows_three, x[y <= 3], y[y <= 3])
        assert (check.outcome, check.numbers["left"], check.numbers["class_of_grey"]) == ("passed", 0, 3)
        assert check.numbers["chance"] == pytest.approx((y[y <= 3] == 3).double().mean().item())

    def test_the_class_of_grey_alone_tells_nothing(self, images: Images) -> None:
        x, y = images
        check = masking.falls_with_eps(lambda points: torch.eye(10)[3].expand(len(points), 10), x[y == 3], y[y == 3])
        assert check.outcome == "not run"

    def test_a_class_that_the_model_does_not_know(self, images: Images) -> None:
        with pytest.raises(IndexError, match="y holds label 9, outside"):
            masking.falls_with_eps(nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), *images)

    def test_another_class_alone_tells(self, model: nn.Module, images: Images) -> None:
        x, y = images
        grey = int(model(torch.full((1, 1, 8, 8), 0.5)).argmax())
        others = (y == (0 if grey else 1)).nonzero().squeeze(1)
        assert masking.falls_with_eps(model, x[others], y[others], generator=seeded()).outcome == "passed"
        assert (
            masking.falls_with_eps(Quantised(model, 1), x[others], y[others], generator=seeded()).outcome == "warning"
        )


class TestSteps:
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_quiet_on_an_honest_model(self, model: nn.Module, images: Images, norm: Any) -> None:
        check = masking.rises_with_steps(model, *images, 0.1 if norm == "linf" else 0.7, norm=norm)
        assert check.outcome == "passed"
        losses = check.numbers["mean_log_odds"]
        assert losses == sorted(losses)
        assert check.numbers["steps"] == [0, 1, 5, 20]

    def test_quiet_where_one_step_is_all_that_is_needed(self, images: Images) -> None:
        """A linear model of two classes: one step reaches the optimum, and twenty reach the same."""
        x, y = images[0].flatten(1), images[1] % 2
        check = masking.rises_with_steps(nn.Linear(64, 2), x, y, 0.1)
        assert check.outcome == "passed"

    def test_gradients_that_are_zero(self, model: nn.Module, images: Images) -> None:
        check = masking.rises_with_steps(Quantised(model, 1), *images, 0.1)
        assert check.outcome == "warning"
        assert "steps along the gradient gain nothing" in check.sentence

    def test_gradients_that_mislead(self, images: Images) -> None:
        """A long step leaps over the dip beside a low hill, on which short ones stay."""

        def hills(x: Tensor) -> Tensor:
            hill = torch.minimum(x - 0.5, 0.7 - x)
            return torch.cat([torch.zeros_like(x), torch.where(x > 0.8, 3 + 0 * x, hill)], dim=1)

        x, y = torch.full((20, 1), 0.5), torch.zeros(20, dtype=torch.int64)
        check = masking.rises_with_steps(hills, x, y, 0.4)
        assert check.outcome == "warning"
        assert "the gradients mislead" in check.sentence

    def test_no_step_at_radius_zero(self, model: nn.Module, images: Images) -> None:
        assert masking.rises_with_steps(model, *images, 0.0).outcome == "not run"

    def test_one_image_more_that_is_right_is_chance(
        self, model: nn.Module, images: Images, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def after(right: float) -> masking.Check:
            found = iter([(1.0, 0.9), (2.0, 0.4), (2.1, 0.4), (2.2, right)])
            monkeypatch.setattr(masking, "_after_steps", lambda *_: next(found))
            return masking.rises_with_steps(model, *(part[:32] for part in images), 0.1)

        assert after(0.4 + 1 / 32).outcome == "passed"
        check = after(0.4 + 2 / 32)
        assert check.outcome == "warning"
        assert "40.0 % are right after 1 step and 46.2 % after 20" in check.sentence


def outcome(
    name: str, fell: list[int], *, eps: float = 0.1, black_box: bool = False, restarts: int = 1
) -> AttackOutcome:
    return AttackOutcome(name, black_box, eps, restarts, torch.tensor(fell), 1.0)


def table(*outcomes: AttackOutcome) -> AttackTable:
    return AttackTable(outcomes[0].fell != 0, outcomes)


class TestBlackBox:
    def test_by_hand(self) -> None:
        def judge(fell: list[int]) -> masking.Check:
            white, black = outcome("pgd", [0, 1, 1, -1, -1, -1]), outcome("square", fell, black_box=True)
            return masking.black_box_beats_white_box(table(white, black), 0.1)

        quiet = judge([0, -1, 1, -1, -1, -1])
        assert quiet.outcome == "passed"
        loud = judge([0, -1, 1, 1, 1, -1])
        assert loud.outcome == "warning"
        assert loud.numbers["broken_by_black_box_alone"] == pytest.approx(2 / 6)
        assert (loud.eps, loud.numbers["white_box"], loud.numbers["black_box"]) == (0.1, 3 / 6, 2 / 6)

    def test_one_sample_alone_is_no_sign(self) -> None:
        found = table(outcome("pgd", [1, -1, -1]), outcome("square", [1, 1, -1], black_box=True))
        assert masking.black_box_beats_white_box(found, 0.1).outcome == "passed"

    @pytest.mark.parametrize("black_box", [True, False])
    def test_nothing_to_compare(self, black_box: bool) -> None:
        check = masking.black_box_beats_white_box(table(outcome("x", [1, -1], black_box=black_box)), 0.1)
        assert check.outcome == "not run"
        assert ("no attack that uses gradients" in check.sentence) == black_box

    def test_transfer_beats_blind_attacks(self, model: nn.Module, images: Images) -> None:
        attack = Attack("log_odds", steps=10, restarts=2)
        other = trained_cnn(TrainingLoss("ce"), seed=1, epochs=5)

        def judge(subject: nn.Module, source: nn.Module) -> masking.Check:
            attacks = [attack, Transfer(source, attack)]
            found = attack_table(subject, *images, epsilons=[0.15], attacks=attacks, generator=seeded())
            return masking.black_box_beats_white_box(found, 0.15)

        assert judge(Quantised(model, 1), model).outcome == "warning"
        assert judge(model, other).outcome == "passed"


class TestRestarts:
    def test_by_hand(self) -> None:
        """Of five starts the first three are the first half."""
        quiet = masking.restarts_saturate([outcome("pgd", [0, 1, 2, 3, -1, -1], restarts=5)])
        assert (quiet.outcome, quiet.numbers["broken_by_later_half"]) == ("passed", 0)
        late = outcome("pgd", [0, 1, 2, 3, 4, -1], restarts=5)
        loud = masking.restarts_saturate([late])
        assert loud.outcome == "warning"
        assert loud.numbers["broken_by_later_half"] == pytest.approx(1 / 6)
        assert loud.numbers["standing"] == {"pgd": [4, 3, 2, 1, 1]}
        # What another attack breaks at once is not late.
        assert masking.restarts_saturate([late, outcome("fgsm", [0, -1, -1, -1, 1, -1])]).outcome == "passed"

    def test_one_start_tells_nothing(self) -> None:
        assert masking.restarts_saturate([outcome("pgd", [1, -1])]).outcome == "not run"
        assert masking.restarts_saturate([]).outcome == "not run"

    def test_noise_wears_every_image_down(self, model: nn.Module, images: Images) -> None:
        attack = Attack("margin", steps=5, restarts=8)
        honest, noisy = (
            run_attack(subject, *images, attack, 0.05, generator=seeded()) for subject in (model, Noisy(model, 0.25))
        )
        assert masking.restarts_saturate([honest]).outcome == "passed"
        assert masking.restarts_saturate([noisy]).outcome == "warning"


class TestConvergence:
    def test_by_hand(self) -> None:
        """Misclassified, broken by both, by the first alone, by the second alone, by none."""
        first, second = outcome("pgd", [0, 1, 2, -1, -1]), outcome("apgd-t", [0, 1, -1, 3, -1])
        check = masking.attacks_agree([first, second])
        assert (check.outcome, check.eps) == ("warning", 0.1)
        assert check.numbers == {"broken_by_one": 0.4, "attack": "pgd"}
        assert "40.0 % of all images are broken by a single one of the attacks with gradients" in check.sentence
        same = masking.attacks_agree([first, replace(first, attack="apgd-t")])
        assert (same.outcome, same.numbers["broken_by_one"]) == ("passed", 0)
        alone = outcome("apgd-t", [0, 1, -1, -1, -1])
        assert masking.attacks_agree([first, alone]).outcome == "passed"  # one sample is no sign
        # What a third broke as well is not broken by one alone.
        third = outcome("fab-t", [0, -1, 1, 1, -1])
        assert masking.attacks_agree([first, second, third]).outcome == "passed"

    def test_outcomes_that_do_not_belong_together(self) -> None:
        first = outcome("pgd", [0, 1, 2, -1, -1])
        for check in (masking.attacks_agree, masking.restarts_saturate):
            with pytest.raises(ValueError, match=r"outcomes must be at one eps, got 0\.1, 0\.2"):
                check([first, outcome("apgd-t", [0, 1, 2, -1, -1], eps=0.2)])
            with pytest.raises(ValueError, match="outcomes must be of the same images, got 4, 5 of them"):
                check([first, outcome("apgd-t", [0, 1, 2, -1])])

    def test_other_kinds_do_not_count(self) -> None:
        first, second = outcome("pgd", [0, 1, 2, -1]), outcome("apgd-t", [0, 1, 2, -1])
        for other in (outcome("fgsm:ce", [0, 1, 2, 1]), outcome("square", [0, 1, 2, 1], black_box=True)):
            assert masking.attacks_agree([first, second, other]).outcome == "passed"
            assert masking.attacks_agree([first, other]).outcome == "not run"
        assert masking.attacks_agree([]).outcome == "not run"

    def test_an_attack_that_sees_beside_one_that_is_blind(self, model: nn.Module, images: Images) -> None:
        """Hundredfold logits: cross-entropy in float32 is 0 on most images, and has no gradient there."""
        attacks = [Attack(loss, steps=20, restarts=2) for loss in ("margin", "log_odds")]
        blind = Attack(lambda logits, y: F.cross_entropy(logits, y, reduction="none"), steps=5, restarts=1)

        def judge(*attacks: Attack) -> masking.Check:
            found = attack_table(Scaled(model, 100), *images, epsilons=[0.05], attacks=attacks, generator=seeded())
            return masking.attacks_agree(found.outcomes)

        assert judge(*attacks).outcome == "passed"
        check = judge(attacks[0], blind)
        assert (check.outcome, check.numbers["attack"]) == ("warning", "pgd:margin")


class TestGrowingEps:
    def test_by_hand(self) -> None:
        small, large = outcome("pgd", [1, -1, -1]), outcome("pgd", [1, 1, -1], eps=0.2)
        assert masking.never_rises(table(small, large)).outcome == "passed"
        weaker = outcome("pgd", [-1, -1, -1], eps=0.2)
        check = masking.never_rises(table(small, weaker))
        assert check.outcome == "warning"
        assert check.numbers == {"rises": [["pgd", 0.1, 0.2]]}
        assert "pgd leaves more images standing at eps 0.2 than at eps 0.1" in check.sentence

    def test_single_steps_may_overshoot(self) -> None:
        found = table(outcome("fgsm:ce", [1, -1, -1]), outcome("fgsm:ce", [-1, -1, -1], eps=0.2))
        assert masking.never_rises(found).outcome == "passed"

    def test_a_single_radius(self) -> None:
        assert masking.never_rises(table(outcome("pgd", [1, -1]))).outcome == "not run"


@pytest.mark.parametrize("name", list(masking.checks_of_model(nn.Identity(), torch.zeros(0, 4), torch.zeros(0))))
def test_no_image_is_no_pass(name: str) -> None:
    checks = masking.checks_of_model(nn.Linear(4, 2), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="x must hold one image or more, got none"):
        checks[name]()


class Broken(Scaled):
    """One of its logits is NaN."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).clone()
        logits[:, 3] = float("nan")
        return logits


CHECKS: dict[str, Any] = {
    "gradients": masking.gradients_vanish,
    "saturation": masking.softmax_saturates,
    "randomness": lambda model, x, y, **options: masking.outputs_vary(model, x, **options),
    "large eps": masking.falls_with_eps,
    "steps": lambda model, x, y, **options: masking.rises_with_steps(model, x, y, 0.1, **options),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_model_that_gives_nan_does_not_pass(model: nn.Module, images: Images, name: str) -> None:
    with pytest.raises(FloatingPointError, match=r"NaN|not finite"):
        CHECKS[name](Broken(model, 1), *images)


@pytest.mark.parametrize("name", CHECKS)
def test_bad_samples(model: nn.Module, images: Images, name: str) -> None:
    x, y = images
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        CHECKS[name](model, x, y, batch_size=0)
    with pytest.raises(TypeError, match="batch_size must be an int, got '8'"):
        CHECKS[name](model, x, y, batch_size="8")
    with pytest.raises(ValueError, match="model must return logits of shape"):
        CHECKS[name](lambda x: x.flatten(1)[:, :1], x, y)
    if name != "randomness":
        with pytest.raises(TypeError, match=r"y must hold class indices of dtype int64, got torch\.int32"):
            CHECKS[name](model, x, y.int())
        with pytest.raises(ValueError, match=r"y must have shape \(N,\) = \(100,\), got \(99,\)"):
            CHECKS[name](model, x, y[1:])
        with pytest.raises(IndexError, match=r"y holds label 12, outside \[0, C\) = \[0, 10\)"):
            CHECKS[name](model, x, torch.full_like(y, 12))


@pytest.mark.parametrize("steps", [(), (5,), (0, 5), (5, 1), (5, 5)])
def test_bad_steps(model: nn.Module, images: Images, steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="steps must be two numbers or more, 1 or larger and ascending, got"):
        masking.rises_with_steps(model, *images, 0.1, steps=steps)


def test_steps_are_named(model: nn.Module, images: Images) -> None:
    assert " in 2 steps and " in masking.rises_with_steps(model, *images, 0.1, steps=(2, 5)).sentence


def test_what_a_table_does_not_hold() -> None:
    found = table(outcome("pgd", [1, -1]))
    with pytest.raises(ValueError, match=r"no outcome of attack 'pgd' at eps 0\.2; there are pgd at 0\.1"):
        found.of("pgd", 0.2)
    with pytest.raises(ValueError, match=r"eps must be one of the table's, 0\.1; got 0\.2"):
        masking.black_box_beats_white_box(found, 0.2)
