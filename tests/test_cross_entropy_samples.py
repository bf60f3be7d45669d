"""Parity with F.cross_entropy at tau = 0 over the inputs that PyTorch itself tests it with: those of the function and
of `nn.CrossEntropyLoss`, class indices and class probabilities. Values, gradients, second derivatives, forward mode,
errors.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from cases import DTYPES
from torch import Tensor
from truth import DISTANCES

from drsl_kernels import DRSLLoss, fused_drsl_loss

# As of torch 2.11 to 2.13; at least so many are to be found.
SAMPLES = {"class indices": 80, "class probabilities": 10}
ERROR_INPUTS = 7

# torch's tables of samples come with torch's own test settings for the whole process, so another process reads them.
DRAW = """
import sys, torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
op = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
module = next(m for m in module_db if m.module_cls is torch.nn.CrossEntropyLoss)
common = dict(device="cpu", requires_grad=False, training=True)
torch.manual_seed(0)
drawn = {}
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    drawn[str(dtype)] = [(s.input, s.args[0], s.kwargs) for s in op.sample_inputs("cpu", dtype)]
    drawn[str(dtype)] += [
        (*s.forward_input.args, s.constructor_input.kwargs)
        for s in module.module_inputs_func(module, dtype=dtype, **common)
    ]
