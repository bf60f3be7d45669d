"""Autocast, gradient scaling, deterministic, anomaly and inference mode treat the loss as they treat `F.cross_entropy`.

Layouts, upstream gradients and rounding of half precision alone are in test_half_precision.py and test_autograd.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, DTYPES, ROWS, assert_error, labels, random_labels, random_logits
from torch import Tensor, nn
from truth import DISTANCES

from drsl_kernels import DRSLLoss, fused_drsl_loss, softmax_loss

HALF = pytest.mark.parametrize("half", ["bfloat16", "float16"])
TARGETS = pytest.mark.parametrize("target", ["indices", "probabilities"])
IMAGES, CLASSES_OF_IMAGES = 16, 10


def targets(kind: str, rows: int = ROWS, classes: int = CLASSES) -> Tensor:
    if kind == "indices":
        return random_labels(rows, classes=classes)
    return random_logits(rows, classes, seed=1).softmax(1)


def classifier(seed: int = 1) -> nn.Module:
    """Images of 8x8 to ten classes; autocast runs the convolution and the linear layer in half precision."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES_OF_IMAGES))


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return random_logits(IMAGES, 1, 8, 8, dtype=dtype, seed=7)


def plain(logits: Tensor, y: Tensor, tau: float) -> Tensor:
    """What a user writes without this package."""
    penalty = (logits.softmax(1) - 1 / logits.shape[1]).square().sum(1).mean()
    return F.cross_entropy(logits, y) + tau * penalty


# Autocast


@HALF
@TARGETS
@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_a_model_under_autocast(tau: float, target: str, half: str, backend: str) -> None:
    """Loss and parameter gradients are as near to float64 as those of `F.cross_entropy` in the same place."""
    y = targets(target, IMAGES, CLASSES_OF_IMAGES)
    exact_y = y.double() if y.is_floating_point() else y

    def step(model: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", dtype=DTYPES[half]):
            logits = model(images())
            loss = loss_of(logits)
        assert logits.dtype == DTYPES[half]
        assert loss.dtype == torch.float32
        return logits.detach(), loss.detach(), gradients(model, loss)

    error, naive_error = torch.tensor(0.0), torch.tensor(0.0)
    for seed in range(4):
        logits, loss, gradient = step(classifier(seed), lambda z: fused_drsl_loss(z, y, tau, backend=backend))
        _, naive_loss, naive_gradient = step(classifier(seed), lambda z: plain(z, y, tau))
        assert_error("loss", loss, plain(logits.double(), exact_y, tau), naive_loss, 1e-6)
        exact = classifier(seed).double()
        truth = gradients(exact, plain(exact(images(torch.float64)), exact_y, tau))
        error, naive_error = (
            total + (g - truth).norm() for total, g in ((error, gradient), (naive_error, naive_gradient))
        )
    # The interpreter truncates the gradient of the logits where the hardware rounds it.
    assert error <= (1.5 if backend == "triton" and half == "bfloat16" else 1.05) * naive_error


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])


ARGUMENTS: dict[str, dict[str, Any]] = {
    "weight": {"weight": random_logits(CLASSES, seed=2).exp()},
    "half_weight": {"weight": random_logits(CLASSES, seed=2).exp().bfloat16()},
    "smoothing": {"weight": random_logits(CLASSES, seed=2).exp(), "label_smoothing": 0.1},
    "tau_per_row": {"tau": random_logits(ROWS, seed=3).abs()},
    "double_tau": {"tau": torch.tensor(0.3, dtype=torch.float64)},
    "stats": {"return_stats": True},
    **{distance: {"distance": distance} for distance in DISTANCES},
}


NEED_A_LABEL = {"non_target", "non_target_logits", "conditional"}


@pytest.mark.parametrize(
    ("arguments", "target"),
    [(a, t) for a in ARGUMENTS for t in ("indices", "probabilities") if t == "indices" or a not in NEED_A_LABEL],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_no_bit_of_the_loss(dtype: str, arguments: str, target: str, backend: str) -> None:
    """Value, statistics and gradients, first and second, are those of the same call outside; float64 stays float64."""

    def call(inside: bool) -> list[Tensor]:
        given = {"tau": torch.tensor(0.5), "distance": "uniform", **ARGUMENTS[arguments]}
        given["tau"] = given["tau"].clone().requires_grad_()
        z = random_logits(ROWS, CLASSES, dtype=DTYPES[dtype]).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16) if inside else nullcontext():
            result = softmax_loss(z, targets(target), backend=backend, **given)
            loss, stats = result if isinstance(result, tuple) else (result, ())
            (slope,) = torch.autograd.grad(loss, z, create_graph=True)
            first = torch.autograd.grad(loss, (z, given["tau"]), retain_graph=True)
            second = torch.autograd.grad(slope.float().square().sum(), z)
        assert loss.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        return [loss, *stats, *first, *second]

    for inside, outside in zip(call(True), call(False), strict=True):
        assert inside.dtype == outside.dtype
        assert torch.equal(inside, outside)


