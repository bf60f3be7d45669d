"""Absum and L1: the penalties by definition, and their steps by the optimality of a proximal operator."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from cases import seeded
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from drsl_kernels import L1, Absum, absum_penalty, absum_step, l1_penalty, l1_step

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
PENALTIES = [absum_penalty, l1_penalty]
STEPS = [absum_step, l1_step]

# Every layout of weights: what comes first, groups, dilation, kernels of one entry, from 1 to 3 dimensions.
CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(3, 4, 5),
    "2d": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "2d, oblong and dilated": lambda: nn.Conv2d(3, 4, (3, 2), dilation=2),
    "2d, groups": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "2d, depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "2d, 1x1": lambda: nn.Conv2d(3, 4, 1),
    "3d": lambda: nn.Conv3d(2, 3, 2),
    "1d transposed": lambda: nn.ConvTranspose1d(3, 4, 5),
    "2d transposed, groups": lambda: nn.ConvTranspose2d(6, 4, 3, groups=2),
    "3d transposed": lambda: nn.ConvTranspose3d(2, 3, 2),
}


def convolution(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(3)
    return CONVOLUTIONS[name]().to(dtype)


def network() -> nn.Sequential:
    """Convolutions of several kinds, and layers that are left alone; channels last, as the lab's models are."""
    torch.manual_seed(4)
    head = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), head)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def dense_pairs(layer: Any) -> dict[tuple[int, int], Tensor]:
    """The kernel between each output and input channel, from what the layer answers to single values; 0 entries where
    a layer does not connect them are left out. Nothing of the layout of weights is used.
    """
    dims, size = layer.weight.dim() - 2, 11
    middle = (size // 2,) * dims
    pairs = {}
    for channel in range(layer.in_channels):
        x = torch.zeros(1, layer.in_channels, *[size] * dims, dtype=layer.weight.dtype)
        x[(0, channel, *middle)] = 1
        y = type(layer).forward(layer, x)[0] - (0 if layer.bias is None else layer.bias.view(-1, *[1] * dims))
        for out in range(layer.out_channels):
            pairs[out, channel] = y[out]
    return pairs


class TestPenalty:
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_by_definition(self, name: str) -> None:
        """A stride would skip entries: it has no part in the weight, and is taken out."""
        layer = convolution(name)
        layer.stride, layer.padding = (1,) * len(layer.stride), (0,) * len(layer.stride)
        kernels = dense_pairs(layer).values()
        assert absum_penalty(layer).item() == pytest.approx(sum(kernel.sum().abs().item() for kernel in kernels))
        assert l1_penalty(layer).item() == pytest.approx(sum(kernel.abs().sum().item() for kernel in kernels))

    def test_of_an_input_of_ones(self) -> None:
        """What a convolution answers, far from the border, to a constant input of one channel."""
        layer = nn.Conv2d(3, 4, 3, bias=False).double()
        answers = [layer(torch.eye(3).double()[i].view(1, 3, 1, 1).expand(1, 3, 3, 3)) for i in range(3)]
        assert absum_penalty(layer).item() == pytest.approx(torch.cat(answers).abs().sum().item())

    def test_1x1_is_l1(self) -> None:
        layer = convolution("2d, 1x1")
        torch.testing.assert_close(absum_penalty(layer), l1_penalty(layer))

    def test_never_above_l1(self) -> None:
        for name in CONVOLUTIONS:
            layer = convolution(name)
            assert absum_penalty(layer) <= l1_penalty(layer)
            with torch.no_grad():
                layer.weight.abs_()
            torch.testing.assert_close(absum_penalty(layer), l1_penalty(layer))

    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_of_models(self, penalty: Any) -> None:
        model = network()
        parts = [penalty(model[0]), penalty(model[2])]
        torch.testing.assert_close(penalty(model), parts[0] + parts[1])
        torch.testing.assert_close(penalty([model[0], model[2], model[3]]), penalty(model))
        torch.testing.assert_close(penalty(iter([model, model[0]])), penalty(model))  # each once

    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_a_shared_weight_counts_once(self, penalty: Any) -> None:
        first, second = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, dilation=2)
        second.weight = first.weight
        torch.testing.assert_close(penalty([first, second]), penalty(first))

    @pytest.mark.parametrize("penalty", PENALTIES)
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_gradients(self, penalty: Any, name: str) -> None:
        layer = convolution(name)

        def of(weight: Tensor) -> Tensor:
            layer.__dict__["weight"] = weight
            return penalty(layer)  # type: ignore[no-any-return]

        weight = layer.weight.detach().clone().requires_grad_()
        del layer._parameters["weight"]
        assert torch.autograd.gradcheck(of, weight)
        assert torch.autograd.gradgradcheck(of, weight)

    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_gradient_where_it_has_none(self, penalty: Any) -> None:
        layer = nn.Conv2d(2, 2, 3)
        nn.init.zeros_(layer.weight)
        (gradient,) = torch.autograd.grad(penalty(layer), layer.weight)
        assert not gradient.any()

    @pytest.mark.parametrize("penalty", PENALTIES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, penalty: Any, dtype: torch.dtype) -> None:
        layer = convolution("2d, groups", dtype)
        found = penalty(layer)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        assert found.item() == pytest.approx(penalty(layer.double()).item(), rel=1e-6)

    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_sums_do_not_overflow(self, penalty: Any) -> None:
        layer = nn.Conv2d(2, 2, 3).half()
        nn.init.constant_(layer.weight, 6e4)
        assert penalty(layer).item() == pytest.approx(36 * 6e4, rel=1e-3)

    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_of_a_computed_weight(self, penalty: Any) -> None:
        layer = parametrizations.weight_norm(nn.Conv2d(2, 2, 3))
        (gradient,) = torch.autograd.grad(penalty(layer), layer.parametrizations.weight.original0)
        assert gradient.any()

    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_compiled(self, penalty: Any) -> None:
        model = network()
        compiled = torch.compile(lambda: penalty(model), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), penalty(model))


