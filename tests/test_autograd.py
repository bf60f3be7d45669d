"""First-order gradients through the autograd engine: what is kept and handed over, what is scaled, what is refused.

The gradient is computed in the forward pass, so these tests ask for everything that could go wrong with a stored one.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CLASSES, DTYPES, ROWS, labels, leaf, random_labels, random_logits, run, true_gradient
from torch import Tensor
from truth import loss_and_gradient

from drsl_kernels import fused_drsl_loss, softmax_loss

FLOATS = pytest.mark.parametrize("dtype", DTYPES)
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


@FLOATS
def test_second_backward_gives_the_same(dtype: str, backend: str) -> None:
    z = leaf(dtype)
    loss = fused_drsl_loss(z, labels(), 0.5, backend=backend)
    first = torch.autograd.grad(loss, z, retain_graph=True)[0]
    second = torch.autograd.grad(loss, z, retain_graph=True)[0]
    last = torch.autograd.grad(loss, z)[0]
    assert torch.equal(first, second)
    assert torch.equal(first, last)
    torch.testing.assert_close(first, true_gradient(z))


@FLOATS
@pytest.mark.parametrize("factor", [1.0, 3.0])
@REDUCTIONS
def test_a_returned_gradient_may_be_changed(reduction: str, factor: float, dtype: str, backend: str) -> None:
    """While the graph is kept, what was returned is the caller's: changing it does not change the next one."""
    z = leaf(dtype)
    loss = fused_drsl_loss(z, labels(), 0.5, reduction=reduction, backend=backend)
    upstream = torch.full_like(loss, factor)
    first = torch.autograd.grad(loss, z, upstream, retain_graph=True)[0]
    kept = first.clone()
    first.fill_(99.0)
    second = torch.autograd.grad(loss, z, upstream, retain_graph=True)[0]
    assert torch.equal(second, kept)
    second.mul_(-1)
    assert torch.equal(torch.autograd.grad(loss, z, upstream)[0], kept)


@FLOATS
def test_accumulated_gradient_may_be_changed_between_passes(dtype: str, backend: str) -> None:
    z = leaf(dtype)
    loss = fused_drsl_loss(z, labels(), 0.5, backend=backend)
    loss.backward(retain_graph=True)
    assert z.grad is not None
    once = z.grad.clone()
    z.grad.zero_()
    loss.backward()
    assert torch.equal(z.grad, once)


@FLOATS
@pytest.mark.parametrize("tau_needs_grad", [False, True])
def test_backward_twice_is_refused_as_torch_does(tau_needs_grad: bool, dtype: str, backend: str) -> None:
    z, tau = leaf(dtype), torch.tensor(0.5, requires_grad=tau_needs_grad)
    loss = fused_drsl_loss(z, labels(), tau, backend=backend)
    loss.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()


SCALINGS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "times_3": (lambda loss: loss * 3, 3.0),
    "over_4": (lambda loss: loss / 4, 0.25),
    "negated": (lambda loss: -loss, -1.0),
    "times_0": (lambda loss: loss * 0, 0.0),
    "plus_1": (lambda loss: loss + 1, 1.0),
    "squared_twice": (lambda loss: loss + loss, 2.0),
    "in_place": (lambda loss: loss.mul_(5), 5.0),
    "as_double": (lambda loss: loss.double() * 3, 3.0),
}


@FLOATS
@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_losses(scaling: str, dtype: str, backend: str) -> None:
    z = leaf(dtype)
    scale, factor = SCALINGS[scaling]
    scale(fused_drsl_loss(z, labels(), 0.5, backend=backend)).backward()
    torch.testing.assert_close(z.grad, true_gradient(z, upstream=torch.tensor(factor)))


def test_sum_of_two_losses_of_the_same_logits(backend: str) -> None:
    z = leaf()
    one = fused_drsl_loss(z, labels(), 0.5, backend=backend)
    other = softmax_loss(z, labels(), truth="mae", backend=backend)
    (one + 2 * other).backward()
    want = true_gradient(z) + 2 * true_gradient(z, truth="mae", distance=None)
    torch.testing.assert_close(z.grad, want)


def test_the_same_loss_used_twice(backend: str) -> None:
    z = leaf()
    loss = fused_drsl_loss(z, labels(), 0.5, backend=backend)
    (loss * loss).backward()
    torch.testing.assert_close(z.grad, true_gradient(z, upstream=2 * loss.detach()))


@FLOATS
def test_micro_batches_accumulate_to_the_joint_batch(dtype: str, backend: str) -> None:
    joint = leaf(dtype, rows=12)
    y = labels(12)
    fused_drsl_loss(joint, y, 0.5, backend=backend).backward()
    split = leaf(dtype, rows=12)
    for start in (0, 4, 8):
        part = slice(start, start + 4)
        (fused_drsl_loss(split[part], y[part], 0.5, backend=backend) / 3).backward()
    torch.testing.assert_close(split.grad, joint.grad)


