"""Properties that hold for any input, searched by hypothesis over shapes, strides, dtypes and arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, PAIRS, assert_true, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from truth import DISTANCES, TRUTHS

from drsl_kernels import fused_drsl_loss, softmax_loss

BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])


@st.composite
def logits_and_labels(
    draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(DTYPES), max_classes: int = 150, min_classes: int = 2
) -> tuple[Tensor, Tensor]:
    """Logits of some shape, spread, order of dimensions, gaps and offset in memory; labels, some of them ignored."""
    batch = draw(st.integers(1, 20))
    classes = draw(st.one_of(st.integers(min_classes, 18), st.integers(min_classes, max_classes)))
    shape = [batch, classes, *draw(st.lists(st.integers(1, 4), max_size=2))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    z = draw(st.sampled_from([0.01, 1.0, 4.0, 10.0])) * torch.randn(shape, generator=generator, dtype=torch.float64)
    z = z.to(DTYPES[draw(st.sampled_from(dtypes))])
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    memory = torch.zeros([shape[d] * steps[d] + 1 for d in order], dtype=z.dtype)
    z_there = memory[tuple(slice(1, None, steps[d]) for d in order)].permute(
        [order.index(d) for d in range(len(order))]
    )
    z_there.copy_(z)
    y = torch.randint(0, classes, [batch, *shape[2:]], generator=generator)
    if draw(st.booleans()):
        y[torch.rand(y.shape, generator=generator) < 0.3] = -100
    return z, y


@st.composite
def members(draw: st.DrawFn, classes: int) -> dict[str, Any]:
    truth, distance = draw(st.sampled_from(PAIRS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    chosen: dict[str, Any] = {"truth": truth, "distance": distance, "q": draw(st.sampled_from([0.3, 0.7, 1.0]))}
    if draw(st.booleans()):
        chosen["weight"] = torch.rand(classes, generator=generator) + 0.1
    if truth == "ce" and draw(st.booleans()):
        chosen["label_smoothing"] = draw(st.floats(0.01, 1.0))
    if draw(st.booleans()):
        chosen["scale"] = draw(st.floats(0.5, 2.0))
        chosen["margin"] = draw(st.floats(-1.0, 1.0))
    return chosen


@BACKENDS
@settings(max_examples=300)
@given(data=st.data())
def test_any_call_is_true(data: st.DataObject, backend: str) -> None:
    z, y = data.draw(logits_and_labels())
    arguments = data.draw(members(z.shape[1]))
    reduction = data.draw(st.sampled_from(["none", "mean", "sum"]))
    if reduction == "mean" and (y == -100).all():
        reduction = "sum"
    tau = data.draw(
        st.sampled_from([0.0, 0.7, -0.3, torch.tensor(1.1), torch.linspace(-1, 2, y.numel()).reshape(y.shape)])
    )
    assert_true(z, y, tau, reduction=reduction, backend=backend, tolerance=128, **arguments)


@BACKENDS
@settings(max_examples=60)
@given(data=st.data())
def test_a_constant_added_to_a_row_changes_nothing(data: st.DataObject, backend: str) -> None:
    z, y = data.draw(logits_and_labels(dtypes=("float64",)))
    truth, distance = data.draw(st.sampled_from(PAIRS))
    arguments: dict[str, Any] = {"truth": truth, "distance": distance, "reduction": "none", "backend": backend}
    shift = data.draw(st.floats(-1000, 1000))
    got, want = run(z + shift, y, 0.7, **arguments), run(z, y, 0.7, **arguments)
    torch.testing.assert_close(got[:2], want[:2], rtol=1e-8, atol=1e-9)


@BACKENDS
@settings(max_examples=60)
@given(data=st.data())
def test_permuted_classes_permute_the_gradient(data: st.DataObject, backend: str) -> None:
    z, y = data.draw(logits_and_labels(dtypes=("float64",)))
    arguments = data.draw(members(z.shape[1]))
    order = torch.randperm(z.shape[1], generator=torch.Generator().manual_seed(data.draw(st.integers(0, 1000))))
    where = torch.where(y == -100, y, order.argsort()[y.clamp(min=0)])
    moved = dict(arguments)
    if "weight" in moved:
        moved["weight"] = moved["weight"][order]
    loss, grad, _ = run(z, y, 0.7, reduction="sum", backend=backend, **arguments)
    loss_moved, grad_moved, _ = run(z[:, order], where, 0.7, reduction="sum", backend=backend, **moved)
    torch.testing.assert_close(loss_moved, loss, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(grad_moved, grad[:, order], rtol=1e-9, atol=1e-10)


@BACKENDS
@settings(max_examples=60)
@given(data=st.data())
def test_the_gradient_sums_to_zero_over_the_classes(data: st.DataObject, backend: str) -> None:
    z, y = data.draw(logits_and_labels(dtypes=("float64",)))
    arguments = data.draw(members(z.shape[1])) | {"scale": 1.0}
    grad = run(z, y, 0.7, reduction="sum", backend=backend, **arguments)[1]
    torch.testing.assert_close(
        grad.sum(1), torch.zeros_like(grad[:, 0]), rtol=0, atol=1e-11 * (1 + grad.abs().max().item())
    )


@BACKENDS
@settings(max_examples=60)
@given(data=st.data())
def test_losses_and_distances_are_not_negative(data: st.DataObject, backend: str) -> None:
    z, y = data.draw(logits_and_labels(dtypes=("float64", "float32")))
    truth = data.draw(st.sampled_from(["ce", "gce", "mae"]))
    distance = data.draw(st.sampled_from(DISTANCES))
    loss, stats = softmax_loss(
        z, y, truth=truth, distance=distance, tau=0.7, reduction="none", return_stats=True, backend=backend
    )
    rounding = 8 * torch.finfo(z.dtype).eps
    assert (loss >= -rounding).all()
    assert (stats.distance >= -rounding).all()
    assert (stats.cross_entropy >= 0).all()


@BACKENDS
@settings(max_examples=40)
@given(data=st.data())
def test_distances_are_zero_for_even_wrong_classes(data: st.DataObject, backend: str) -> None:
    rows, classes = data.draw(st.integers(1, 20)), data.draw(st.integers(2, 150))
    level, label_level = data.draw(st.floats(-50, 50)), data.draw(st.floats(-50, 50))
    z, y = torch.full((rows, classes), level, dtype=torch.float64), torch.arange(rows) % classes
    even = ["non_target", "non_target_logits", "conditional", "kl"]
    if data.draw(st.booleans()):
        z[torch.arange(rows), y] = label_level
    else:
        even.append("uniform")
    for distance in even:
        _, stats = softmax_loss(z, y, distance=distance, tau=1.0, return_stats=True, backend=backend)
        assert stats.distance.abs().max() < 1e-11


@BACKENDS
@settings(max_examples=60)
@given(data=st.data())
def test_neutral_arguments_are_neutral(data: st.DataObject, backend: str) -> None:
    """Weights of 1, smoothing 0, scale 1, margin 0 and a constant tau per row are the same as none of them."""
    z, y = data.draw(logits_and_labels())
    truth, distance = data.draw(st.sampled_from(PAIRS))
    arguments: dict[str, Any] = {"truth": truth, "distance": distance, "reduction": "sum", "backend": backend}
    want = run(z, y, 0.7, **arguments)
    neutral: list[dict[str, Any]] = [
        {"weight": torch.ones(z.shape[1])},
        {"label_smoothing": 0.0},
        {"scale": 1.0, "margin": 0.0},
        {"tau": torch.tensor(0.7)},
        {"tau": torch.full(y.shape, 0.7)},
        {"distance": distance, "q": 0.7},
    ]
    for extra in neutral:
        extra = dict(extra)
        got = run(z, y, extra.pop("tau", 0.7), **(arguments | extra))
        torch.testing.assert_close(got[:2], want[:2])


@BACKENDS
@settings(max_examples=60)
@given(data=st.data())
def test_tau_zero_is_cross_entropy(data: st.DataObject, backend: str) -> None:
    z, y = data.draw(logits_and_labels(dtypes=("float64", "float32")))
    weight = None
    if data.draw(st.booleans()):
        weight = torch.rand(z.shape[1], dtype=z.dtype) + 0.1
    smoothing = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    reduction = data.draw(st.sampled_from(["none", "mean", "sum"]))
    plain = z.detach().requires_grad_()
    want = F.cross_entropy(plain, y, weight=weight, label_smoothing=smoothing, reduction=reduction)
    want_grad = torch.autograd.grad(want, plain, torch.ones_like(want))[0]
    ours = z.detach().requires_grad_()
    distance = data.draw(st.sampled_from(DISTANCES))
    loss = fused_drsl_loss(
        ours, y, 0.0, distance=distance, weight=weight, label_smoothing=smoothing, reduction=reduction, backend=backend
    )
    torch.testing.assert_close(loss, want, equal_nan=True, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(
        torch.autograd.grad(loss, ours, torch.ones_like(loss))[0], want_grad, rtol=1e-4, atol=1e-5
    )


@settings(max_examples=60)
@given(data=st.data())
def test_the_backends_agree(data: st.DataObject) -> None:
    z, y = data.draw(logits_and_labels(dtypes=("float64",), min_classes=1))
    arguments = data.draw(members(z.shape[1])) | {"reduction": "none"}
    tau = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape)
    compiled, plain = (run(z, y, tau, backend=backend, **arguments) for backend in ("cpp", "reference"))
    torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=1e-11)


@BACKENDS
@settings(max_examples=40)
@given(data=st.data())
def test_rows_are_independent(data: st.DataObject, backend: str) -> None:
    """Any selection of rows has the losses and gradients that the rows have in the whole batch."""
    z, y = data.draw(logits_and_labels(dtypes=("float32", "bfloat16")))
    truth = data.draw(st.sampled_from(TRUTHS))
    chosen = data.draw(st.lists(st.integers(0, len(z) - 1), min_size=1, max_size=12))
    arguments: dict[str, Any] = {"truth": truth, "distance": "kl", "reduction": "none", "backend": backend}
    loss, grad, _ = run(z, y, 0.7, **arguments)
    part_loss, part_grad, _ = run(z[chosen], y[chosen], 0.7, **arguments)
    torch.testing.assert_close(part_loss, loss[chosen])
    torch.testing.assert_close(part_grad, grad[chosen])