drawn["errors"] = [
    (*e.module_error_input.forward_input.args, e.module_error_input.constructor_input.kwargs, e.error_type.__name__)
    for e in module.module_error_inputs_func(module, dtype=torch.float32, **common)
]
torch.save(drawn, sys.argv[1])
"""

Sample: TypeAlias = "tuple[Tensor, Tensor, dict[str, Any]]"  # logits, y, arguments
Samples: TypeAlias = Callable[..., list[Sample]]


def kind_of(y: Tensor) -> str:
    return "class probabilities" if y.is_floating_point() else "class indices"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("samples") / "drawn.pt"
    subprocess.run([sys.executable, "-W", "ignore", "-c", DRAW, str(path)], check=True)
    tables: dict[str, Any] = torch.load(path)
    return tables


@pytest.fixture
def samples(drawn: dict[str, Any], record_property: Callable[..., None], request: pytest.FixtureRequest) -> Samples:
    """The samples as a function of the dtype; logits and probabilities are fresh leaves.

    Triton's slow interpreter gets every eighth: torch varies them by threes and fives.
    """
    thin = "[triton" in request.node.name and not request.config.getoption("--all-cases")

    def of(
        dtype: torch.dtype, kinds: Collection[str] = tuple(SAMPLES), against: str = "F.cross_entropy"
    ) -> list[Sample]:
        found = [
            (z.clone().requires_grad_(), y.clone().requires_grad_(y.is_floating_point()), arguments)
            for z, y, arguments in drawn[str(dtype)]
        ]
        soft = sum(y.is_floating_point() for _, y, _ in found)
        assert len(found) - soft >= SAMPLES["class indices"]
        assert soft >= SAMPLES["class probabilities"]
        found = [sample for sample in (found[::8] if thin else found) if kind_of(sample[1]) in kinds]
        record_property(f"samples against {against}", len(found))
        return found

    return of


def both(z: Tensor, y: Tensor, arguments: dict[str, Any], backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Our loss and PyTorch's, as functions of the same leaves.

    For half precision PyTorch computes in float32: ours does inside, and PyTorch's own is rounded after every step.
    """
    ours = fused_drsl_loss(z, y, 0.0, backend=backend, **arguments)  # type: ignore[call-overload]
    if z.dtype in (torch.bfloat16, torch.float16):
        z, y = z.float(), y.float() if y.is_floating_point() else y
        arguments = {k: v.float() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return ours, F.cross_entropy(z, y, **arguments)


def assert_same(ours: Tensor, torchs: Tensor, dtype: str, steps: int = 1) -> None:
    """`steps`: how often a half-precision result was rounded on the way."""
    assert ours.shape == torchs.shape
    assert ours.dtype == torchs.dtype
    relative = {"bfloat16": 8e-3, "float16": 1e-3}.get(dtype)
    if dtype == "float32" and steps > 1:
        relative = 1e-4
    tolerance = {} if relative is None else {"rtol": steps * relative, "atol": steps * relative / 4}
    torch.testing.assert_close(ours, torchs, equal_nan=True, **tolerance)  # type: ignore[arg-type]


def leaves(z: Tensor, y: Tensor) -> list[Tensor]:
    return [z, y] if y.is_floating_point() else [z]


@pytest.mark.parametrize("kernels", [True, False], ids=["logits", "logits_and_probabilities"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient(dtype: str, kernels: bool, backend: str, samples: Samples) -> None:
    """With probabilities that require grad, the reference stands in for the kernels."""
    for z, y, arguments in samples(DTYPES[dtype], SAMPLES if kernels else ["class probabilities"]):
        target = y.detach() if kernels else y
        ours, torchs = both(z, target, arguments, backend)
        assert_same(ours, torchs, dtype)
        upstream = torch.linspace(0.5, 1.5, ours.numel()).reshape(ours.shape)
        wanted = [z] if kernels else [z, y]
        got = torch.autograd.grad(ours, wanted, upstream.to(ours.dtype))
        want = torch.autograd.grad(torchs, wanted, upstream.to(torchs.dtype))
        for our_grad, their_grad in zip(got, want, strict=True):
            assert our_grad.dtype == their_grad.dtype
            assert_same(our_grad, their_grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_derivative(dtype: str, backend: str, samples: Samples) -> None:
    for z, y, arguments in samples(DTYPES[dtype]):
        second = []
        for loss in both(z, y, arguments, backend):
            first = torch.autograd.grad(loss.sum(), leaves(z, y), create_graph=True)
            second.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves(z, y)))  # type: ignore[arg-type]
        for ours, torchs in zip(*second, strict=True):
            assert_same(ours, torchs, dtype, steps=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_mode(dtype: str, samples: Samples) -> None:
    for z, y, arguments in samples(DTYPES[dtype]):
        with fwAD.dual_level():
            dual = fwAD.make_dual(z.detach(), torch.ones_like(z) / (1 + z.detach().abs()))
            target = fwAD.make_dual(y.detach(), 0.5 * torch.ones_like(y)) if y.is_floating_point() else y
            ours, torchs = (fwAD.unpack_dual(loss).tangent for loss in both(dual, target, arguments))
            assert_same(ours, torchs, dtype)


def test_forward_over_reverse(samples: Samples) -> None:
    for z, y, arguments in samples(torch.float64):
        y = y.detach()
        products = [
            torch.func.jvp(
                torch.func.grad(lambda z, loss=loss, y=y, a=arguments: loss(z, y, **a).sum()),
                (z,),
                (torch.ones_like(z),),
            )[1]
            for loss in (lambda z, y, **a: fused_drsl_loss(z, y, 0.0, **a), F.cross_entropy)
        ]
        torch.testing.assert_close(products[0], products[1], equal_nan=True)


def test_under_vmap(samples: Samples) -> None:
    """torch.func goes through the reference on its own."""
    for z, y, arguments in samples(torch.float64):
        y = y.detach()
        ours, torchs = (
            torch.func.vmap(torch.func.grad(lambda z, loss=loss: loss(z).sum()))(torch.stack([z, 2 * z]).detach())
            for loss in (
                lambda z, y=y, arguments=arguments: fused_drsl_loss(z, y, 0.0, **arguments),
                lambda z, y=y, arguments=arguments: F.cross_entropy(z, y, **arguments),
            )
        )
        torch.testing.assert_close(ours, torchs, equal_nan=True)


HARD_AND_SOFT = [(distance, "class indices") for distance in DISTANCES]
HARD_AND_SOFT += [(distance, "class probabilities") for distance in ("uniform", "kl")]


@pytest.mark.backends("cpp", "triton", "cuda")
@pytest.mark.parametrize(("distance", "kind"), HARD_AND_SOFT)
def test_every_distance_against_the_reference(distance: Any, kind: str, backend: str, samples: Samples) -> None:
    """Values, gradients and second derivatives in float64."""
    for z, y, arguments in samples(torch.float64, [kind], "the reference"):
        results = []
        for name in (backend, "reference"):
            loss = fused_drsl_loss(z, y.detach(), 0.7, **{**arguments, "distance": distance, "backend": name})
            grad = torch.autograd.grad(loss.sum(), z, retain_graph=True)[0]
            first = torch.autograd.grad(loss.sum(), z, create_graph=True)[0]
            results.append((loss.detach(), grad, torch.autograd.grad(first.square().sum(), z)[0]))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_error_inputs(drawn: dict[str, Any], backend: str) -> None:
    """The types that PyTorch's tests expect of F.cross_entropy, from the function and from the module."""
    assert len(drawn["errors"]) >= ERROR_INPUTS
    for z, y, arguments, name in drawn["errors"]:
        expected = {"RuntimeError": RuntimeError, "ValueError": ValueError}[name]
        with pytest.raises(expected):
            fused_drsl_loss(z, y, 0.0, backend=backend, **arguments)  # type: ignore[call-overload]
        with pytest.raises(expected):
            DRSLLoss(0.0, backend=backend, **arguments)(z, y)  # type: ignore[arg-type]


SPOILED: dict[str, Any] = {
    "wrong_batch": lambda z, y, a: (z, torch.cat([y, y]), a),
    "int32_target": lambda z, y, a: (z, y.int(), a),
    "bool_target": lambda z, y, a: (z, y.bool(), a),
    "label_too_large": lambda z, y, a: (z, torch.full_like(y, z.shape[1]), a),
    "label_negative": lambda z, y, a: (z, torch.full_like(y, -1), a),
    "label_far_out": lambda z, y, a: (z, torch.full_like(y, 2**40), a),
    "unknown_reduction": lambda z, y, a: (z, y, {**a, "reduction": "average"}),
    "smoothing_above_1": lambda z, y, a: (z, y, {**a, "label_smoothing": 1.5}),
    "long_weight": lambda z, y, a: (z, y, {**a, "weight": torch.ones(z.shape[1] + 1, dtype=z.dtype)}),
    "integer_logits": lambda z, y, a: (z.long(), y, a),
    "complex_logits": lambda z, y, a: (torch.complex(z, z), y, {k: v for k, v in a.items() if k != "weight"}),
    "more_target_dimensions": lambda z, y, a: (z, y.unsqueeze(-1), a),
    "logits_list": lambda z, y, a: (z.tolist(), y, a),
    "target_list": lambda z, y, a: (z, y.tolist(), a),
    "target_none": lambda z, y, a: (z, None, a),
}


@pytest.mark.backends("cpp", "reference", "triton")  # a device cannot raise an error about a label
@pytest.mark.parametrize("spoil", SPOILED)
def test_error_types(spoil: str, backend: str, drawn: dict[str, Any]) -> None:
    """Each sample, spoiled in one way, raises the type that F.cross_entropy raises."""
    for sample in drawn["torch.float32"]:
        if sample[1].is_floating_point() or sample[0].dim() < 2:
            continue
        z, y, arguments = SPOILED[spoil](sample[0].detach(), *sample[1:])
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            F.cross_entropy(z, y, **arguments)
        with pytest.raises(theirs.type):
            fused_drsl_loss(z, y, 0.0, backend=backend, **arguments)
