"""PGD and FGSM beside foolbox and closed forms; scaled logits; attacks as objects."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import seeded
from torch import Tensor, nn

from drsl_kernels.robustness import (
    FGSM,
    PGD,
    Attack,
    Recipe,
    TrainingLoss,
    fgsm,
    pgd,
    train,
    worst_case,
)
from drsl_kernels.robustness.attack_losses import per_sample
from drsl_kernels.robustness.attacks import NORMS
from drsl_kernels.robustness.data import digits
from drsl_kernels.robustness.loss_names import LOSS_NAMES
from drsl_kernels.robustness.models import small_cnn

pytestmark = pytest.mark.usefixtures("one_thread")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of scipy, at what foolbox imports
    import foolbox

UNBOUNDED = (-math.inf, math.inf)


def cross_entropy_of_torch(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def trained_cnn(loss: TrainingLoss, seed: int = 0, epochs: int = 12) -> nn.Module:
    split = digits()
    model = small_cnn(seed)
    train(model, split.train_x, split.train_y, loss, Recipe(epochs=epochs), generator=seeded(seed))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A small CNN, trained with cross-entropy on the digits."""
    return trained_cnn(TrainingLoss("ce"))


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    split = digits()
    return split.held_out_x[:100], split.held_out_y[:100]


def other_classes(y: Tensor, classes: int = 10) -> Tensor:
    return (y + torch.randint(1, classes, y.shape, generator=seeded(8))) % classes


