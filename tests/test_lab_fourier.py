"""The single Fourier attack: directions by definition, sweeps against closed forms and a naive loop.

What commands and pictures make of it is the matter of test_lab_fourier_commands.py.
"""

from __future__ import annotations

import cmath
import json
import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drsl_kernels.robustness import (
    Attack,
    FourierAttack,
    SingleFourier,
    attack_table,
    fourier_direction,
    single_fourier_attack,
    worst_case,
)
from drsl_kernels.robustness.attack_names import AttackParameters, canonical_names, describe, make_attack
from drsl_kernels.robustness.attack_table import run_attack
from drsl_kernels.robustness.data import Split
from drsl_kernels.robustness.masking import never_rises
from drsl_kernels.robustness.models import small_cnn

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(8, 8), (5, 5), (4, 6), (3, 8), (1, 4), (1, 1)]
UNBOUNDED = (-math.inf, math.inf)


def naive_direction(k: int, m: int, height: int, width: int) -> Tensor:
    """From complex numbers, entry by entry: (1 + i) F + (1 - i) conj(F), scaled."""
    wave = torch.empty(height, width, dtype=torch.float64)
    for a, b in product(range(height), range(width)):
        f = cmath.exp(2j * math.pi * (k * a / height + m * b / width))
        value = (1 + 1j) * f + (1 - 1j) * f.conjugate()
        assert abs(value.imag) < 1e-12
        wave[a, b] = value.real
    return wave / wave.abs().max()


class Linear(nn.Module):
    """Two classes with logits (w . x + b, 0): `w` (height, width), the same for all channels."""

    def __init__(self, w: Tensor, b: float = 0.0) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), b

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.w).sum((1, 2, 3)) + self.b
        return torch.stack([score, torch.zeros_like(score)], 1)


class TestDirection:
    @pytest.mark.parametrize("size", SIZES)
    def test_by_definition(self, size: tuple[int, int]) -> None:
        for k, m in product(range(-size[0], size[0] + 1), range(-size[1], size[1] + 1)):
            found = fourier_direction(k, m, *size, dtype=torch.float64)
            torch.testing.assert_close(found, naive_direction(k, m, *size), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("size", SIZES)
    def test_what_they_are(self, size: tuple[int, int]) -> None:
        """Largest entry exactly 1, sum 0 but for the constant, a single frequency, and its mirror image."""
        for k, m in product(range(size[0]), range(size[1])):
            d = fourier_direction(k, m, *size, dtype=torch.float64)
            assert d.abs().max() == 1
            assert d.sum().item() == pytest.approx(d.numel() if k == m == 0 else 0, abs=1e-12)
            spectrum = torch.fft.fft2(d).abs() > 1e-9
            expected = torch.zeros(size, dtype=torch.bool)
            expected[k, m] = expected[-k % size[0], -m % size[1]] = True
            assert torch.equal(spectrum, expected)
            mirrored = d.roll((-1, -1), (0, 1)).flip(0, 1)
            torch.testing.assert_close(fourier_direction(-k, -m, *size, dtype=torch.float64), mirrored)
        assert torch.equal(fourier_direction(0, 0, *size), torch.ones(size))

    def test_equal_frequencies_are_equal_bits(self) -> None:
        d = fourier_direction(3, -2, 28, 20)
        for other in ((31, -2), (3, 18), (-25, -42)):
            assert torch.equal(fourier_direction(*other, 28, 20), d)

    @pytest.mark.parametrize("size", SIZES)
    def test_no_two_perturbations_are_the_same(self, size: tuple[int, int]) -> None:
        waves = torch.stack(
            [s * fourier_direction(k, m, *size) for s, k, m in product((1, -1), range(size[0]), range(size[1]))]
        ).flatten(1)
        distances = torch.cdist(waves, waves) + torch.eye(len(waves))
        assert distances.min() > 0.1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        d = fourier_direction(1, 2, 6, 7, dtype=dtype)
        assert (d.dtype, d.abs().max().item()) == (dtype, 1)

    def test_errors(self) -> None:
        with pytest.raises(TypeError, match=r"l must be an int, got 1\.5"):
            fourier_direction(1.5, 0, 8, 8)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="height and width must be 1 or more, got 0 and 8"):
            fourier_direction(1, 0, 0, 8)
        with pytest.raises(TypeError, match=r"dtype must be a floating one, got torch\.int64"):
            fourier_direction(1, 0, 8, 8, dtype=torch.int64)


