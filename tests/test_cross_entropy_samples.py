"""Parity with F.cross_entropy at tau = 0 over the sample inputs that PyTorch itself keeps for it: value, gradient,
second derivative. Class-probability targets are left out: the losses here take class indices.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from torch import Tensor

from drsl_kernels import fused_drsl_loss

HARD_LABEL_SAMPLES = 11  # as of torch 2.11 to 2.13; at least so many are to be found

# torch's table of samples comes with torch's own test settings for the whole process, so another process reads it.
DRAW = """
import sys, torch
from torch.testing._internal.common_methods_invocations import op_db
info = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
torch.manual_seed(0)
drawn = {
    str(dtype): [
        (s.input.detach(), s.args[0], s.kwargs)
        for s in info.sample_inputs("cpu", dtype)
        if not s.args[0].is_floating_point()
    ]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
torch.save(drawn, sys.argv[1])
"""

Sample: TypeAlias = "tuple[Tensor, Tensor, dict[str, Any]]"  # logits, y, arguments


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], list[Sample]]:
    """The samples with class indices, as a function of the dtype; logits are fresh leaves."""
    path = tmp_path_factory.mktemp("samples") / "drawn.pt"
    subprocess.run([sys.executable, "-W", "ignore", "-c", DRAW, str(path)], check=True)
    drawn = torch.load(path)

    def of(dtype: torch.dtype) -> list[Sample]:
        return [(z.clone().requires_grad_(), y, arguments) for z, y, arguments in drawn[str(dtype)]]

    return of


def both(z: Tensor, y: Tensor, arguments: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    """Our loss and PyTorch's, as functions of the same leaf."""
    return fused_drsl_loss(z, y, 0.0, backend=backend, **arguments), F.cross_entropy(z, y, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient(
    dtype: str, backend: str, samples: Callable[[torch.dtype], list[Sample]], record_property: Callable[..., None]
) -> None:
    found = samples(DTYPES[dtype])
    record_property("samples", len(found))
    assert len(found) >= HARD_LABEL_SAMPLES
    for z, y, arguments in found:
        ours, torchs = both(z, y, arguments, backend)
        # A half-precision loss comes in float32, a deliberate difference; PyTorch's is rounded several times.
        tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == "bfloat16" else {"rtol": 4e-3, "atol": 4e-3}
        if dtype in ("float32", "float64"):
            tolerance = {}
        assert ours.shape == torchs.shape
        torch.testing.assert_close(ours, torchs, check_dtype=dtype in ("float32", "float64"), **tolerance)
        upstream = torch.linspace(0.5, 1.5, ours.numel()).reshape(ours.shape)
        grad = torch.autograd.grad(ours, z, upstream.to(ours.dtype))[0]
        want = torch.autograd.grad(torchs, z, upstream.to(torchs.dtype))[0]
        assert grad.dtype == want.dtype
        torch.testing.assert_close(grad, want, **tolerance)


def test_second_derivative(backend: str, samples: Callable[[torch.dtype], list[Sample]]) -> None:
    found = samples(torch.float64)
    assert len(found) >= HARD_LABEL_SAMPLES
    for z, y, arguments in found:
        second = []
        for loss in both(z, y, arguments, backend):
            first = torch.autograd.grad(loss.sum(), z, create_graph=True)[0]
            second.append(torch.autograd.grad(first.square().sum(), z)[0])
        torch.testing.assert_close(second[0], second[1])


def test_under_vmap(samples: Callable[[torch.dtype], list[Sample]]) -> None:
    """torch.func goes through the reference on its own."""
    for z, y, arguments in samples(torch.float64):
        ours, torchs = (
            torch.func.vmap(torch.func.grad(lambda z, loss=loss: loss(z).sum()))(torch.stack([z, 2 * z]).detach())
            for loss in (
                lambda z, y=y, arguments=arguments: fused_drsl_loss(z, y, 0.0, **arguments),
                lambda z, y=y, arguments=arguments: F.cross_entropy(z, y, **arguments),
            )
        )
        torch.testing.assert_close(ours, torchs)


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
def test_error_types(spoil: str, backend: str, samples: Callable[[torch.dtype], list[Sample]]) -> None:
    """Each sample, spoiled in one way, raises the type that F.cross_entropy raises."""
    for sample in samples(torch.float32):
        z, y, arguments = SPOILED[spoil](sample[0].detach(), *sample[1:])
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            F.cross_entropy(z, y, **arguments)
        with pytest.raises(theirs.type):
            fused_drsl_loss(z, y, 0.0, backend=backend, **arguments)
