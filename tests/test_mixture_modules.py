"""`MixtureOfSoftmax` and `MixtureOfSigsoftmax` as modules: parameters, state, compilers, checkpoints, errors."""

from __future__ import annotations

import io

import pytest
import torch
from cases import random_labels, random_logits
from test_mixtures import BOTH, CHECKPOINT, CLASSES, COMPONENTS, FEATURES, KINDS, ROWS, mixture, parameters
from torch import Tensor, nn

import drsl_kernels
from drsl_kernels import MixtureOfSigsoftmax, MixtureOfSoftmax, fused_drsl_loss, mixtures


@BOTH
def test_shapes(kind: str) -> None:
    module = mixture(kind)
    for shape in ((), (1,), (2, 3), (0,), (2, 0)):
        assert module(torch.zeros(*shape, FEATURES)).shape == (*shape, CLASSES)


def test_a_tied_embedding() -> None:
    """Is shared: one parameter, which gets both gradients, and fixes width, device and dtype."""
    words = nn.Embedding(CLASSES, 9, dtype=torch.float64)
    module = MixtureOfSoftmax(FEATURES, CLASSES, 2, embedding=words.weight)
    assert module.weight is words.weight
    assert module.width == 9
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    module.loss(random_logits(3, FEATURES, dtype=torch.float64), random_labels(3, classes=CLASSES)).backward()
    assert words.weight.grad is not None


def test_parameters_as_the_authors_start_them() -> None:
    module = MixtureOfSoftmax(40, 500, 3, width=20)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "weight": (500, 20),
        "bias": (500,),
        "prior.weight": (3, 40),
        "latent.weight": (60, 40),
        "latent.bias": (60,),
    }
    assert 0.099 < module.weight.max() <= 0.1
    assert -0.1 <= module.weight.min() < -0.099
    assert module.bias is not None
    assert (module.bias == 0.0).all()
    assert MixtureOfSoftmax(4, 5, 2, bias=False).bias is None


@BOTH
def test_state_makes_the_round_trip(kind: str) -> None:
    module, other = mixture(kind), KINDS[kind](FEATURES, CLASSES, COMPONENTS)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert other.load_state_dict(torch.load(file), strict=True) == ([], [])
    hidden = random_logits(ROWS, FEATURES)
    assert torch.equal(module(hidden), other(hidden))


@BOTH
@CHECKPOINT
def test_compiled(checkpoint: bool, kind: str) -> None:
    module, hidden, y = mixture(kind, checkpoint=checkpoint), random_logits(ROWS, FEATURES), torch.arange(ROWS)
    step = torch.compile(lambda hidden, y: module.loss(hidden, y, 0.5), backend="aot_eager", fullgraph=True)
    got, want = step(hidden, y), module.loss(hidden, y, 0.5)
    torch.testing.assert_close(got, want)
    got_grads, want_grads = (torch.autograd.grad(loss, parameters(module)) for loss in (got, want))
    torch.testing.assert_close(got_grads, want_grads)


@BOTH
def test_gradients_of_each_sample(kind: str) -> None:
    """By torch.func, which has no checkpoints: none are made there."""
    module, hidden, y = mixture(kind, checkpoint=True), random_logits(3, FEATURES), torch.arange(3)
    values = {name: p.detach() for name, p in module.named_parameters()}

    def loss(values: dict[str, Tensor], hidden: Tensor, y: Tensor) -> Tensor:
        log_p = torch.func.functional_call(module, values, (hidden,))
        return fused_drsl_loss(log_p, y, 0.5)

    got = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(values, hidden, y)
    for i in range(3):
        want = torch.autograd.grad(module.loss(hidden[i], y[i], 0.5), parameters(module))
        torch.testing.assert_close([got[name][i] for name, _ in module.named_parameters()], list(want))


@BOTH
def test_autocast(kind: str) -> None:
    module, hidden = mixture(kind, checkpoint=True), random_logits(ROWS, FEATURES)
    with torch.autocast("cpu", torch.bfloat16):
        log_p = module(hidden)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p, module(hidden), rtol=0.0, atol=0.3)
    for grad in torch.autograd.grad(log_p[:, 0].sum(), parameters(module)):
        assert grad.dtype == torch.float32


def test_checkpoint_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what has a component and a class in its shape: nothing, and without it so many times the result."""
    monkeypatch.setitem(mixtures.BLOCK, "cpu", 2 * COMPONENTS * 50)
    kept = {}
    for checkpoint in (False, True):
        module = MixtureOfSoftmax(FEATURES, 50, COMPONENTS, checkpoint=checkpoint)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()), lambda _: None):  # type: ignore[misc]
            module(random_logits(10, FEATURES))
        kept[checkpoint] = sum(size for size in sizes if size >= 2 * COMPONENTS * 50)
    assert kept[True] == 0
    assert kept[False] == 2 * COMPONENTS * 10 * 50


def test_nothing_is_checkpointed_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    module = mixture("softmax", checkpoint=True)
    monkeypatch.setattr(mixtures, "checkpointed", None)
    with torch.no_grad():
        module(random_logits(2, FEATURES))


def test_representation() -> None:
    shown = repr(MixtureOfSigsoftmax(4, 5, 2, bias=False, checkpoint=True)).splitlines()
    assert shown[1].strip() == "features=4, classes=5, components=2, width=4, bias=False, checkpoint=True"


@BOTH
def test_errors(kind: str) -> None:
    make, module = KINDS[kind], mixture(kind)
    for name in ("features", "classes", "components"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            make(**{"features": 4, "classes": 5, "components": 2, name: 0})
    with pytest.raises(TypeError, match=r"components must be an int, got 2\.0"):
        make(4, 5, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width must be at least 1, got -1"):
        make(4, 5, 2, width=-1)
    with pytest.raises(TypeError, match=r"embedding must be an nn\.Parameter"):
        make(4, 5, 2, embedding=torch.zeros(5, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"embedding must have shape \(5, width\), got \(6, 4\)"):
        make(4, 5, 2, embedding=nn.Parameter(torch.zeros(6, 4)))
    with pytest.raises(ValueError, match=r"embedding must have shape \(5, 3\), got \(5, 4\)"):
        make(4, 5, 2, embedding=nn.Parameter(torch.zeros(5, 4)), width=3)
    with pytest.raises(ValueError, match=r"hidden must have shape \(\.\.\., 4\), got \(2, 3\)"):
        module(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="hidden must be a Tensor, got int"):
        module(3)
    with pytest.raises(ValueError, match=r"y must have shape \(2, 3\) \(or .* got \(6,\)"):
        module.loss(torch.zeros(2, 3, FEATURES), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tau must have shape \(\) or that of y, \(2, 3\), got \(6,\)"):
        module.loss(torch.zeros(2, 3, FEATURES), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(6))
    with pytest.raises(TypeError, match="y must be a Tensor, got list"):
        module.loss(torch.zeros(2, FEATURES), [0, 1])  # type: ignore[arg-type]


def test_are_public() -> None:
    assert {"MixtureOfSoftmax", "MixtureOfSigsoftmax", "sigsoftmax", "log_sigsoftmax"} <= set(drsl_kernels.__all__)
