"""Attacks towards given classes, and the difference-of-logits ratio."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import seeded
from test_lab_attacks import cross_entropy_of_torch, images, model, other_classes
from torch import Tensor, nn

from drsl_kernels.robustness import pgd
from drsl_kernels.robustness.attack_losses import objective_of

pytestmark = pytest.mark.usefixtures("one_thread")

__all__ = ["images", "model"]  # fixtures


class TestTargets:
    @pytest.mark.parametrize("loss", ["log_odds", "ce", "margin", "dlr", cross_entropy_of_torch])
    def test_points_are_taken_for_their_targets(
        self, model: nn.Module, images: tuple[Tensor, Tensor], loss: Any
    ) -> None:
        x, y = images
        targeted = other_classes(y)
        options: dict[str, Any] = {"eps": 0.35, "alpha": 0.04, "steps": 25, "loss": loss}
        towards = model(pgd(model, x, y, **options, targeted=targeted, generator=seeded())).argmax(1)
        away = model(pgd(model, x, y, **options, generator=seeded())).argmax(1)
        assert (towards == targeted).float().mean() > 0.8
        assert (away == targeted).float().mean() < 0.5

    def test_success_is_the_target_and_nothing_else(self) -> None:
        """Class 2 lies at hand and is not wanted; the target, 1, lies further along the same way."""

        def three(x: Tensor) -> Tensor:
            return torch.cat([0.1 - x, 4 * x - 2, 0.5 - (x - 0.3).abs()], dim=1)

        x, y = torch.zeros(1, 1), torch.tensor([0])
        options: dict[str, Any] = {"eps": 1, "alpha": 0.1, "steps": 10, "random_start": False, "loss": "margin"}
        found = pgd(three, x, y, targeted=torch.tensor([1]), **options)
        assert three(found).argmax(1).item() == 1
        assert three(pgd(three, x, y, **{**options, "steps": 2})).argmax(1).item() == 2

    def test_a_tie_is_no_success(self) -> None:
        def against_zero(x: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(x), x], dim=1)

        standing = objective_of("margin")(against_zero(torch.zeros(1, 1)), torch.tensor([0]), torch.tensor([1]))[1]
        assert standing.tolist() == [True]

    @pytest.mark.parametrize(
        ("targeted", "error", "message"),
        [
            ([1], TypeError, "targeted must be a Tensor, got list"),
            (torch.tensor([1.0, 1.0]), TypeError, "targeted must hold class indices of dtype int64, got torch.float32"),
            (torch.tensor([1]), ValueError, r"targeted must have shape \(N,\) = \(2,\), got \(1,\)"),
            (torch.tensor([1, -1]), ValueError, "targeted must hold classes 0 or more, got -1"),
            (torch.tensor([1, 2]), ValueError, "targeted must name other classes than y, got 2 for both in row 1"),
            (torch.tensor([1, 3]), IndexError, r"targeted holds label 3, outside \[0, C\) = \[0, 3\)"),
        ],
    )
    def test_bad_targets(self, targeted: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            pgd(nn.Linear(4, 3), torch.zeros(2, 4), torch.tensor([0, 2]), eps=1, alpha=1, steps=1, targeted=targeted)


class TestDifferenceOfLogitsRatio:
    @pytest.fixture
    def logits(self) -> Tensor:
        return torch.randn(50, 7, generator=seeded()).double()

    def test_as_in_the_paper(self, logits: Tensor) -> None:
        y, targeted = torch.arange(50) % 7, (torch.arange(50) + 3) % 7
        away, standing = objective_of("dlr")(logits, y, None)
        towards, unreached = objective_of("dlr")(logits, y, targeted)
        for row, (z, label, target) in enumerate(zip(logits.tolist(), y.tolist(), targeted.tolist(), strict=True)):
            ranked = sorted(z, reverse=True)
            wrong = max(value for k, value in enumerate(z) if k != label)
            assert away[row].item() == pytest.approx(-(z[label] - wrong) / (ranked[0] - ranked[2]))
            scale = ranked[0] - (ranked[2] + ranked[3]) / 2
            assert towards[row].item() == pytest.approx(-(z[label] - z[target]) / scale)
            assert standing[row].item() == (ranked[0] == z[label])
            assert unreached[row].item() == (ranked[0] != z[target])

    def test_the_scale_of_logits_does_not_matter(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        options: dict[str, Any] = {"eps": 0.1, "alpha": 0.025, "steps": 10, "loss": "dlr"}
        plain = pgd(model, *images, **options, generator=seeded())
        scaled = pgd(lambda x: 128 * model(x), *images, **options, generator=seeded())
        assert torch.equal(plain, scaled)

    def test_three_equal_logits_are_no_error(self) -> None:
        losses, _ = objective_of("dlr")(torch.zeros(1, 4), torch.tensor([0]), None)
        assert losses.tolist() == [0]

    @pytest.mark.parametrize(("classes", "targeted"), [(2, None), (3, torch.tensor([1]))])
    def test_too_few_classes(self, classes: int, targeted: Tensor | None) -> None:
        with pytest.raises(ValueError, match=f"needs {classes + 1} classes or more, got {classes}"):
            objective_of("dlr")(torch.zeros(1, classes), torch.tensor([0]), targeted)