@HALF
def test_regions_of_autocast(half: str, backend: str) -> None:
    """Nested, switched off within, and left again: the logits of each region give the loss that they give anywhere."""
    model, y = classifier(), random_labels(IMAGES, classes=CLASSES_OF_IMAGES)
    losses = []
    with torch.autocast("cpu", dtype=DTYPES[half], cache_enabled=False):  # which is of one dtype
        losses.append((model(images()), DTYPES[half]))
        with torch.autocast("cpu", enabled=False):
            losses.append((model(images()), torch.float32))
            losses.append((losses[0][0], DTYPES[half]))
            within = fused_drsl_loss(losses[0][0], y, 0.5, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append((model(images()), torch.bfloat16))
        inside = [fused_drsl_loss(logits, y, 0.5, backend=backend) for logits, _ in losses]
    assert torch.equal(within, inside[0])
    for (logits, dtype), loss in zip(losses, inside, strict=True):
        assert logits.dtype == dtype
        assert loss.dtype == torch.float32
        assert torch.equal(loss, fused_drsl_loss(logits, y, 0.5, backend=backend))
    sum(inside).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Gradient scaling


STEPS = 8


def scaled_training(loss_of: Callable[[Tensor, Tensor], Tensor]) -> tuple[list[float], list[bool], Tensor]:
    """In float16, from a scale that overflows: the scales, whether each step changed the model, and the model."""
    model, y = classifier(), random_labels(IMAGES, classes=CLASSES_OF_IMAGES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
    scales, stepped = [], []
    for _ in range(STEPS):
        before = flat(model)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model(images()), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        stepped.append(not torch.equal(flat(model), before))
    return scales, stepped, flat(model)


def exact_training(tau: float, steps: int) -> Tensor:
    model, y = classifier().double(), random_labels(IMAGES, classes=CLASSES_OF_IMAGES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        plain(model(images(torch.float64)), y, tau).backward()
        optimizer.step()
    return flat(model)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_gradient_scaler(tau: float, backend: str) -> None:
    """Steps that overflow are skipped and lower the scale, good ones raise it and are those of float64 training."""
    scales, stepped, model = scaled_training(lambda z, y: fused_drsl_loss(z, y, tau, backend=backend))
    start = flat(classifier())
    assert not stepped[0]
    assert 4 <= sum(stepped) < STEPS
    assert [b < a for a, b in itertools.pairwise([2.0**20, *scales])] == [not good for good in stepped]
    assert any(b > a for a, b in itertools.pairwise(scales))
    want = exact_training(tau, sum(stepped))
    assert (model - want).norm() <= 0.01 * (want - start).norm()
    if tau == 0.0:
        assert (scales, stepped) == scaled_training(F.cross_entropy)[:2]


def test_gradient_scaler_with_a_learned_tau(backend: str) -> None:
    """Its gradient is scaled and unscaled with the others."""
    loss_of = DRSLLoss(nn.Parameter(torch.tensor(0.5)), backend=backend)
    z, y = random_logits(ROWS, CLASSES).requires_grad_(), labels()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD([z, *loss_of.parameters()], lr=1.0)
    scaler.scale(loss_of(z.half(), y)).backward()
    scaler.unscale_(optimizer)
    want = torch.autograd.grad(loss_of(z.half(), y), (z, loss_of.tau))
    torch.testing.assert_close((z.grad, loss_of.tau.grad), want, rtol=1e-3, atol=1e-6)


# Deterministic mode


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Operators without a deterministic form raise, and memory comes filled with NaN instead of with what was there."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "transposed": lambda x: x.t(),
    "padded_rows": lambda x: x[:, :-3],
    "images": lambda x: x.reshape(2, -1, 2, 3),
    "one_row": lambda x: x[3],
}


@pytest.mark.parametrize(("dtype", "target"), [("float32", "indices"), ("float16", "indices"), ("float16", "q")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_deterministic_mode(layout: str, dtype: str, target: str, backend: str, deterministic: None) -> None:
    """No error, the same bits twice, and every element of every result is written: none is the NaN of fresh memory."""
    z = LAYOUTS[layout](random_logits(6, 18, dtype=DTYPES[dtype]))
    at = 0 if z.dim() == 1 else 1
    shape, classes = z.shape[:at] + z.shape[at + 1 :], z.shape[at]
    y = random_labels(*shape, classes=classes) if target == "indices" else random_logits(*z.shape, seed=1).softmax(at)
    if target == "indices" and shape:
        y[0] = -100  # its gradient is written, too
    tau = random_logits(*shape, seed=3).requires_grad_()
    weight = random_logits(classes, seed=4).exp()

    def results(reduction: str) -> list[Tensor]:
        leaf = z.detach().requires_grad_()
        arguments: dict[str, Any] = {"weight": weight, "label_smoothing": 0.1, "backend": backend}
        loss, stats = fused_drsl_loss(leaf, y, tau, reduction=reduction, return_stats=True, **arguments)
        first = torch.autograd.grad(loss.sum(), (leaf, tau), retain_graph=True)
        scaled = torch.autograd.grad(3 * loss.sum(), leaf, retain_graph=True)
        (slope,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
        return [loss, *stats, *first, *scaled, *torch.autograd.grad(slope.float().square().sum(), leaf)]

    for reduction in ("mean", "none"):
        once, again = results(reduction), results(reduction)
        for a, b in zip(once, again, strict=True):
            assert not a.isnan().any()
            assert torch.equal(a, b)


# Anomaly mode


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("distance", DISTANCES)
def test_anomaly_mode_raises_no_false_alarm(distance: str, backend: str) -> None:
    """Nowhere on the way is a gradient NaN, to any order, where masked classes, ignored rows and saturation are."""
    z = random_logits(ROWS, CLASSES)
    y = labels()
    z[0, (y[0] + 1) % CLASSES] = -torch.inf
    z[1] = torch.where(torch.arange(CLASSES) == y[1], 1.0, -torch.inf)
    y[2], z[2] = -100, torch.nan
    z[3, y[3]] = 1e4
    z[4, (y[4] + 1) % CLASSES] = 1e4
    tau = torch.tensor(0.5, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        leaf = z.requires_grad_()
        loss = fused_drsl_loss(leaf, y, tau, distance=distance, backend=backend)
        loss.backward(retain_graph=True)
        if distance != "non_target_logits":  # its square of 1e4 is large, its square squared is not finite
            slope = torch.autograd.grad(loss, leaf, create_graph=True)[0]
            slope[y != -100].clamp(-1, 1).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.backends("cpp", "triton", "cuda")  # the reference consists of torch's own nodes
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_names_the_node_and_the_forward_call(backend: str) -> None:
    name = fused_drsl_loss(random_logits(2, 3).requires_grad_(), torch.tensor([0, 1]), 0.5, backend=backend).grad_fn
    assert re.fullmatch(r"_?SoftmaxLoss\w*Backward", name.name())
    with torch.autograd.set_detect_anomaly(True):
        z = random_logits(ROWS, CLASSES)
        z[0, 0] = torch.nan
        loss = fused_drsl_loss(z.requires_grad_(), labels(), 0.5, backend=backend)
        with (
            pytest.warns(UserWarning, match=rf"Error detected in {name.name()}[\s\S]*{re.escape(__file__)}"),
            pytest.raises(RuntimeError, match=f"'{name.name()}' returned nan values"),
        ):
            loss.backward()


# Inference mode, and no gradients


def test_a_module_in_inference_mode(backend: str) -> None:
    z, y = random_logits(ROWS, CLASSES), labels()
    module = DRSLLoss(nn.Parameter(torch.tensor(0.5)), random_logits(CLASSES, seed=2).exp(), backend=backend)
    want = module(z, y).detach()
    with torch.inference_mode():
        loss = module(z.requires_grad_(), y)
        assert loss.is_inference()
        assert loss.grad_fn is None
    assert torch.equal(loss.clone(), want)
    with torch.no_grad():
        assert torch.equal(module(z, y), want)
        with torch.enable_grad():
            assert module(z, y).requires_grad


@pytest.mark.backends("cpp", "triton", "cuda")  # the reference saves copies, and needs none
@pytest.mark.parametrize("which", ["y", "weight", "probabilities"])
def test_inference_tensors_are_refused_as_by_torch(which: str, backend: str) -> None:
    """Where the backward pass would need one, the error is that of `F.cross_entropy` in its place."""
    with torch.inference_mode():
        inside = {"y": labels(), "weight": torch.ones(CLASSES), "probabilities": targets("probabilities")}
    z = random_logits(ROWS, CLASSES).requires_grad_()
    y = inside[which] if which != "weight" else labels()
    weight = inside["weight"] if which == "weight" else None
    messages = []
    for loss_of in (F.cross_entropy, lambda z, y, weight: fused_drsl_loss(z, y, 0.5, weight=weight, backend=backend)):
        with pytest.raises(RuntimeError) as error:
            loss_of(z, y, weight=weight).backward()
        messages.append(str(error.value))
    assert messages[0] == messages[1]