def test_accumulation_over_steps_does_not_alias(backend: str) -> None:
    """The engine may adopt the first gradient as .grad and add the second to it in place."""
    z = leaf()
    y = labels()
    for _ in range(3):
        fused_drsl_loss(z, y, 0.5, backend=backend).backward()
    torch.testing.assert_close(z.grad, 3 * true_gradient(z))


@FLOATS
def test_arbitrary_upstream_per_row(dtype: str, backend: str) -> None:
    z = leaf(dtype)
    upstream = torch.tensor([0.0, 1.0, -2.0, 0.5, 1e-3, 7.0])
    loss = fused_drsl_loss(z, labels(), 0.5, reduction="none", backend=backend)
    got = torch.autograd.grad(loss, z, upstream.to(loss.dtype))[0]
    torch.testing.assert_close(got, true_gradient(z, reduction="none", upstream=upstream))
    assert not got[0].any()


@FLOATS
def test_upstream_that_is_an_expanded_scalar(dtype: str, backend: str) -> None:
    """loss.sum() and loss.mean() send back one value with stride 0."""
    for reduce, factor in ((Tensor.sum, 1.0), (Tensor.mean, 1 / ROWS)):
        z = leaf(dtype)
        reduce(fused_drsl_loss(z, labels(), 0.5, reduction="none", backend=backend)).backward()
        upstream = torch.full((ROWS,), factor)
        torch.testing.assert_close(z.grad, true_gradient(z, reduction="none", upstream=upstream))


def test_upstream_with_strides_and_broadcasts(backend: str) -> None:
    z, y = random_logits(3, 5, 4), random_labels(3, 4, classes=5)
    arguments: dict[str, Any] = {"distance": "uniform", "reduction": "none"}
    for upstream in (
        random_logits(4, 3).t(),
        random_logits(3, 1).expand(3, 4),
        random_logits(1, 4).expand(3, 4),
        random_logits(6, 8)[::2, ::2],
        torch.tensor(2.0).expand(3, 4),
    ):
        got = run(z, y, torch.tensor(0.5), upstream=upstream, backend=backend, **arguments)
        want = loss_and_gradient(z, y, torch.tensor(0.5), upstream=upstream, **arguments)
        torch.testing.assert_close(got[1:], want[1:], check_dtype=False)


@FLOATS
@REDUCTIONS
def test_zero_upstream(reduction: str, dtype: str, backend: str) -> None:
    z = leaf(dtype)
    loss = fused_drsl_loss(z, labels(), 0.5, reduction=reduction, backend=backend)
    assert not torch.autograd.grad(loss, z, torch.zeros_like(loss))[0].any()


@FLOATS
def test_zero_upstream_still_carries_nan(dtype: str, backend: str) -> None:
    """0 * NaN is NaN, as everywhere in PyTorch."""
    z = leaf(dtype)
    loss = fused_drsl_loss(z, labels(), 0.5, reduction="none", backend=backend)
    upstream = torch.zeros_like(loss)
    upstream[2] = float("nan")
    got = torch.autograd.grad(loss, z, upstream)[0]
    assert got[2].isnan().all()
    assert not got[[0, 1, 3, 4, 5]].any()


def test_logits_that_are_not_a_leaf(backend: str) -> None:
    weight, x = random_logits(CLASSES, 3, seed=4).requires_grad_(), random_logits(ROWS, 3, seed=5)
    fused_drsl_loss(x @ weight.t(), labels(), 0.5, backend=backend).backward()
    z = (x @ weight.detach().t()).requires_grad_()
    torch.testing.assert_close(weight.grad, true_gradient(z).t() @ x)


def test_class_weights_get_no_gradient(backend: str) -> None:
    z, weight = leaf(), torch.ones(CLASSES, requires_grad=True)
    fused_drsl_loss(z, labels(), 0.5, weight=weight, label_smoothing=0.1, backend=backend).backward()
    assert weight.grad is None


def test_nothing_needs_a_gradient(backend: str) -> None:
    z = random_logits(ROWS, CLASSES)
    loss = fused_drsl_loss(z, labels(), torch.tensor(0.5), backend=backend)
    assert not loss.requires_grad
    assert loss.grad_fn is None


@FLOATS
def test_no_grad_and_inference_mode(dtype: str, backend: str) -> None:
    z = leaf(dtype)
    want = fused_drsl_loss(z, labels(), 0.5, backend=backend).detach()
    with torch.no_grad():
        loss = fused_drsl_loss(z, labels(), 0.5, backend=backend)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, want)
    with torch.inference_mode():
        loss, stats = fused_drsl_loss(z.clone(), labels(), 0.5, return_stats=True, backend=backend)
        assert loss.is_inference()
        torch.testing.assert_close(loss.clone(), want)
        assert stats.margin.is_inference()
    with torch.inference_mode():
        inside = random_logits(ROWS, CLASSES, dtype=DTYPES[dtype])
    torch.testing.assert_close(fused_drsl_loss(inside, labels(), 0.5, backend=backend), want)


