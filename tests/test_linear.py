"""The fused linear loss is the loss of a linear layer's logits, in value and in every gradient, in a chunk's memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import drsl_kernels
from drsl_kernels import (
    FusedLinearDRSLLoss,
    fused_linear_drsl_loss,
    fused_linear_softmax_loss,
    linear_chunks,
    softmax_loss,
)
from drsl_kernels.linear_chunks import Layer, chunk_rows
from drsl_kernels.spec import DISTANCES

ROWS, WIDTH, CLASSES = 23, 12, 350
FEW = 5 * CLASSES * 8  # bytes: five rows of float64 at a time


def _tensors(dtype: torch.dtype = torch.float64, rows: int = ROWS, classes: int = CLASSES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    shapes = {"hidden": (rows, WIDTH), "weight": (classes, WIDTH), "bias": (classes,)}
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: (x * 0.5).to(dtype) for name, x in found.items()}


def _labels(rows: int = ROWS, classes: int = CLASSES) -> Tensor:
    y = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
    y[3] = -100
    return y


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0, cap: float | None = None
) -> Tensor:
    z = F.linear(hidden, weight, bias) * scale
    return z if cap is None else cap * torch.tanh(z / cap)


def _gradients(
    loss_of: Callable[..., Tensor], tensors: dict[str, Tensor], upstream: Tensor | float = 1.7
) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    loss = loss_of(**leaves)
    weights = torch.as_tensor(upstream, dtype=loss.dtype).expand(loss.shape)
    found = torch.autograd.grad(loss, list(leaves.values()), weights, materialize_grads=True, allow_unused=True)
    return loss.detach(), dict(zip(leaves, found, strict=True))


def _assert_same(ours: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours[0], expected[0], rtol=tolerance, atol=tolerance)
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().clamp(min=1e-3).item()
        torch.testing.assert_close(ours[1][name], gradient, rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("distance", [*DISTANCES, None])
def test_gradients_are_those_of_whole_logits(distance: Any, reduction: Any, backend: Any) -> None:
    y = _labels()
    tensors = _tensors() | {"tau": torch.tensor(0.4, dtype=torch.float64)}
    upstream = torch.rand(ROWS, dtype=torch.float64) if reduction == "none" else 1.7
    options: dict[str, Any] = {"distance": distance, "reduction": reduction}

    def naive(hidden: Tensor, weight: Tensor, bias: Tensor, tau: Tensor) -> Tensor:
        return softmax_loss(_logits(hidden, weight, bias, 0.7, 5.0), y, tau=tau, backend="reference", **options)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor, tau: Tensor) -> Tensor:
        return fused_linear_softmax_loss(
            hidden, weight, y, bias=bias, tau=tau, softcap=5.0, logit_scale=0.7, memory_budget=FEW, backend=backend,
            **options,
        )  # fmt: skip

    _assert_same(_gradients(ours, tensors, upstream), _gradients(naive, tensors, upstream))


@pytest.mark.parametrize(
    "member",
    [
        {"truth": "gce", "threshold": 0.1},
        {"truth": "mae", "distance": "uniform", "tau": 0.3},
        {"truth": "log_odds"},
        {"label_smoothing": 0.1, "distance": "kl", "tau": 0.2, "class_weight": torch.linspace(0.1, 2, CLASSES)},
        {"scale": 1.5, "margin": 0.3, "activation": "sigsoftmax", "distance": "conditional", "tau": 0.2},
        {"margin": torch.linspace(0, 1, CLASSES)},
        {"distance": "non_target_logits", "tau": torch.linspace(0, 1, ROWS)},
        {"ignore_index": 7},
    ],
    ids=lambda member: "-".join(member),
)
@pytest.mark.parametrize("bias", [True, False])
def test_every_member_of_the_family(member: dict[str, Any], bias: bool) -> None:
    y = _labels()
    y[3] = 7
    tensors = _tensors()
    if not bias:
        del tensors["bias"]
    of_logits = dict(member)
    of_logits["weight"] = of_logits.pop("class_weight", None)

    def naive(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return softmax_loss(_logits(hidden, weight, bias), y, backend="reference", **of_logits)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return fused_linear_softmax_loss(hidden, weight, y, bias=bias, memory_budget=FEW, **member)

    _assert_same(_gradients(ours, tensors), _gradients(naive, tensors))


@pytest.mark.parametrize("budget", [1, 3 * CLASSES * 8, FEW, None])
def test_the_size_of_a_chunk_changes_nothing(budget: int | None) -> None:
    y, tensors = _labels(), _tensors()
    whole = _gradients(lambda **t: fused_linear_drsl_loss(**t, y=y, tau=0.3), tensors)
    _assert_same(
        _gradients(lambda **t: fused_linear_drsl_loss(**t, y=y, tau=0.3, memory_budget=budget), tensors), whole
    )


def test_chunks_fit_the_budget_and_are_even(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(count: int, budget: int | None, softcap: float | None = None, dtype: torch.dtype = torch.float32) -> int:
        hidden = torch.empty(count, 4, dtype=dtype)
        return chunk_rows(Layer(hidden, torch.empty(1000, 4, dtype=dtype), None, 1.0, softcap), budget, True)

    assert rows(10_000, 4000 * 64) == 64
    assert rows(10_000, 4000 * 64, softcap=30.0) == 32
    assert rows(10_000, 4000 * 64, dtype=torch.bfloat16) == 128
    assert rows(10_000, 1) == 1
    assert rows(130, 4000 * 100) == 80, "two chunks of 80 and 50 rows, and not of 100 and 30"
    monkeypatch.setattr(linear_chunks, "CPU_BUDGET", 1)
    assert rows(1000, None) == 176, "five chunks of 176 and one of 120"
    assert rows(5, None) == 16, "never more than the budget, but in steps of sixteen"
    assert rows(0, None) >= 1


def test_no_features_and_no_memory() -> None:
    """Logits that are the bias alone, and tensors that have shapes and nothing else."""
    y, bias = torch.tensor([[0, 1]]), torch.randn(3)
    expected = softmax_loss(bias.expand(2, 3), y.flatten(), distance="uniform", tau=0.3)
    found = fused_linear_drsl_loss(torch.empty(1, 2, 0), torch.empty(3, 0), y, 0.3, bias=bias)
    torch.testing.assert_close(found, expected)
    hidden, weight = (torch.empty(n, 4, device="meta", requires_grad=True) for n in (5, 3))
    loss = fused_linear_drsl_loss(hidden, weight, torch.empty(5, device="meta", dtype=torch.int64), 0.3)
    loss.backward()
    assert (loss.shape, weight.grad.shape) == ((), (3, 4))  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_whole_logits(dtype: torch.dtype) -> None:
    y = _labels()
    tensors = _tensors(dtype)
    scale = 1.0 if dtype == torch.bfloat16 else 1024.0  # the loss scale without which float16 cannot train

    def naive(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return softmax_loss(_logits(hidden, weight, bias), y, distance="uniform", tau=0.3, backend="reference")

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_linear_drsl_loss(hidden, weight, y, 0.3, bias=bias, memory_budget=FEW)

    exact = _gradients(naive, {name: x.double() for name, x in tensors.items()}, scale)
    plain, fused = _gradients(naive, tensors, scale), _gradients(ours, tensors, scale)
    assert fused[0].dtype == torch.float32
    for name, truth in exact[1].items():
        assert fused[1][name].dtype == dtype
        error = (fused[1][name].double() - truth).norm()
        assert error <= 1.1 * (plain[1][name].double() - truth).norm(), name


def test_float16_gradients_below_its_range_survive_until_they_are_scaled() -> None:
    tensors = _tensors(torch.float16, rows=3)
    tensors["weight"] *= 1e-3

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_linear_drsl_loss(hidden, weight, torch.tensor([1, 2, 3]), 0.0) * 1e-3

    _, found = _gradients(ours, tensors, 2.0**16)
    assert (found["hidden"] != 0).double().mean() > 0.9


def test_a_frozen_weight_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(linear_chunks, "_add_product")
    tensors = _tensors()
    hidden = tensors["hidden"].requires_grad_()
    fused_linear_drsl_loss(hidden, tensors["weight"], _labels(), 0.3).backward()
    assert hidden.grad is not None


def test_a_tied_embedding_gets_both_gradients() -> None:
    y, weight = _labels(8), _tensors()["weight"]
    y[3] = 0
    tokens = torch.arange(8)

    def naive(weight: Tensor) -> Tensor:
        return softmax_loss(_logits(F.embedding(tokens, weight), weight, None), y, distance="uniform", tau=0.3)

    def ours(weight: Tensor) -> Tensor:
        return fused_linear_drsl_loss(F.embedding(tokens, weight), weight, y, 0.3, memory_budget=FEW)

    _assert_same(_gradients(ours, {"weight": weight}), _gradients(naive, {"weight": weight}))


def test_statistics_and_shapes_of_sequences() -> None:
    tensors = _tensors(rows=6)
    hidden, y = tensors["hidden"].reshape(2, 3, WIDTH), torch.tensor([[1, 2, -100], [4, 5, 6]])
    loss, stats = fused_linear_drsl_loss(
        hidden, tensors["weight"], y, torch.full((2, 3), 0.3), reduction="none", return_stats=True
    )
    wanted, expected = softmax_loss(
        F.linear(hidden, tensors["weight"]).flatten(0, 1), y.flatten(), distance="uniform", tau=0.3, reduction="none",
        return_stats=True,
    )  # fmt: skip
    torch.testing.assert_close(loss, wanted.reshape(2, 3))
    for found, field in zip(stats, expected, strict=True):
        torch.testing.assert_close(found, field.reshape(2, 3))


def test_under_compile_with_autocast() -> None:
    y = _labels()
    tensors = {name: x.float() for name, x in _tensors().items()}

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return fused_linear_drsl_loss(hidden * 2, weight, y, 0.3, bias=bias, memory_budget=FEW) * 3

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    _assert_same(_gradients(compiled, tensors), _gradients(step, tensors), 1e-2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operator_is_sound(reduction: str) -> None:
    tensors = {name: x.requires_grad_() for name, x in _tensors(rows=4, classes=9).items()}
    y = torch.tensor([1, 2, 3, 8])
    codes = drsl_kernels.spec.loss_spec("ce", 0.7, "uniform", 1.0, 0.0, -100, reduction, 0.0).codes
    arguments = (
        *tensors.values(),
        y,
        None,
        None,
        None,
        0.3,
        *codes,
        1.0,
        0.0,
        100,
        "",
        "",
        0,
        True,
        [True] * 3 + [False],
    )
    torch.library.opcheck(torch.ops.drsl_kernels.linear_loss.default, arguments)


def test_second_derivatives_transforms_and_graphs_that_are_kept() -> None:
    hidden, weight = (x.requires_grad_() for x in list(_tensors(rows=4, classes=6).values())[:2])
    y = torch.tensor([1, 2, 3, 5])

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_linear_drsl_loss(hidden, weight, y, 0.3)

    assert torch.autograd.gradgradcheck(loss_of, (hidden, weight))
    loss = loss_of(hidden, weight)
    gradient = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * gradient)
    torch.testing.assert_close(torch.func.grad(loss_of, 1)(hidden, weight), gradient)
    _, tangent = torch.func.jvp(lambda w: loss_of(hidden.detach(), w), (weight.detach(),), (weight.detach(),))
    torch.testing.assert_close(tangent, (gradient * weight.detach()).sum())


def test_batches_without_a_row_that_counts() -> None:
    tensors = _tensors(rows=4)
    for rows in (4, 0):
        y = torch.full((rows,), -100)
        cut = tensors | {"hidden": tensors["hidden"][:rows]}
        loss, gradients = _gradients(lambda y=y, **t: fused_linear_drsl_loss(**t, y=y, tau=0.3), cut)
        assert loss.isnan()
        assert all((gradient == 0).all() for gradient in gradients.values())


def test_the_module_is_the_function() -> None:
    y, tensors = _labels(), _tensors()
    module = FusedLinearDRSLLoss(torch.tensor(0.3), softcap=30.0, reduction="sum")
    expected = fused_linear_drsl_loss(**tensors, y=y, tau=0.3, softcap=30.0, reduction="sum")
    torch.testing.assert_close(module(tensors["hidden"], tensors["weight"], y, tensors["bias"]), expected)
    assert "softcap=30.0" in repr(module)
    assert set(module.state_dict()) == {"tau"}


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": torch.zeros(4, 5)}, ValueError, r"weight must have shape \(C, H\) = \(C, 5\), got \(350, 12\)"),
    ({"hidden": [1.0]}, TypeError, "hidden must be a Tensor, got list"),
    ({"hidden": torch.zeros(4, WIDTH, dtype=torch.int64)}, NotImplementedError, "hidden must be float32"),
    ({"weight": torch.zeros(CLASSES, WIDTH).half()}, TypeError, "weight must have the dtype of hidden"),
    ({"bias": torch.zeros(3, dtype=torch.float64)}, ValueError, r"bias must have shape \(C,\) = \(350,\), got \(3,\)"),
    ({"y": torch.zeros(4, CLASSES)}, TypeError, "y must hold class indices of dtype int64, got torch.float32"),
    ({"y": torch.zeros(4, dtype=torch.int64)}, ValueError, r"y must have shape \(23,\)"),
    ({"y": torch.full((ROWS,), 350)}, IndexError, "y holds label 350 at row 0"),
    ({"tau": float("nan")}, ValueError, "tau must be finite, got nan"),
    ({"tau": "1"}, TypeError, "tau must be a number, got '1'"),
    ({"distance": None}, ValueError, "distance must be the name of a distance, got None"),
    ({"distance": "far"}, ValueError, "distance must be one of"),
    ({"class_weight": torch.ones(3)}, RuntimeError, r"class_weight must have shape \(C,\) = \(350,\), got \(3,\)"),
    ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, or None, got 0.0"),
    ({"logit_scale": float("inf")}, ValueError, "logit_scale must be finite, got inf"),
    ({"memory_budget": 0}, ValueError, "memory_budget must be 1 byte or more, or None, got 0"),
    ({"memory_budget": 1.5}, TypeError, "memory_budget must be an int, got 1.5"),
    ({"return_stats": 1}, TypeError, "return_stats must be a bool, got 1"),
    ({"backend": "cublas"}, ValueError, "backend must be one of"),
    ({"first_class": 3}, ValueError, "first_class must be None without a group, got 3"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), WRONG, ids=[f"{next(iter(w[0]))}-{i}" for i, w in enumerate(WRONG)]
)
def test_errors_name_the_argument_and_its_value(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {**_tensors(), "y": _labels(), "tau": 0.3}
    with pytest.raises(error, match=message):
        fused_linear_drsl_loss(**arguments | change)


def test_gradients_of_every_needed_combination() -> None:
    y, tensors = _labels(), _tensors()
    _, every = _gradients(lambda **t: fused_linear_drsl_loss(**t, y=y, tau=0.3), tensors)
    for needed in product([True, False], repeat=3):
        leaves = {name: x.clone().requires_grad_(need) for (name, x), need in zip(tensors.items(), needed, strict=True)}
        loss = fused_linear_drsl_loss(**leaves, y=y, tau=0.3)
        assert loss.requires_grad == any(needed)
        if any(needed):
            (loss * 1.7).backward()
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == leaf.requires_grad
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, every[name])