class Watched(nn.Module):
    """A model that remembers every point that it was shown."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        logits: Tensor = self.model(x)
        return logits


def foolbox_attack(
    attack: Any, model: nn.Module, x: Tensor, y: Tensor, eps: float, start: Tensor | None, targeted: Tensor | None
) -> Tensor:
    """Clipped last points, from `start` if there is one."""
    if start is not None:
        attack.random_start = True
        attack.get_random_start = lambda x0, epsilon: type(x0)(start)
    subject = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device="cpu")
    criterion = foolbox.criteria.Misclassification(y)
    if targeted is not None:
        criterion = foolbox.criteria.TargetedMisclassification(targeted)
    points: Tensor = attack.run(subject, x, criterion, epsilon=eps)
    model.zero_grad()  # foolbox leaves gradients in the parameters
    return points


class TestAgainstFoolbox:
    """The same start, step size and number of steps, on the cross-entropy of PyTorch: the same points, to the bit."""

    EPS, STEPS = 0.1, 10
    ALPHA = 2.5 * EPS / STEPS

    @pytest.mark.parametrize("towards", [False, True])
    @pytest.mark.parametrize("random_start", [False, True])
    def test_every_point_agrees(
        self, model: nn.Module, images: tuple[Tensor, Tensor], random_start: bool, towards: bool
    ) -> None:
        x, y = images
        targeted = other_classes(y) if towards else None
        ours, theirs = Watched(model), Watched(model)
        found = pgd(
            ours,
            x,
            y,
            eps=self.EPS,
            alpha=self.ALPHA,
            steps=self.STEPS,
            loss=cross_entropy_of_torch,
            random_start=random_start,
            generator=seeded(),
            targeted=targeted,
            keep="last",
        )
        attack = foolbox.attacks.LinfPGD(abs_stepsize=self.ALPHA, steps=self.STEPS, random_start=False)
        expected = foolbox_attack(attack, theirs, x, y, self.EPS, ours.seen[0] if random_start else None, targeted)
        assert torch.equal(found, expected)
        assert len(theirs.seen) == self.STEPS
        assert all(torch.equal(mine, other) for mine, other in zip(ours.seen, theirs.seen, strict=False))
        assert not torch.equal(found, x)
        assert torch.equal(ours.seen[0], x) != random_start

    @pytest.mark.parametrize("towards", [False, True])
    def test_l2_agrees_but_for_rounding(self, model: nn.Module, images: tuple[Tensor, Tensor], towards: bool) -> None:
        """Each scales gradients to unit length in its own way, so the last bits differ."""
        x, y = images
        targeted = other_classes(y) if towards else None
        found = pgd(
            model,
            x,
            y,
            eps=0.8,
            alpha=0.1,
            steps=4,
            loss=cross_entropy_of_torch,
            norm="l2",
            random_start=False,
            targeted=targeted,
            keep="last",
        )
        attack = foolbox.attacks.L2PGD(abs_stepsize=0.1, steps=4, random_start=False)
        torch.testing.assert_close(found, foolbox_attack(attack, model, x, y, 0.8, None, targeted), rtol=0, atol=1e-4)

    def test_fgsm(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        x, y = images
        attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
        expected = foolbox_attack(attack, model, x, y, 0.1, None, None)
        assert torch.equal(fgsm(model, x, y, eps=0.1, loss=cross_entropy_of_torch), expected)

    def test_the_best_point_is_at_least_as_good(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        arguments = {"eps": self.EPS, "alpha": 0.05, "steps": 8, "random_start": False, "loss": cross_entropy_of_torch}
        x, y = images
        last, best = (pgd(model, x, y, **arguments, keep=keep) for keep in ("last", "best"))
        standing = [(model(points).argmax(1) == y) for points in (last, best)]
        assert (standing[1] <= standing[0]).all()
        higher = cross_entropy_of_torch(model(best), y) >= cross_entropy_of_torch(model(last), y) - 1e-6
        assert (higher | ~standing[1]).all()


class TestClosedForm:
    """Linear models: where the logits change evenly with x, the best point of a ball is known."""

    EPS = 0.7

    @pytest.fixture
    def linear(self) -> nn.Linear:
        layer = nn.Linear(12, 5)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(5, 12, generator=seeded(1)))
            layer.bias.copy_(torch.randn(5, generator=seeded(2)))
        return layer

    def best(self, x: Tensor, direction: Tensor, norm: str) -> Tensor:
        if norm == "linf":
            return x + self.EPS * direction.sign()
        return x + self.EPS * direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("loss", ["log_odds", "ce", "margin"])
    def test_ours_and_foolbox_reach_the_optimum(self, linear: nn.Linear, norm: str, loss: Any) -> None:
        two = nn.Linear(12, 2)
        with torch.no_grad():
            two.weight.copy_(linear.weight[:2])
            two.bias.copy_(linear.bias[:2])
        x = 0.5 + torch.rand(20, 12, generator=seeded(3)) / 100
        y = torch.arange(20) % 2
        best = self.best(x, (two.weight[1 - y] - two.weight[y]).detach(), norm)
        options = {"eps": self.EPS, "alpha": 0.3, "norm": norm, "generator": seeded(), "bounds": (-9, 9)}
        for targeted in (None, 1 - y):
            found = pgd(two, x, y, steps=60, loss=loss, targeted=targeted, **options)
            torch.testing.assert_close(self.lead(two, found, y), self.lead(two, best, y), rtol=1e-4, atol=1e-4)
        attacks = foolbox.attacks
        attack = (attacks.LinfPGD if norm == "linf" else attacks.L2PGD)(abs_stepsize=0.3, steps=60)
        subject = foolbox.PyTorchModel(two.eval(), bounds=(-9, 9), device="cpu")
        theirs = attack.run(subject, x, foolbox.criteria.Misclassification(y), epsilon=self.EPS)
        torch.testing.assert_close(self.lead(two, theirs, y), self.lead(two, best, y), rtol=1e-4, atol=1e-4)

    def lead(self, model: nn.Linear, points: Tensor, y: Tensor) -> Tensor:
        logits, rows = model(points).detach(), torch.arange(len(y))
        return logits[rows, 1 - y] - logits[rows, y]

    @pytest.mark.parametrize("norm", NORMS)
    def test_the_target_of_five_classes(self, linear: nn.Linear, norm: str) -> None:
        def minus_logit(logits: Tensor, target: Tensor) -> Tensor:
            return -logits.gather(1, target.unsqueeze(1)).squeeze(1)

        x = torch.randn(20, 12, generator=seeded(3))
        y = torch.arange(20) % 5
        targeted = (y + 2) % 5
        found = pgd(
            linear,
            x,
            y,
            eps=self.EPS,
            alpha=0.3,
            steps=60,
            loss=minus_logit,
            norm=norm,
            bounds=UNBOUNDED,
            targeted=targeted,
            generator=seeded(),
            keep="last",
        )
        best = self.best(x, linear.weight[targeted].detach(), norm)
        torch.testing.assert_close(found, best, rtol=0, atol=1e-3)

    def test_fgsm_is_the_corner_at_once(self, linear: nn.Linear) -> None:
        two = nn.Linear(12, 2)
        x, y = torch.rand(20, 12, generator=seeded(3)), torch.arange(20) % 2
        direction = (two.weight[1 - y] - two.weight[y]).detach()
        expected = (x + 0.3 * direction.sign()).clamp(0, 1)
        torch.testing.assert_close(fgsm(two, x, y, eps=0.3), expected, rtol=0, atol=1e-6)
        assert torch.equal(fgsm(two, x, y, eps=0), x)

    def test_fgsm_returns_its_step_even_if_it_is_no_better(self) -> None:
        def hollow(x: Tensor) -> Tensor:
            """The label loses ground for a small step up, and gains for a large one."""
            return torch.cat([(x - 0.1).square(), torch.zeros_like(x)], dim=1)

        x, y = torch.tensor([[0.09]]), torch.tensor([0])
        assert fgsm(hollow, x, y, eps=0.5).item() == pytest.approx(0.59)
        assert pgd(hollow, x, y, eps=0.5, alpha=0.5, steps=1, random_start=False).item() == pytest.approx(0.09)


class TestScaleOfLogits:
    """Multiplied logits decide nothing anew. The worst case stays; an attack on F.cross_entropy sees less and less."""

    SCALES = (1, 5, 20, 100)

    def accuracies(self, model: nn.Module, images: tuple[Tensor, Tensor], *losses: Any) -> list[float]:
        attacks = [Attack(loss, steps=10, restarts=2) for loss in losses]

        def under_attack(scale: float) -> float:
            def scaled(x: Tensor) -> Tensor:
                return scale * model(x)

            return worst_case(scaled, *images, epsilons=[0.1], attacks=attacks, generator=seeded()).robust_accuracy()[0]

        return [under_attack(scale) for scale in self.SCALES]

    def test_worst_case_against_the_naive_attack(self, model: nn.Module) -> None:
        split = digits()
        many = split.held_out_x[:300], split.held_out_y[:300]
        ours = self.accuracies(model, many, "log_odds", "margin")
        naive = self.accuracies(model, many, cross_entropy_of_torch)
        assert 0.2 < ours[0] < 0.8
        assert max(ours) - min(ours) <= 0.01
        assert naive[0] == pytest.approx(ours[0], abs=0.03)
        assert naive[2] > ours[2] + 0.05
        assert naive[3] > ours[3] + 0.15
        assert naive == sorted(naive)


class TestObjects:
    @pytest.mark.parametrize("norm", NORMS)
    def test_pgd(self, model: nn.Module, images: tuple[Tensor, Tensor], norm: Any) -> None:
        x, y = images
        attack = PGD(eps=0.1, steps=5, norm=norm, restarts=2, loss="margin")
        expected = pgd(
            model, x, y, eps=0.1, alpha=0.05, steps=5, norm=norm, restarts=2, loss="margin", generator=seeded(4)
        )
        assert torch.equal(attack(model, x, y, generator=seeded(4)), expected)

    def test_every_setting_reaches_pgd(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        x, y = images
        settings: dict[str, Any] = {
            "eps": 0.3,
            "alpha": 0.3,
            "steps": 4,
            "loss": "ce",
            "random_start": False,
            "bounds": (-1.0, 2.0),
            "keep": "last",
        }
        targeted = other_classes(y)
        found = PGD(**settings)(model, x, y, targeted=targeted)
        assert torch.equal(found, pgd(model, x, y, **settings, targeted=targeted))
        others = {"keep": "best", "bounds": (0.0, 1.0), "alpha": 0.1, "steps": 3, "eps": 0.2, "loss": "dlr"}
        for name, value in others.items():
            assert not torch.equal(found, PGD(**(settings | {name: value}))(model, x, y, targeted=targeted)), name

    def test_fgsm(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        x, y = images
        assert torch.equal(FGSM(eps=0.1, loss="ce")(model, x, y), fgsm(model, x, y, eps=0.1, loss="ce"))
        targeted = other_classes(y)
        assert torch.equal(FGSM(eps=0.1)(model, x, y, targeted=targeted), fgsm(model, x, y, eps=0.1, targeted=targeted))

    def test_radius_zero(self, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
        for attack in (PGD(eps=0), FGSM(eps=0)):
            assert torch.equal(attack(model, *images), images[0])

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"eps": -1}, "eps must be 0 or more and finite, got -1"),
            ({"alpha": 0}, "alpha must be above 0 and finite, got 0"),
            ({"steps": -1}, "steps must be 0 or more, got -1"),
            ({"restarts": 0}, "restarts must be 1 or more, got 0"),
            ({"norm": "l1"}, "norm must be one of 'linf', 'l2', got 'l1'"),
            ({"keep": "first"}, "keep must be one of 'best', 'last', got 'first'"),
            ({"loss": "hinge"}, "loss must be one of 'log_odds', 'ce', 'margin', 'dlr' or a callable, got 'hinge'"),
            ({"restarts": 2, "random_start": False}, "restarts must be 1 without a random start"),
            ({"bounds": (1, 0)}, "bounds must be"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            PGD(**({"eps": 0.1} | settings))

    def test_bad_types(self) -> None:
        with pytest.raises(TypeError, match="eps must be"):
            PGD(eps="8/255")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="steps must be an int"):
            PGD(eps=0.1, steps=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_a_training_loss_is_an_attack_loss(name: str) -> None:
    logits, y = torch.randn(7, 5, generator=seeded()), torch.arange(7) % 5
    loss = TrainingLoss(name, 0.0 if name == "ce" else 0.7)
    losses = per_sample(loss)(logits, y)
    assert losses.shape == (7,)
    torch.testing.assert_close(losses.mean(), loss(logits, y).loss)


def test_label_smoothing_belongs_to_the_training_loss() -> None:
    logits, y = torch.randn(7, 5, generator=seeded()), torch.arange(7) % 5
    expected = F.cross_entropy(logits, y, reduction="none", label_smoothing=0.1)
    for loss in (TrainingLoss("ce"), TrainingLoss("uniform", 0.0)):
        torch.testing.assert_close(per_sample(loss, label_smoothing=0.1)(logits, y), expected)