def prox_objective(x: Tensor, k: Tensor, t: float, step: Any) -> Tensor:
    penalty = x.sum().abs() if step is absum_step else x.abs().sum()
    return t * penalty + 0.5 * (x - k).square().sum()


def stepped(k: Tensor, t: float, step: Any) -> Tensor:
    """One kernel after its step."""
    layer = nn.Conv2d(1, 1, k.shape, bias=False).to(k.dtype)
    with torch.no_grad():
        layer.weight[0, 0] = k
    step(layer, t)
    return layer.weight.detach()[0, 0]


class TestStep:
    def test_the_three_cases_by_hand(self) -> None:
        k = torch.tensor([[1.0, -2.0], [4.0, 3.0]]).double()  # of sum 6 and n = 4
        torch.testing.assert_close(stepped(k, 1.0, absum_step), k - 1)
        torch.testing.assert_close(stepped(-k, 1.0, absum_step), 1 - k)
        torch.testing.assert_close(stepped(k, 1.5, absum_step), k - 1.5)
        torch.testing.assert_close(stepped(k, 9.0, absum_step), k - 1.5)
        torch.testing.assert_close(stepped(k, 2.5, l1_step), torch.tensor([[0.0, 0.0], [1.5, 0.5]]).double())
        torch.testing.assert_close(stepped(k, 0.5, l1_step), torch.tensor([[0.5, -1.5], [3.5, 2.5]]).double())

    @pytest.mark.parametrize("step", STEPS)
    def test_no_point_is_better(self, step: Any) -> None:
        """Against a minimisation that knows nothing of the formula, and against random points around the answer."""
        for seed, t in product(range(4), (0.01, 0.1, 1.0, 3.0)):
            k = torch.randn(3, 2, generator=seeded(seed)).double()
            found = stepped(k, t, step)
            best = prox_objective(found, k, t, step)
            for scale in (1.0, 1e-2, 1e-4):
                around = found + scale * torch.randn(200, 3, 2, generator=seeded(seed + 9)).double()
                assert all(prox_objective(x, k, t, step) >= best for x in around)
            gap = prox_objective(minimised(k, t, step), k, t, step) - best
            assert 0 <= gap < 1e-6  # the objective is strongly convex: their distance is below sqrt(2 gap)

    @pytest.mark.parametrize("step", STEPS)
    def test_the_conditions_of_optimality(self, step: Any) -> None:
        """0 is in t times the subdifferential of the penalty plus X - K: with s = (K - X) / t that is |s| <= 1, and
        s = sign where there is one; for Absum s is the same for all entries.
        """
        for seed, t in product(range(30), (0.01, 0.3, 2.0)):
            k = torch.randn(2, 3, generator=seeded(seed)).double()
            found = stepped(k, t, step)
            s, decides = (k - found) / t, found.sum() if step is absum_step else found
            assert s.abs().max() <= 1 + 1e-12
            decided = (decides.abs() > 1e-12).expand_as(s)
            torch.testing.assert_close(s[decided], decides.sign().expand_as(s)[decided])
            if step is absum_step:
                torch.testing.assert_close(s, s.mean().expand_as(s))

    @pytest.mark.parametrize("step", STEPS)
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_every_kernel_of_every_layout(self, step: Any, name: str) -> None:
        layer = convolution(name)
        before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
        step(layer, 0.05)
        for pair in product(*map(range, before.shape[:2])):
            kernel = before[pair]
            square = kernel.flatten().unsqueeze(0)
            torch.testing.assert_close(layer.weight.detach()[pair], stepped(square, 0.05, step).view_as(kernel))
        assert torch.equal(layer.bias, bias)

    @pytest.mark.parametrize("step", STEPS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, step: Any, dtype: torch.dtype) -> None:
        layer = convolution("2d", dtype)
        exact = nn.Conv2d(3, 4, 3).double()
        exact.load_state_dict(layer.state_dict())
        step(layer, 0.03)
        step(exact, 0.03)
        assert layer.weight.dtype == dtype
        torch.testing.assert_close(layer.weight.double(), exact.weight, rtol=0, atol=2 * torch.finfo(dtype).eps)

    def test_fixed_points(self) -> None:
        """A kernel that sums to 0 exactly, and weights of 0, stay bit for bit."""
        balanced = torch.tensor([[0.25, -0.5], [1.0, -0.75]])
        for dtype in DTYPES:
            assert torch.equal(stepped(balanced.to(dtype), 0.1, absum_step), balanced.to(dtype))
            assert not stepped(torch.zeros(2, 2, dtype=dtype), 0.1, l1_step).any()

    @pytest.mark.parametrize("step", STEPS)
    def test_it_gets_to_the_fixed_point_and_stays(self, step: Any) -> None:
        model = network().double()
        penalty = PENALTIES[STEPS.index(step)]
        before = penalty(model).item()
        step(model, 1e-3)
        assert penalty(model) < before
        step(model, 10.0)
        assert penalty(model).item() == pytest.approx(0, abs=1e-14)
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        step(model, 10.0)
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(parameter.detach(), weight, rtol=0, atol=1e-15)

    @pytest.mark.parametrize("step", STEPS)
    def test_what_it_leaves_alone(self, step: Any) -> None:
        model = network()
        model[2][0].weight.requires_grad_(False)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        pointers = [parameter.data_ptr() for parameter in model.parameters()]
        step(model, 0.05)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {"0.weight"}
        assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
        assert model[0].weight.requires_grad
        assert model[0].weight.grad_fn is None
        step(model, 0.0)

    @pytest.mark.parametrize("step", STEPS)
    def test_compiled(self, step: Any) -> None:
        one, two = network(), network()
        torch.compile(lambda: step(one, 0.05), fullgraph=True, backend="aot_eager")()
        step(two, 0.05)
        assert all(torch.equal(*pair) for pair in zip(one.parameters(), two.parameters(), strict=True))

    @pytest.mark.parametrize("kind", [Absum, L1])
    def test_gradient_descent_on_the_penalty_agrees(self, kind: Any) -> None:
        """Where no entry and no sum is near 0, a step of plain gradient descent on the penalty is the proximal step."""
        one, two = (nn.Conv2d(2, 3, 3).double() for _ in range(2))
        with torch.no_grad():
            for layer in (one, two):
                layer.weight.copy_(torch.randn(3, 2, 3, 3, generator=seeded()))
                layer.weight.add_(layer.weight.sign())
        assert one.weight.sum((2, 3)).abs().min() > 0.1
        kind(one, 0.5).penalty().backward()
        torch.optim.SGD(one.parameters(), lr=1e-3).step()
        kind(two, 0.5).step(1e-3)
        torch.testing.assert_close(one.weight, two.weight, rtol=0, atol=1e-14)