def test_detached_logits(backend: str) -> None:
    z, tau = leaf(), torch.tensor(0.5, requires_grad=True)
    fused_drsl_loss(z.detach(), labels(), tau, backend=backend).backward()
    assert z.grad is None
    assert tau.grad is not None


def test_logits_changed_after_the_forward_pass() -> None:
    """The compiled node has its gradient already: the first-order result is that of the logits it saw."""
    original = leaf()
    want = true_gradient(original)
    for factor in (1.0, 2.0):
        z = original.clone()
        loss = fused_drsl_loss(z, labels(), 0.5, backend="cpp") * factor
        with torch.no_grad():
            z.zero_()
        torch.testing.assert_close(torch.autograd.grad(loss, original)[0], factor * want)


def test_logits_changed_after_the_forward_pass_are_noticed_where_they_are_read() -> None:
    """Half precision with an upstream gradient other than 1, and second derivatives, go back to the logits."""
    for dtype, create_graph in (("float16", False), ("bfloat16", False), ("float32", True)):
        z = leaf(dtype).clone()
        loss = 2 * fused_drsl_loss(z, labels(), 0.5, backend="cpp")
        z.detach().zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, z, create_graph=create_graph)


def test_labels_changed_after_the_forward_pass_are_noticed_where_they_are_read() -> None:
    z, y = leaf(), labels()
    loss = fused_drsl_loss(z, y, 0.5, backend="cpp")
    y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, z, create_graph=True)


@FLOATS
def test_hooks(dtype: str, backend: str) -> None:
    z = leaf(dtype)
    seen = []
    z.register_hook(lambda grad: seen.append(grad.clone()) or grad * 2)
    loss = fused_drsl_loss(z, labels(), 0.5, backend=backend)
    loss.register_hook(lambda grad: grad * 3)
    loss.backward()
    torch.testing.assert_close(seen[0], true_gradient(z, upstream=torch.tensor(3.0)))
    torch.testing.assert_close(z.grad, 2 * seen[0])


def test_a_hook_that_changes_the_gradient_in_place(backend: str) -> None:
    z = leaf()
    z.register_hook(lambda grad: grad.mul_(2))
    loss = fused_drsl_loss(z, labels(), 0.5, backend=backend)
    first = torch.autograd.grad(loss, z, retain_graph=True)[0]
    second = torch.autograd.grad(loss, z)[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, 2 * true_gradient(z))


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_anomaly_mode(backend: str) -> None:
    with torch.autograd.detect_anomaly():
        z = leaf()
        fused_drsl_loss(z, labels(), 0.5, backend=backend).backward()
        torch.testing.assert_close(z.grad, true_gradient(z))
        bad = leaf()
        with torch.no_grad():
            bad[0, 0] = float("nan")
        with pytest.raises(RuntimeError, match="returned nan values"):
            fused_drsl_loss(bad, labels(), 0.5, backend=backend).backward()


def test_saved_tensor_hooks(backend: str) -> None:
    """Activation offloading and checkpointing replace what the node saved."""
    z, tau = leaf("float16"), torch.tensor(0.5, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        loss = fused_drsl_loss(z, labels(), tau, backend=backend)
    (3 * loss).backward()
    torch.testing.assert_close(z.grad, true_gradient(z, upstream=torch.tensor(3.0)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool, backend: str) -> None:
    z = leaf()

    def forward(logits: Tensor) -> Tensor:
        return fused_drsl_loss(logits * 2, labels(), 0.5, backend=backend)

    torch.utils.checkpoint.checkpoint(forward, z, use_reentrant=use_reentrant).backward()
    doubled = (2 * z.detach()).requires_grad_()
    torch.testing.assert_close(z.grad, 2 * true_gradient(doubled))


def test_the_graph_is_freed(backend: str) -> None:
    z = leaf().clone()
    dead = weakref.ref(z)
    loss = fused_drsl_loss(z, labels(), 0.5, backend=backend)
    del z, loss
    gc.collect()
    assert dead() is None


def test_inputs_argument_of_backward(backend: str) -> None:
    z, tau = leaf(), torch.tensor(0.5, requires_grad=True)
    fused_drsl_loss(z, labels(), tau, backend=backend).backward(inputs=[tau])
    assert z.grad is None
    assert tau.grad is not None


@REDUCTIONS
def test_batched_upstream_gradients(reduction: str, backend: str) -> None:
    """is_grads_batched and vectorized Jacobians run the backward pass under vmap."""
    z = leaf()
    loss = fused_drsl_loss(z, labels(), 0.5, reduction=reduction, backend=backend)
    upstreams = random_logits(3, *loss.shape, seed=6)
    got = torch.autograd.grad(loss, z, upstreams, is_grads_batched=True)[0]
    want = torch.stack([true_gradient(z, reduction=reduction, upstream=u) for u in upstreams])
    torch.testing.assert_close(got, want)
