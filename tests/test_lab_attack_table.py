"""Attacks of several kinds beside each other: what each leaves, what all leave, and what they leave untouched."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from cases import seeded
from test_lab_attacks import images, model, trained_cnn
from torch import Tensor, nn

from drsl_kernels.robustness import (
    PGD,
    Attack,
    SingleStep,
    TargetedAttack,
    TrainingLoss,
    Transfer,
    attack_kinds,
    attack_table,
    worst_case,
)
from drsl_kernels.robustness.attack_table import AttackOutcome, AttackTable, run_attack

pytestmark = pytest.mark.usefixtures("one_thread")

__all__ = ["images", "model"]  # fixtures

ATTACKS = (Attack("margin", steps=5, restarts=2), SingleStep("ce"), TargetedAttack("ce", steps=5, targets=3))


@pytest.fixture(scope="module")
def other() -> nn.Module:
    return trained_cnn(TrainingLoss("non_target_logits", 0.3), seed=1, epochs=4)


@pytest.fixture(scope="module")
def table(model: nn.Module, other: nn.Module, images: tuple[Tensor, Tensor]) -> Any:
    attacks = [*ATTACKS, Transfer(other, Attack("margin", steps=5, restarts=1))]
    return attack_table(model, *images, epsilons=[0.1, 0.05, 0.2], attacks=attacks, generator=seeded())


class TestTable:
    def test_holds_every_attack_at_every_radius(self, table: Any) -> None:
        assert table.attacks == ("pgd:margin", "fgsm:ce", "pgd-t:ce", "transfer:margin")
        assert table.epsilons == (0.05, 0.1, 0.2)
        assert len(table.outcomes) == 12
        assert [table.of(name, 0.1).black_box for name in table.attacks] == [False, False, False, True]

    def test_the_worst_case_is_never_above_any_attack(self, table: Any) -> None:
        worst = table.worst_case()
        for outcome in table.outcomes:
            assert worst[outcome.eps] <= outcome.accuracy() <= table.clean_accuracy()
            assert (table.robust(outcome.eps) <= outcome.robust).all()
        assert list(worst.values()) == sorted(worst.values(), reverse=True)
        together = torch.stack([table.of(name, 0.05).robust for name in table.attacks]).all(0)
        assert torch.equal(table.robust(0.05), together)
        assert worst[0.1] < min(table.of(name, 0.1).accuracy() for name in ("fgsm:ce", "transfer:margin"))

    def test_what_falls_at_a_small_radius_has_fallen_at_every_larger_one(self) -> None:
        small, large = (
            AttackOutcome("pgd", False, eps, 1, torch.tensor(fell), 1.0)
            for eps, fell in ((0.1, [0, 1, -1]), (0.2, [0, -1, -1]))
        )
        found = AttackTable(torch.tensor([False, True, True]), (small, large))
        assert found.worst_case() == {0.1: pytest.approx(1 / 3), 0.2: pytest.approx(1 / 3)}

    def test_a_transferred_attack_is_weaker(self, table: Any) -> None:
        assert table.of("transfer:margin", 0.1).accuracy() > table.of("pgd:margin", 0.1).accuracy()
        assert table.of("transfer:margin", 0.2).accuracy() < table.clean_accuracy()

    def test_counts_start_by_start(self, table: Any) -> None:
        outcome = table.of("pgd:margin", 0.1)
        standing = outcome.standing()
        assert len(standing) == 2
        assert int(table.clean_correct.sum()) >= standing[0] >= standing[1] == int(outcome.robust.sum())
        assert int((outcome.fell == 0).sum()) == int((~table.clean_correct).sum())
        assert int((outcome.fell == 1).sum()) == int(table.clean_correct.sum()) - standing[0]

    def test_black_box_and_white_box_apart(self, table: Any) -> None:
        white, black = (table.robust(0.2, black_box=kind) for kind in (False, True))
        assert torch.equal(white & black, table.robust(0.2))
        assert black.sum() > white.sum()

    def test_agrees_with_worst_case(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        attacks = [Attack("margin", steps=5, restarts=1)]
        table = attack_table(model, *images, epsilons=[0.1], attacks=attacks, generator=seeded())
        found = worst_case(model, *images, epsilons=[0.1], attacks=attacks, generator=seeded())
        assert torch.equal(table.robust(0.1), found.robust[0])
        assert torch.equal(table.clean_correct, found.clean_correct)

    def test_radius_zero_is_clean(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        outcome = run_attack(model, *images, Attack("margin", steps=2, restarts=2), 0.0)
        assert outcome.accuracy() == pytest.approx((model(images[0]).argmax(1) == images[1]).double().mean().item())

    def test_targets_are_the_likeliest_wrong_classes(
        self, model: nn.Module, images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        correct = model(images[0]).argmax(1) == images[1]
        x, y = images[0][correct][:10], images[1][correct][:10]
        asked = []
        pgd = attack_kinds.pgd
        monkeypatch.setattr(attack_kinds, "pgd", lambda *a, **o: (asked.append(o["targeted"]), pgd(*a, **o))[1])
        TargetedAttack(steps=1, targets=3).start(model, x, y, eps=1e-3, bounds=(0, 1), generator=seeded())
        ranked = model(x).argsort(1, descending=True)
        wrong = ranked[ranked != y.unsqueeze(1)].view(10, 9)
        assert torch.equal(torch.stack(asked, dim=1), wrong[:, :3])

    def test_more_targets_break_more(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        left = [
            run_attack(model, *images, TargetedAttack("margin", steps=5, targets=count), 0.12, generator=seeded())
            for count in (1, 20)
        ]
        assert left[1].accuracy() < left[0].accuracy()

    def test_models_are_left_as_found(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        x, y = images[0][:10], images[1][:10]
        subject, source = (nn.Sequential(deepcopy(model), nn.Dropout(0.0)).train() for _ in range(2))
        attacks = [*ATTACKS, Transfer(source, Attack("ce", steps=2, restarts=1))]
        before = x.clone()
        attack_table(subject, x, y, epsilons=[0.1], attacks=attacks)
        for left in (subject, source):
            assert all(module.training for module in (left, left[1]))
            assert all(parameter.grad is None and parameter.requires_grad for parameter in left.parameters())
        assert torch.equal(x, before)

    def test_an_attack_that_leaves_its_ball_is_an_error(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        class TooFar(Attack):
            def start(self, *arguments: Any, **options: Any) -> Tensor:
                points: Tensor = super().start(*arguments, **(options | {"eps": 2 * options["eps"]}))
                return points

        with pytest.raises(ValueError, match=r"attack pgd:log_odds must stay within eps=0.1 .*got a change of 0.2"):
            run_attack(model, *images, TooFar(steps=3), 0.1)

    def test_the_batch_that_is_not_finite_is_named(self) -> None:
        """NaN for samples above 0.5, which only the third batch comes to be."""

        def breaks(x: Tensor) -> Tensor:
            return torch.cat([x, 0.4 - x], dim=1) + torch.where(x > 0.5, math.nan, 0.0)

        x, y = torch.tensor([[0.3]] * 4 + [[0.45]] * 2), torch.zeros(6, dtype=torch.int64)
        with pytest.raises(FloatingPointError, match=r"pgd:log_odds, eps 0.1, a batch of samples 4 to 5: .*not finite"):
            run_attack(breaks, x, y, Attack(steps=5), 0.1, batch_size=2)

    def test_nan_is_no_success(self, images: tuple[Tensor, Tensor]) -> None:
        with pytest.raises(FloatingPointError, match="logits are NaN"):
            run_attack(lambda x: x.flatten(1)[:, :10] * math.nan, *images, Attack(), 0.1)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"epsilons": []}, r"epsilons must not be empty, got \[\]"),
            ({"epsilons": [-1]}, r"epsilons must be 0 or more and finite, got \(-1.0,\)"),
            ({"attacks": []}, r"attacks must not be empty, got \[\]"),
            ({"attacks": [Attack(), Attack(steps=3)]}, "names of their own, got pgd:log_odds, pgd:log_odds"),
            ({"attacks": [Attack(norm="l2"), SingleStep()]}, "attacks must be in one norm, got l2, linf"),
            ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ],
    )
    def test_bad_input(
        self, model: nn.Module, images: tuple[Tensor, Tensor], change: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            attack_table(model, *images, **({"epsilons": [0.1], "attacks": [Attack(steps=1)]} | change))

    def test_worst_case_takes_attacks_of_any_kind(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        found = worst_case(model, *images, epsilons=[0.1], attacks=ATTACKS, generator=seeded())
        assert found.robust_accuracy()[0] < found.clean_accuracy()
        with pytest.raises(ValueError, match="attacks must be in one norm"):
            worst_case(model, *images, epsilons=[0.1], attacks=[Attack(norm="l2"), SingleStep()])

    @pytest.mark.parametrize("attack_with", [attack_table, worst_case])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"attacks": [Attack(), PGD(eps=0.1)]}, r"attacks\[1\] must be an attack for any radius.*got PGD\(eps=0.1"),
            ({"attacks": ["pgd"]}, r"attacks\[0\] must be an attack for any radius, such as Attack\(\), got 'pgd'"),
            ({"attacks": [Attack]}, r"attacks\[0\] must be an attack for any radius.*got <class"),
            ({"attacks": "pgd"}, r"attacks\[0\] must be an attack for any radius.*got 'p'"),
            ({"attacks": Attack()}, "attacks must be a sequence of attacks .*, got Attack"),
            ({"epsilons": 0.1}, "epsilons must be a sequence of numbers, got 0.1"),
            ({"epsilons": torch.tensor(0.5)}, r"epsilons must be a sequence of numbers, got tensor\(0.5"),
            ({"epsilons": [0.1, "0.1"]}, r"epsilons\[1\] must be a number, got '0.1'"),
            ({"generator": 3}, "generator must be a torch.Generator or None, got 3"),
        ],
    )
    def test_bad_types(
        self, model: nn.Module, images: tuple[Tensor, Tensor], attack_with: Any, change: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(TypeError, match=message):
            attack_with(model, *images, **({"epsilons": [0.1], "attacks": [Attack(steps=1)]} | change))

    def test_radii_may_be_any_numbers_in_a_row(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        expected = (0.0, 0.125, 0.25)
        for epsilons in (list(expected), torch.tensor(expected), np.float32(expected), (0.25, np.float64(0.125), 0)):
            for attack_with in (attack_table, worst_case):
                found = attack_with(model, *images, epsilons=epsilons, attacks=[Attack(steps=1, restarts=1)])
                assert found.epsilons == expected

    def test_the_radius_of_one_attack(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        with pytest.raises(TypeError, match=r"eps must be a number, got '0.1'"):
            run_attack(model, *images, Attack(), "0.1")  # type: ignore[arg-type]

    @pytest.mark.parametrize("argument", ["steps", "restarts", "targets"])
    def test_bad_attacks(self, argument: str) -> None:
        with pytest.raises(ValueError, match=f"{argument} must be 1 or more, got 0"):
            TargetedAttack(**{argument: 0})
        with pytest.raises(ValueError, match="loss must be one of"):
            SingleStep("hinge")  # type: ignore[arg-type]