def naive_sweep(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """fooled and errors, one perturbation at a time."""
    size = x.shape[2:]
    fooled, errors = (torch.zeros(2, *size, dtype=torch.int64) for _ in range(2))
    with torch.no_grad():
        clean = model(x).argmax(1)
        for sign, k, m in product((1, -1), range(size[0]), range(size[1])):
            shift = (eps * sign * naive_direction(k, m, *size)).to(x.dtype)
            classes = model((x + shift).clamp(0, 1)).argmax(1)
            fooled[(1 - sign) // 2, k, m] = (classes != clean).sum()
            errors[(1 - sign) // 2, k, m] = (classes != y).sum()
    return fooled, errors


class TestSweep:
    def test_against_a_naive_loop(self, split: Split) -> None:
        model = small_cnn(0).double()
        x, y = split.train_x[:40].double(), split.train_y[:40]
        fooled, errors = naive_sweep(model, x, y, 0.2)
        assert 0 < fooled.max() < 40
        for batch_size in (1000, 100, 16):
            found = single_fourier_attack(model, x, y, eps=0.2, batch_size=batch_size)
            assert torch.equal(found.fooled, fooled)
            assert torch.equal(found.errors, errors)
            k, m = found.frequency
            assert found.fooled[(1 - found.sign) // 2, k, m] == fooled.max()
            torch.testing.assert_close(found.fooling_rate(), fooled.amax(0).double() / 40)
            torch.testing.assert_close(found.error_rate(), errors.amax(0).double() / 40)
            shift = 0.2 * found.sign * fourier_direction(k, m, 8, 8, dtype=torch.float64)
            assert torch.equal(found.images, (x + shift).clamp(0, 1))
            with torch.no_grad():
                assert (model(found.images).argmax(1) != model(x).argmax(1)).sum() == fooled.max()

    @pytest.mark.parametrize("size", [(8, 8), (4, 6), (5, 3)])
    def test_a_linear_model_falls_to_its_own_wave(self, size: tuple[int, int]) -> None:
        """With d as the weight, d alone moves the score: all other waves are orthogonal to it, (-l, -m) among them. So
        those fall whose score is nearer to 0 than eps d . d, from below to d upwards, from above to d downwards.
        """
        for k, m in product(range(size[0]), range(size[1])):
            d = fourier_direction(k, m, *size, dtype=torch.float64)
            reach = 0.05 * (d * d).sum().item()
            scores = reach * (torch.arange(-20, 30).double() + 0.5) / 10  # 10 within reach on either side, and no tie
            x = 0.5 + scores.view(-1, 1, 1, 1) * d / (d * d).sum()
            model = Linear(d, -0.5 * d.sum().item())
            found = single_fourier_attack(model, x, (scores < 0).long(), eps=0.05, bounds=UNBOUNDED)
            expected = torch.zeros(2, *size, dtype=torch.int64)
            expected[:, k, m] = 10
            assert torch.equal(found.fooled, expected)
            assert torch.equal(found.errors, expected)
            assert (found.frequency[0] % size[0], found.frequency[1] % size[1], found.sign) == (k, m, 1)

    def test_frequency_zero_is_a_constant_shift(self) -> None:
        """A model that looks at the mean, over three channels, falls to it and to nothing else."""
        model = Linear(torch.ones(4, 4).double() / 16, -0.5)
        means = 0.5 + (torch.arange(-20, 30).double() + 0.5) / 100
        x = (means / 3).view(-1, 1, 1, 1).repeat(1, 3, 4, 4)
        found = single_fourier_attack(model, x, (means < 0.5).long(), eps=0.1 / 3)
        expected = torch.zeros(2, 4, 4, dtype=torch.int64)
        expected[:, 0, 0] = 10
        assert torch.equal(found.fooled, expected)
        assert (found.frequency, found.sign) == ((0, 0), 1)
        torch.testing.assert_close(found.images, x + 0.1 / 3)

    def test_what_the_model_sees(self) -> None:
        """Each image once as it is, then under 2 HW perturbations of length eps, at most batch_size at a time."""
        seen: list[Tensor] = []

        def model(points: Tensor) -> Tensor:
            seen.append(points)
            return torch.stack([points.flatten(1).sum(1), torch.zeros(len(points))], 1)

        x, calls = torch.full((10, 2, 3, 4), 0.5), []
        single_fourier_attack(
            model,
            x,
            torch.zeros(10, dtype=torch.int64),
            eps=0.25,
            batch_size=25,
            on_progress=lambda *c: calls.append(c),
        )
        assert [len(points) for points in seen] == [10] + [20] * 12
        changes = torch.cat(seen[1:]) - 0.5
        assert torch.equal(changes.flatten(1).abs().amax(1), torch.full((240,), 0.25))
        assert torch.equal(changes[:, 0], changes[:, 1])  # the same on all channels
        assert len(changes[::10].flatten(1).unique(dim=0)) == 24
        assert torch.equal(changes.view(24, 10, -1), changes.view(24, 10, -1)[:, :1].expand(-1, 10, -1))
        assert calls == [(20 * k, 240) for k in range(1, 13)]

    def test_clipped_to_the_bounds(self, split: Split) -> None:
        found = single_fourier_attack(small_cnn(0), split.train_x, split.train_y, eps=0.3, bounds=(0.0, 1.0))
        assert (found.images.min(), found.images.max()) == (0, 1)
        assert (found.images - split.train_x).abs().max() <= 0.3 + 1e-6

    def test_ties(self) -> None:
        """Of what fools as many, what misclassifies more; then the first, upwards before downwards."""

        def model(points: Tensor) -> Tensor:
            """Class 1 where the first pixel has changed at all, class 2 where the second has fallen."""
            changed = (points[:, 0, 0, 0] != 0.5).float()
            fallen = 3 * (points[:, 0, 0, 1] < 0.5).float()
            return torch.stack([torch.full_like(changed, 0.5), changed, fallen], 1)

        x = torch.full((4, 1, 1, 2), 0.5)
        found = single_fourier_attack(model, x, torch.ones(4, dtype=torch.int64), eps=0.1)
        assert found.fooled.tolist() == [[[4, 4]], [[4, 4]]]
        assert found.errors.tolist() == [[[0, 4]], [[4, 0]]]
        assert (found.frequency, found.sign) == ((0, -1), 1)
        found = single_fourier_attack(model, x, torch.zeros(4, dtype=torch.int64), eps=0.1)
        assert (found.frequency, found.sign) == ((0, 0), 1)

    def test_leaves_everything_as_it_was(self, split: Split) -> None:
        model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), small_cnn(0)).train()
        model[1].eval()
        x = split.train_x.clone().requires_grad_()
        with torch.inference_mode():
            inside = single_fourier_attack(model, split.train_x, split.train_y, eps=0.1)
        found = single_fourier_attack(model, x, split.train_y, eps=0.1)
        assert torch.equal(found.fooled, inside.fooled)
        assert not found.images.requires_grad
        assert x.grad is None
        assert torch.equal(x, split.train_x)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert [module.training for module in model] == [True, False, True]
        assert model[0].num_batches_tracked == 0

    def test_eps_0(self, split: Split) -> None:
        model = small_cnn(0)
        found = single_fourier_attack(model, split.train_x, split.train_y, eps=0.0)
        assert not found.fooled.any()
        assert found.errors.unique().tolist() == [(model(split.train_x).argmax(1) != split.train_y).sum()]
        assert torch.equal(found.images, split.train_x)

    def test_errors(self, split: Split) -> None:
        x, y = split.train_x, split.train_y
        good: dict[str, Any] = {"model": small_cnn(0), "x": x, "y": y, "eps": 0.1}
        for change, message in (
            ({"eps": -1}, "eps must be 0 or more and finite, got -1"),
            ({"eps": math.nan}, "eps must be 0 or more and finite, got nan"),
            ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
            ({"x": x.flatten(1)}, r"x must have shape \(N, channels, height, width\) .*, got \(70, 64\)"),
            ({"x": x[:0], "y": y[:0]}, r"x must have shape .* with one image or more, got \(0, 1, 8, 8\)"),
            ({"x": x + 2}, r"x must lie within bounds=\(0\.0, 1\.0\)"),
            ({"y": y[:9]}, r"y must have shape \(N,\) = \(70,\), got \(9,\)"),
        ):
            with pytest.raises(ValueError, match=message):
                single_fourier_attack(**(good | change))
        with pytest.raises(TypeError, match="eps must be a number, got '1'"):
            single_fourier_attack(**(good | {"eps": "1"}))
        with pytest.raises(IndexError, match="y holds label 99"):
            single_fourier_attack(**(good | {"y": y + 90 + (y - 9)}))
        with pytest.raises(FloatingPointError, match="the model's logits are NaN; look at its weights"):
            single_fourier_attack(**(good | {"model": lambda points: points.flatten(1) * math.nan}))


class TestBesideOtherAttacks:
    def test_one_wave_for_all_images_in_all_batches(self, split: Split) -> None:
        """The images are halves that fall to different waves: together they fall to one, in any batches."""

        class Two(nn.Module):
            """The second channel says which wave the image is weak to."""

            def forward(self, x: Tensor) -> Tensor:
                first = (x[:, :1] * fourier_direction(1, 0, 8, 8)).sum((1, 2, 3))
                second = (x[:, :1] * fourier_direction(0, 2, 8, 8)).sum((1, 2, 3))
                score = torch.where(x[:, 1].mean((1, 2)) > 0.5, first, second) + 1.0
                return torch.stack([score, torch.zeros_like(score)], 1)

        x = torch.full((30, 2, 8, 8), 0.5)
        x[:12, 1], x[12:, 1] = 0.9, 0.1
        y = torch.zeros(30, dtype=torch.int64)
        for batch_size in (7, 256):
            outcome = run_attack(Two(), x, y, FourierAttack(), 0.1, batch_size=batch_size)
            assert outcome.robust.tolist() == [True] * 12 + [False] * 18
            assert outcome.found is not None
            assert (outcome.found["frequency"], outcome.found["sign"]) == ([0, 2], -1)
            assert (outcome.found["samples"], outcome.found["fooled"][0][2]) == (30, 18)
            assert outcome.found["fooled"][1][0] == 12
        # A cascade chooses anew, on those that stand.
        attack = FourierAttack()
        assert worst_case(Two(), x, y, epsilons=[0.05, 0.1], attacks=[attack], batch_size=7).robust_accuracy() == (
            0.4,
            0.0,
        )

    def test_only_those_that_stand(self, split: Split) -> None:
        model, x, y = small_cnn(0), split.train_x, split.train_y
        correct = int((model(x).argmax(1) == y).sum())
        table = attack_table(model, x, y, epsilons=[0.1, 0.2], attacks=[FourierAttack(), Attack(steps=2, restarts=1)])
        for eps in (0.1, 0.2):
            outcome = table.of("fourier", eps)
            assert outcome.black_box
            assert outcome.found is not None
            assert outcome.found["samples"] == correct
            fooled = max(map(max, outcome.found["fooled"]))
            assert int(outcome.robust.sum()) == correct - fooled
            assert table.of("pgd:log_odds", eps).found is None
        assert run_attack(model, x, (y + 1) % 10, FourierAttack(), 0.0).found is None

    def test_as_objects(self, split: Split) -> None:
        model, x, y = small_cnn(0), split.train_x, split.train_y
        expected = single_fourier_attack(model, x, y, eps=0.2).images
        assert torch.equal(SingleFourier(eps=0.2)(model, x, y), expected)
        found = FourierAttack().start(model, x, y, eps=0.2, bounds=(0.0, 1.0), generator=None)
        assert torch.equal(found, expected)
        settled = FourierAttack().settle(model, x, y, eps=0.2, bounds=(0.0, 1.0), batch_size=10)
        assert torch.equal(settled.start(model, x, y, eps=0.2, bounds=(0.0, 1.0), generator=None), expected)
        assert (settled.name, settled.norm, settled.restarts, settled.black_box) == ("fourier", "linf", 1, True)
        json.dumps(settled.found())
        for arguments, message in (
            ({"eps": -1}, "eps must be 0"),
            ({"eps": 1, "batch_size": 0}, "batch_size must be 1"),
        ):
            with pytest.raises(ValueError, match=message):
                SingleFourier(**arguments)

    def test_by_name(self) -> None:
        assert canonical_names(["fourier", "pgd", "fourier"]) == ("fourier", "pgd:log_odds")
        attack = make_attack("fourier", AttackParameters(), training_loss=nn.functional.cross_entropy)
        assert attack == FourierAttack()
        assert json.loads(json.dumps(describe(attack)))["kind"] == "FourierAttack"
        with pytest.raises(ValueError, match="attack 'fourier' has a loss of its own, got 'fourier:ce'"):
            canonical_names(["fourier:ce"])
        with pytest.raises(ValueError, match="fourier is an attack in the norm 'linf', got 'l2'"):
            make_attack("fourier", AttackParameters("l2"), training_loss=nn.functional.cross_entropy)

    def test_a_wave_may_honestly_overshoot(self) -> None:
        """Within 0.5 of a score of 1, the wave goes past it: no reason for a warning."""

        class Near(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                mean = (x - 0.5).abs().mean((1, 2, 3))
                return torch.stack([(mean - 0.1).abs(), torch.full_like(mean, 0.05)], 1)

        x, y = torch.full((6, 1, 1, 1), 0.5), torch.zeros(6, dtype=torch.int64)
        table = attack_table(Near(), x, y, epsilons=[0.1, 0.3], attacks=[FourierAttack()])
        assert [table.of("fourier", eps).accuracy() for eps in (0.1, 0.3)] == [0, 1]
        assert never_rises(table).outcome == "passed"
