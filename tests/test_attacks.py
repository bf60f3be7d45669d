"""PGD: optima known in closed form, the ball and the bounds, what it leaves untouched, and bad input."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drsl_kernels import softmax_loss
from drsl_kernels.robustness import pgd
from drsl_kernels.robustness.attacks import NORMS


def cross_entropy_of_torch(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


LOSSES = ["log_odds", "ce", "margin", cross_entropy_of_torch]
UNBOUNDED = (-math.inf, math.inf)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are tiny, and threads that wait for one another make busy machines very slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def linear_classifier(features: int = 12) -> nn.Linear:
    model = nn.Linear(features, 2)
    generator = seeded(1)
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, features, generator=generator))
        model.bias.copy_(torch.randn(2, generator=generator))
    return model


def wrong_direction(model: nn.Linear, y: Tensor) -> Tensor:
    """How the wrong logit minus the label's changes with x, for each sample of two classes."""
    return (model.weight[1 - y] - model.weight[y]).detach()


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    rows = torch.arange(len(y))
    return logits[rows, 1 - y] - logits[rows, y]


class Convolutional(nn.Module):
    """Everything with a mode or a state: batch normalisation, dropout, frozen parts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()
        )
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    generator = seeded(3)
    return torch.rand(9, 1, 4, 4, generator=generator), torch.randint(5, (9,), generator=generator)


@pytest.fixture
def convolutional() -> Convolutional:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Convolutional().eval()


class TestLinearModel:
    """Two classes: the log-odds of the wrong one are linear in x, so the best attack is known."""

    @pytest.mark.parametrize("loss", ["log_odds", "ce", "margin", log_odds])
    @pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
    def test_reaches_the_optimum(self, norm: str, dual: int, loss: object) -> None:
        model = linear_classifier()
        x = torch.randn(20, 12, generator=seeded(2))
        y = torch.arange(20) % 2
        eps = 0.7
        found = pgd(
            model,
            x,
            y,
            eps=eps,
            alpha=0.3,
            steps=60,
            loss=loss,
            norm=norm,
            bounds=UNBOUNDED,
            generator=seeded(),
        )
        best = log_odds(model(x), y) + eps * torch.linalg.vector_norm(wrong_direction(model, y), dual, dim=1)
        torch.testing.assert_close(log_odds(model(found), y), best, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("random_start", [True, False])
    def test_reaches_the_corner_of_ball_and_bounds(self, random_start: bool) -> None:
        model = linear_classifier()
        x = torch.rand(20, 12, generator=seeded(2))
        y = torch.arange(20) % 2
        found = pgd(model, x, y, eps=0.3, alpha=0.1, steps=10, random_start=random_start, generator=seeded())
        best = (x + 0.3 * wrong_direction(model, y).sign()).clamp(0, 1)
        torch.testing.assert_close(found, best, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("sure_by", [0.0, 70.0])
    def test_l2_steps_have_length_alpha(self, sure_by: float) -> None:
        """Where the model is sure, gradients are about 1e-31 and their squares underflow."""
        model = linear_classifier()
        with torch.no_grad():
            model.bias.copy_(torch.tensor([sure_by, 0.0]))
        y = torch.tensor([0])
        found = pgd(
            model,
            torch.zeros(1, 12),
            y,
            eps=9,
            alpha=0.1,
            steps=3,
            loss="ce",
            norm="l2",
            random_start=False,
            bounds=UNBOUNDED,
        )
        direction = wrong_direction(model, y)
        torch.testing.assert_close(found, 0.3 * direction / torch.linalg.vector_norm(direction))

    def test_zero_radius_changes_nothing(self) -> None:
        x = torch.rand(6, 12, generator=seeded(2))
        y = torch.arange(6) % 2
        for norm in NORMS:
            found = pgd(linear_classifier(), x, y, eps=0, alpha=1, steps=3, norm=norm, generator=seeded())
            assert torch.equal(found, x)


@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", NORMS)
def test_stays_inside_ball_and_bounds(
    convolutional: Convolutional, images: tuple[Tensor, Tensor], norm: str, loss: object, steps: int
) -> None:
    x, y = images
    eps = 0.4
    found = pgd(
        convolutional,
        x,
        y,
        eps=eps,
        alpha=0.3,
        steps=steps,
        loss=loss,
        norm=norm,
        restarts=2,
        generator=seeded(),
    )
    change = (found - x).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else torch.linalg.vector_norm(change, dim=1)
    assert size.max() <= eps * (1 + 1e-5)
    assert size.min() > 0
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.shape == x.shape
    assert not found.requires_grad


def test_random_starts_fill_the_ball() -> None:
    """Where the model is constant, every point is as good as the first: a uniform draw from the ball."""
    x = torch.zeros(4000, 3)
    y = torch.zeros(4000, dtype=torch.int64)

    def constant(points: Tensor) -> Tensor:
        return points[:, :2] * 0 + torch.tensor([1.0, 0.0])

    def start(norm: str) -> Tensor:
        return pgd(constant, x, y, eps=2, alpha=1, steps=0, norm=norm, bounds=(-9, 9), generator=seeded())

    box = start("linf")
    assert box.abs().mean().item() == pytest.approx(1, abs=0.03)
    assert box.abs().max().item() > 1.99
    assert box.mean().item() == pytest.approx(0, abs=0.05)
    radii = torch.linalg.vector_norm(start("l2"), dim=1) / 2
    assert (radii**3).mean().item() == pytest.approx(0.5, abs=0.03)  # the cube of the radius is uniform


class TestLeavesTheModelAlone:
    def test_modes_buffers_and_gradients(self, convolutional: Convolutional, images: tuple[Tensor, Tensor]) -> None:
        model = convolutional.train()
        model.body[1].eval()
        model.head.bias.requires_grad_(False)
        model.head.weight.grad = torch.full_like(model.head.weight, 7.0)
        modes = [module.training for module in model.modules()]
        requires_grad = [parameter.requires_grad for parameter in model.parameters()]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        x, y = images
        before = x.clone()

        pgd(model, x, y, eps=0.1, alpha=0.05, steps=3, restarts=2, generator=seeded())

        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == requires_grad
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert torch.equal(model.head.weight.grad, torch.full_like(model.head.weight, 7.0))
        others = [p.grad for p in model.parameters() if p is not model.head.weight]
        assert all(gradient is None for gradient in others)
        assert torch.equal(x, before)
        assert x.grad is None

    def test_modes_after_an_error(self, images: tuple[Tensor, Tensor]) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3, 5))
        with pytest.raises(RuntimeError):
            pgd(model, *images, eps=0.1, alpha=0.05, steps=1)
        assert all(module.training for module in model.modules())

    def test_dropout_is_off_during_the_attack(
        self, convolutional: Convolutional, images: tuple[Tensor, Tensor]
    ) -> None:
        arguments = {"eps": 0.1, "alpha": 0.05, "steps": 3}
        quiet = pgd(convolutional.eval(), *images, **arguments, generator=seeded())
        assert torch.equal(pgd(convolutional.train(), *images, **arguments, generator=seeded()), quiet)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_wherever_it_is_called(
    convolutional: Convolutional, images: tuple[Tensor, Tensor], context: type
) -> None:
    x, y = images
    outside = pgd(convolutional, x, y, eps=0.1, alpha=0.05, steps=3, generator=seeded())
    with context():
        inside = pgd(convolutional, x * 1, y * 1, eps=0.1, alpha=0.05, steps=3, generator=seeded())
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("norm", NORMS)
def test_same_generator_same_result(convolutional: Convolutional, images: tuple[Tensor, Tensor], norm: str) -> None:
    def attack(seed: int) -> Tensor:
        return pgd(
            convolutional,
            *images,
            eps=0.2,
            alpha=0.02,
            steps=3,
            norm=norm,
            restarts=2,
            generator=seeded(seed),
        )

    assert torch.equal(attack(0), attack(0))
    assert not torch.equal(attack(0), attack(1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_sample_does_not_feel_its_batch(
    convolutional: Convolutional, images: tuple[Tensor, Tensor], loss: object, norm: str
) -> None:
    x, y = images
    arguments = {"eps": 0.2, "alpha": 0.05, "steps": 6, "random_start": False, "loss": loss, "norm": norm}
    together = pgd(convolutional, x, y, **arguments)
    apart = [pgd(convolutional, x[i : i + 1], y[i : i + 1], **arguments) for i in range(len(y))]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-5)


def test_float64_stays_float64(convolutional: Convolutional, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    found = pgd(convolutional.double(), x.double(), y, eps=0.1, alpha=0.05, steps=2, generator=seeded())
    assert found.dtype == torch.float64


def test_an_empty_batch(convolutional: Convolutional) -> None:
    x, y = torch.empty(0, 1, 4, 4), torch.empty(0, dtype=torch.int64)
    assert pgd(convolutional, x, y, eps=0.1, alpha=0.05, steps=2, restarts=2).shape == x.shape


class TestKeepsTheBestPoint:
    def test_more_restarts_are_never_worse(self, convolutional: Convolutional, images: tuple[Tensor, Tensor]) -> None:
        x, _ = images
        y = convolutional(x).argmax(1)

        def outcome(restarts: int) -> list[tuple[bool, float]]:
            found = pgd(convolutional, x, y, eps=0.15, alpha=0.05, steps=4, restarts=restarts, generator=seeded())
            loss, stats = softmax_loss(convolutional(found), y, truth="log_odds", reduction="none", return_stats=True)
            return list(zip((~stats.correct).tolist(), loss.tolist(), strict=True))

        one, eight = outcome(1), outcome(8)
        assert all(many >= few for many, few in zip(eight, one, strict=True))
        assert any(many > few for many, few in zip(eight, one, strict=True))

    @pytest.mark.parametrize("steps", [0, 4])
    def test_misclassified_wins_over_a_higher_loss(self, steps: int) -> None:
        def two_sides(points: Tensor) -> Tensor:
            return torch.cat([points, -points], dim=1)

        def sure_of_the_label(logits: Tensor, y: Tensor) -> Tensor:
            return logits.gather(1, y.unsqueeze(1)).squeeze(1)

        x = torch.zeros(30, 1)
        y = torch.zeros(30, dtype=torch.int64)
        found = pgd(
            two_sides,
            x,
            y,
            eps=1,
            alpha=0.5,
            steps=steps,
            loss=sure_of_the_label,
            restarts=40,
            bounds=(-1, 1),
            generator=seeded(),
        )
        assert (found <= 0).all()  # misclassified: every sample visited that side among 40 starts
        assert (found > -0.3).all()  # and of those points, one with a high loss

    def test_a_tie_is_misclassified(self) -> None:
        def against_zero(points: Tensor) -> Tensor:
            return torch.cat([points, torch.zeros_like(points)], dim=1)

        def label_logit(logits: Tensor, y: Tensor) -> Tensor:
            return logits[:, 0]

        arguments = {"eps": 0.5, "alpha": 0.25, "steps": 2, "random_start": False}
        found = pgd(against_zero, torch.zeros(1, 1), torch.tensor([0]), loss=label_logit, **arguments)
        assert found.item() == 0


def test_losses_are_summed(convolutional: Convolutional, images: tuple[Tensor, Tensor]) -> None:
    gradients: list[Tensor] = []

    def watched(logits: Tensor, y: Tensor) -> Tensor:
        losses = cross_entropy_of_torch(logits, y)
        if losses.requires_grad:
            losses.register_hook(gradients.append)
        return losses

    pgd(convolutional, *images, eps=0.1, alpha=0.05, steps=2, loss=watched)
    assert torch.equal(torch.stack(gradients), torch.ones(2, 9))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, classes = datasets.load_digits(return_X_y=True)
    return torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(classes)


@pytest.fixture(scope="module")
def model(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """A small network that knows the digits well."""
    x, y = digits
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


class TestScaleOfLogits:
    """Multiplying all logits by a constant changes no decision. It must not make a model look robust."""

    EPS = 0.1

    def robust_accuracy(self, model: nn.Module, digits: tuple[Tensor, Tensor], scale: float, loss: object) -> float:
        x, y = digits[0][:400], digits[1][:400]
        found = pgd(
            lambda points: scale * model(points),
            x,
            y,
            eps=self.EPS,
            alpha=self.EPS / 4,
            steps=10,
            loss=loss,
            generator=seeded(),
        )
        return (model(found).argmax(1) == y).float().mean().item()

    def test_log_odds_is_not_fooled(self, model: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
        plain = self.robust_accuracy(model, digits, 1, "log_odds")
        assert 0.1 < plain < 0.7
        assert self.robust_accuracy(model, digits, 100, "log_odds") == pytest.approx(plain, abs=0.03)

    def test_margin_takes_the_same_steps(self, model: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
        plain = self.robust_accuracy(model, digits, 1, "margin")
        assert self.robust_accuracy(model, digits, 128, "margin") == plain

    def test_cross_entropy_of_torch_is_fooled(self, model: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
        """Its gradient is exactly 0 where the model is sure: the reason for `log_odds`."""
        plain = self.robust_accuracy(model, digits, 1, cross_entropy_of_torch)
        assert self.robust_accuracy(model, digits, 100, cross_entropy_of_torch) > plain + 0.2