def minimised(k: Tensor, t: float, step: Any) -> Tensor:
    """The minimum of the objective, by descent on smooth versions of the penalty that come ever closer to it."""
    x = k.clone().requires_grad_()
    for smooth in (1e-1, 1e-3, 1e-5, 1e-8):

        def objective(smooth: float = smooth) -> Tensor:
            size = (
                (x.sum().square() + smooth**2).sqrt() if step is absum_step else (x.square() + smooth**2).sqrt().sum()
            )
            return t * size + 0.5 * (x - k).square().sum()

        optimizer = torch.optim.LBFGS([x], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

        def closure(optimizer: torch.optim.LBFGS = optimizer, objective: Any = objective) -> Tensor:
            optimizer.zero_grad()
            value: Tensor = objective()
            value.backward()
            return value

        optimizer.step(closure)  # type: ignore[arg-type]
    return x.detach()


class TestClasses:
    @pytest.mark.parametrize(
        ("kind", "penalty", "step"), [(Absum, absum_penalty, absum_step), (L1, l1_penalty, l1_step)]
    )
    def test_penalty_and_step(self, kind: Any, penalty: Any, step: Any) -> None:
        one, two = network(), network()
        regularizer = kind(one, 0.3)
        torch.testing.assert_close(regularizer.penalty(), 0.3 * penalty(two))
        regularizer.step(0.1)
        step(two, 0.1 * 0.3)
        assert all(torch.equal(*pair) for pair in zip(one.parameters(), two.parameters(), strict=True))
        assert repr(regularizer) == f"{kind.__name__}(2 convolutions, strength=0.3)"

    def test_follows_the_model(self) -> None:
        """To another dtype, as it would to another device, and to parameters that are replaced."""
        model = network()
        absum = Absum(model, 1.0)
        model.double()
        model[0].weight = nn.Parameter(torch.ones(4, 1, 3, 3).double())
        absum.step(1e3)
        assert model[0].weight.abs().max() < 1e-12

    def test_in_a_loop_with_an_optimizer(self) -> None:
        """Training with the steps brings sums to 0 that training alone does not."""
        sums = []
        for strength in (0.0, 1.0):
            model, absum = network(), None
            absum = Absum(model, strength)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            x, y = torch.randn(16, 1, 5, 5, generator=seeded()), torch.arange(16) % 2
            for _ in range(30):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                absum.step(1e-2)
            sums.append(absum_penalty(model).item())
        assert sums[1] < 1e-5 < sums[0]


class TestErrors:
    @pytest.mark.parametrize(
        "call", [absum_penalty, l1_penalty, *(lambda m, s=s: s(m, 0.1) for s in STEPS), lambda m: Absum(m, 1)]
    )
    def test_models(self, call: Any) -> None:
        with pytest.raises(ValueError, match=r"model must have a convolution, of nn\.Conv1d .*, got Linear"):
            call(nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"model must have a convolution, .* got no module"):
            call([])
        with pytest.raises(TypeError, match="model must be a module or several, got int"):
            absum_penalty(3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="model must be a module or several, got Tensor among them"):
            call([nn.Conv2d(1, 1, 1), torch.ones(2)])

    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_weights(self, penalty: Any) -> None:
        with pytest.raises(ValueError, match=r"model must be initialized, by a first batch, got LazyConv2d\(0, 2"):
            penalty(nn.LazyConv2d(2, 3))
        with pytest.raises(TypeError, match=r"must be of a floating dtype, got torch\.complex64 in Conv2d"):
            penalty(nn.Conv2d(1, 1, 3, dtype=torch.complex64))

    @pytest.mark.parametrize("step", STEPS)
    def test_a_computed_weight_has_no_step(self, step: Any) -> None:
        layer = parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
        with pytest.raises(ValueError, match=r"must be parameters, got one of shape \(3, 2, 3, 3\) that is computed"):
            step(layer, 0.1)
        with torch.no_grad(), pytest.raises(ValueError, match="must be parameters"):
            step(layer, 0.1)

    @pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
    def test_numbers(self, value: float) -> None:
        layer = nn.Conv2d(1, 1, 3)
        for name, call in {
            "t": lambda: absum_step(layer, value),
            "strength": lambda: L1(layer, value),
            "lr": lambda: Absum(layer, 1.0).step(value),
        }.items():
            with pytest.raises(ValueError, match=f"{name} must be 0 or more and finite, got {value}"):
                call()
        with pytest.raises(TypeError, match="t must be a number, got '1'"):
            l1_step(layer, "1")  # type: ignore[arg-type]
