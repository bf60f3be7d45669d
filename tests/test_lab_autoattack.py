"""The members of AutoAttack: what they find, what they leave untouched, and what they say where they cannot work."""

from __future__ import annotations

import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
from cases import seeded
from test_lab_attacks import images, model
from torch import Tensor, nn

from drsl_kernels.robustness import Attack, AutoAttackMember
from drsl_kernels.robustness.attack_table import run_attack
from drsl_kernels.robustness.autoattack import AUTOATTACK

pytestmark = pytest.mark.usefixtures("one_thread")

__all__ = ["images", "model"]  # fixtures

EPS = {"linf": 0.12, "l2": 0.8}


def few(images: tuple[Tensor, Tensor], count: int = 30) -> tuple[Tensor, Tensor]:
    return images[0][:count], images[1][:count]


def quick(member: str, norm: str = "linf") -> AutoAttackMember:
    return AutoAttackMember(member, norm, steps=10, queries=150, targets=3)  # type: ignore[arg-type]


class TestMembers:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("pyautoattack")

    @pytest.mark.parametrize("norm", EPS)
    @pytest.mark.parametrize("member", AUTOATTACK)
    def test_breaks_some_and_stays_inside(
        self, model: nn.Module, images: tuple[Tensor, Tensor], member: str, norm: Any
    ) -> None:
        x, y = few(images)
        outcome = run_attack(model, x, y, quick(member, norm), EPS[norm], generator=seeded())  # checks ball and bounds
        clean = (model(x).argmax(1) == y).double().mean().item()
        assert outcome.accuracy() < clean - 0.05
        assert outcome.attack == member
        assert outcome.black_box == (member == "square")

    @pytest.mark.parametrize("member", ["apgd-ce", "apgd-t", "fab-t"])
    def test_gradient_attacks_are_about_as_strong_as_pgd(
        self, model: nn.Module, images: tuple[Tensor, Tensor], member: str
    ) -> None:
        pgd = run_attack(model, *images, Attack("margin", restarts=2), EPS["linf"], generator=seeded())
        theirs = run_attack(model, *images, AutoAttackMember(member, steps=30), EPS["linf"], generator=seeded())
        assert theirs.accuracy() == pytest.approx(pgd.accuracy(), abs=0.06)

    @pytest.mark.parametrize("member", AUTOATTACK)
    def test_leaves_everything_as_found(self, model: nn.Module, images: tuple[Tensor, Tensor], member: str) -> None:
        subject = nn.Sequential(deepcopy(model), nn.Dropout(0.5)).train()
        subject[0].head.bias.requires_grad_(False)
        subject[0].head.weight.grad = torch.full_like(subject[0].head.weight, 7.0)
        x, y = few(images, 6)
        before, state = x.clone(), torch.get_rng_state()
        quick(member).start(subject, x, y, eps=0.1, bounds=(0, 1), generator=seeded())
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(x, before)
        assert all(module.training for module in subject.modules())
        assert not subject[0].head.bias.requires_grad
        assert torch.equal(subject[0].head.weight.grad, torch.full_like(subject[0].head.weight, 7.0))
        assert all(p.grad is None for p in subject.parameters() if p is not subject[0].head.weight)

    @pytest.mark.parametrize("member", ["apgd-ce", "square"])
    def test_same_generator_same_result(self, model: nn.Module, images: tuple[Tensor, Tensor], member: str) -> None:
        def points(seed: int) -> Tensor:
            return quick(member).start(model, *few(images), eps=0.15, bounds=(0, 1), generator=seeded(seed))

        assert torch.equal(points(0), points(0))
        assert not torch.equal(points(0), points(1))

    def test_dropout_is_off_during_the_attack(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        def points(training: bool) -> Tensor:
            subject = nn.Sequential(model, nn.Dropout(0.5)).train(training)
            return quick("apgd-ce").start(subject, *few(images), eps=0.12, bounds=(0, 1), generator=seeded())

        assert torch.equal(points(training=True), points(training=False))

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_works_wherever_it_is_called(self, model: nn.Module, images: tuple[Tensor, Tensor], context: Any) -> None:
        options: dict[str, Any] = {"eps": 0.12, "bounds": (0, 1)}
        x, y = few(images)
        outside = quick("apgd-ce").start(model, x, y, **options, generator=seeded())
        with context():
            inside = quick("apgd-ce").start(model, x * 1, y * 1, **options, generator=seeded())
        assert torch.equal(inside, outside)

    def test_float64(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        x, y = few(images, 8)
        found = quick("apgd-t").start(
            deepcopy(model).double(), x.double(), y, eps=0.12, bounds=(0, 1), generator=seeded()
        )
        assert found.dtype == torch.float64
        assert (found - x.double()).abs().max() <= 0.12 + 1e-12

    @pytest.mark.parametrize(("member", "least"), [("apgd-dlr", 3), ("apgd-t", 4)])
    def test_too_few_classes(self, member: str, least: int) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, least - 1))
        with pytest.raises(ValueError, match=f"{member} needs a model of {least} classes or more, got {least - 1}"):
            self.start(member, model)

    def test_targets_among_few_classes(self) -> None:
        """Nine targets are asked for, and three are there."""
        assert self.start("fab-t", nn.Sequential(nn.Flatten(), nn.Linear(16, 4))).shape == (2, 1, 4, 4)

    def test_square_needs_images(self) -> None:
        with pytest.raises(ValueError, match=r"x must have shape \(N, C, height, width\) for square, got \(2, 16\)"):
            self.start("square", nn.Linear(16, 5), x=torch.zeros(2, 16))

    def test_bounds(self) -> None:
        with pytest.raises(ValueError, match=r"bounds must be \(0, 1\), which apgd-ce assumes, got \(-1, 1\)"):
            self.start("apgd-ce", nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), bounds=(-1, 1))

    def test_generator(self) -> None:
        with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got 3"):
            self.start("apgd-ce", nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), generator=3)

    def start(self, member: str, model: nn.Module, **options: Any) -> Tensor:
        arguments = {"x": torch.full((2, 1, 4, 4), 0.5), "y": torch.tensor([0, 1]), "eps": 0.1, "bounds": (0, 1)}
        return AutoAttackMember(member, steps=2, queries=2).start(model, **({"generator": None} | arguments | options))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"member": "pgd"}, "member must be one of 'apgd-ce', .*, got 'pgd'"),
        ({"norm": "l1"}, "norm must be one of 'linf', 'l2', got 'l1'"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"queries": 0}, "queries must be 1 or more, got 0"),
        ({"targets": 0}, "targets must be 1 or more, got 0"),
        ({"restarts": 0}, "restarts must be 1 or more, got 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoAttackMember(**({"member": "square"} | settings))


def test_counts_are_whole_numbers() -> None:
    for argument in ("steps", "queries", "targets", "restarts"):
        with pytest.raises(TypeError, match=f"{argument} must be an int, got 2.5"):
            AutoAttackMember("square", **{argument: 2.5})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, images: tuple[Tensor, Tensor]) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    attack = AutoAttackMember("apgd-ce")  # needs no package yet
    with pytest.raises(ModuleNotFoundError, match=r"need the package 'pyautoattack': pip install 'drsl_kernels\[auto"):
        attack.start(nn.Identity(), *few(images), eps=0.1, bounds=(0, 1), generator=None)
