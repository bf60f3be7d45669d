"""`MixtureOfSoftmax` and `MixtureOfSigsoftmax` against the naive sum of probabilities in float64."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from cases import DTYPES, assert_error, random_labels, random_logits
from torch import Tensor, nn

import drsl_kernels
from drsl_kernels import MixtureOfSigsoftmax, MixtureOfSoftmax, fused_drsl_loss, mixtures, sigsoftmax

Mixture = MixtureOfSoftmax | MixtureOfSigsoftmax
KINDS = {"softmax": MixtureOfSoftmax, "sigsoftmax": MixtureOfSigsoftmax}
BOTH = pytest.mark.parametrize("kind", KINDS)
CHECKPOINT = pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpoint"])
FEATURES, CLASSES, COMPONENTS, ROWS = 4, 6, 3, 5


def mixture(kind: str, components: int = COMPONENTS, scale: float = 10.0, **arguments: Any) -> Mixture:
    """With parameters large enough to make the components differ."""
    torch.manual_seed(7)
    module: Mixture = KINDS[kind](FEATURES, CLASSES, components, **arguments)
    with torch.no_grad():
        module.weight.mul_(scale)
        module.prior.weight.mul_(3.0)
        if module.bias is not None:
            module.bias.uniform_(-1.0, 1.0)
    return module


def activation(kind: str, z: Tensor) -> Tensor:
    powers = z.exp() * (z.sigmoid() if kind == "sigsoftmax" else 1.0)
    return powers / powers.sum(-1, keepdim=True)


def naive(kind: str, module: Mixture, hidden: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Sum over components of pi_k times the activation: probabilities, from the module's parameters."""
    values = {name: p.detach().to(dtype) for name, p in module.state_dict().items()}
    hidden = hidden.detach().to(dtype)
    priors = (hidden @ values["prior.weight"].T).exp()
    priors = priors / priors.sum(-1, keepdim=True)
    p = torch.zeros((), dtype=dtype)
    for k in range(module.components):
        some = slice(k * module.width, (k + 1) * module.width)
        context = torch.tanh(hidden @ values["latent.weight"][some].T + values["latent.bias"][some])
        z = context @ values["weight"].T + values.get("bias", torch.zeros((), dtype=dtype))
        p = p + priors[..., k : k + 1] * activation(kind, z)
    return p


def parameters(module: Mixture, *inputs: Tensor) -> list[Tensor]:
    return [*inputs, *module.parameters()]


@pytest.fixture(params=[2**22, 2 * COMPONENTS * CLASSES], ids=["one_block", "blocks_of_2"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mixtures.BLOCK, "cpu", request.param)


@BOTH
@CHECKPOINT
@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype: str, checkpoint: bool, kind: str) -> None:
    module = mixture(kind, checkpoint=checkpoint, dtype=DTYPES[dtype], width=7)
    hidden = random_logits(ROWS, FEATURES, dtype=DTYPES[dtype])
    got = module(hidden)
    assert got.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    want = naive(kind, module, hidden).log()
    if dtype in ("float64", "float32"):
        plain = naive(kind, module, hidden, DTYPES[dtype]).log().double()
        assert_error("log p", got.detach(), want, plain, 16 * torch.finfo(got.dtype).eps)
    else:  # the contexts and the logits are rounded
        torch.testing.assert_close(got.double(), want, rtol=0.0, atol=30 * torch.finfo(DTYPES[dtype]).eps)


@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_sums_in_float32(dtype: str, kind: str) -> None:
    """Two thousand classes of equal logits, and two components of equal weight, are exact: nothing else is rounded."""
    module = KINDS[kind](FEATURES, 2000, 2, dtype=DTYPES[dtype])
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        module.prior.weight[1] = 1.0
    hidden = random_logits(3, FEATURES, dtype=DTYPES[dtype])
    torch.testing.assert_close(module(hidden).double(), torch.full((3, 2000), -math.log(2000)).double())


@BOTH
@CHECKPOINT
@pytest.mark.usefixtures("block")
def test_gradients(checkpoint: bool, kind: str) -> None:
    """Those of the naive formula, for every parameter and the hidden states."""
    module = mixture(kind, checkpoint=checkpoint, dtype=torch.float64)
    hidden = random_logits(ROWS, FEATURES, dtype=torch.float64).requires_grad_()
    upstream = random_logits(ROWS, CLASSES, dtype=torch.float64, seed=3)
    got = torch.autograd.grad(module(hidden), parameters(module, hidden), upstream)

    contexts = (hidden @ module.latent.weight.T + module.latent.bias).tanh().unflatten(-1, (COMPONENTS, -1))
    logits = contexts @ module.weight.T + (0.0 if module.bias is None else module.bias)
    priors = (hidden @ module.prior.weight.T).softmax(-1)
    p = (priors.unsqueeze(-1) * activation(kind, logits)).sum(1)
    want = torch.autograd.grad(p.log(), parameters(module, hidden), upstream)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@BOTH
@CHECKPOINT
def test_first_and_second_derivatives(checkpoint: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mixtures.BLOCK, "cpu", 2 * 3)
    module = KINDS[kind](2, 3, 2, checkpoint=checkpoint, dtype=torch.float64)
    hidden = random_logits(2, 2, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def function(hidden: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (hidden,))
        return result

    inputs = tuple(p.detach().requires_grad_() for p in parameters(module, hidden))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@BOTH
def test_one_component_is_the_activation(kind: str) -> None:
    module = mixture(kind, components=1)
    hidden = random_logits(ROWS, FEATURES)
    logits = module.latent(hidden).tanh() @ module.weight.T + module.bias
    want = logits.softmax(-1) if kind == "softmax" else sigsoftmax(logits)
    torch.testing.assert_close(module(hidden).exp(), want)


@BOTH
def test_equal_components_are_one(kind: str) -> None:
    module, single = mixture(kind), mixture(kind, components=1)
    with torch.no_grad():
        single.weight.copy_(module.weight)
        single.bias.copy_(module.bias)  # type: ignore[union-attr, arg-type]
        module.latent.weight.copy_(single.latent.weight.repeat(COMPONENTS, 1))
        module.latent.bias.copy_(single.latent.bias.repeat(COMPONENTS))
    hidden = random_logits(ROWS, FEATURES)
    torch.testing.assert_close(module(hidden), single(hidden))


@BOTH
def test_a_decided_prior_leaves_one_component(kind: str) -> None:
    """Far from the others in logits, it has all of the weight, and log p stays finite."""
    module, single = mixture(kind), mixture(kind, components=1)
    with torch.no_grad():
        module.prior.weight.zero_()
        module.prior.weight[1, 0] = 1e4
        single.weight.copy_(module.weight)
        single.bias.copy_(module.bias)  # type: ignore[union-attr, arg-type]
        single.latent.weight.copy_(module.latent.weight[FEATURES : 2 * FEATURES])
        single.latent.bias.copy_(module.latent.bias[FEATURES : 2 * FEATURES])
    hidden = random_logits(ROWS, FEATURES)
    hidden[:, 0] = 1.0
    torch.testing.assert_close(module(hidden), single(hidden))


def test_sigsoftmax_with_a_large_bias_is_softmax() -> None:
    """A constant in all logits takes sigsoftmax to softmax."""
    ours, theirs = mixture("sigsoftmax", dtype=torch.float64), mixture("softmax", dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    hidden = random_logits(ROWS, FEATURES, dtype=torch.float64)
    assert (ours(hidden) - theirs(hidden)).abs().max() > 0.01
    with torch.no_grad():
        ours.bias.add_(60.0)  # type: ignore[union-attr]
    torch.testing.assert_close(ours(hidden), theirs(hidden))


@BOTH
@CHECKPOINT
@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_at_large_logits(dtype: str, checkpoint: bool, kind: str) -> None:
    """Logits and logits of the prior of 1e4 and -1e4."""
    module = mixture(kind, dtype=torch.float64, checkpoint=checkpoint)
    hidden = torch.tensor([[1e4, -1e4, 1.0, 0.0], [1e4, 1e4, 0.0, 1.0]], dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(1e4 * torch.eye(CLASSES, FEATURES) - 1e4 * torch.eye(CLASSES, FEATURES).roll(2, 0))
        module.prior.weight.copy_(torch.eye(COMPONENTS, FEATURES))
    module = module.to(DTYPES[dtype])
    hidden = hidden.to(DTYPES[dtype])
    log_p = module(hidden)
    assert log_p.isfinite().all()
    assert log_p.abs().max() > 9e3
    loss = module.loss(hidden, torch.tensor([0, 3]))
    for grad in torch.autograd.grad(loss, parameters(module)):
        assert grad.isfinite().all()


@BOTH
def test_classes_left_out_of_the_result(kind: str) -> None:
    """Filled with -inf they leave the loss of the others' probabilities, given that it is one of these."""
    module, hidden, y = mixture(kind), random_logits(ROWS, FEATURES), random_labels(ROWS, classes=2)
    log_p = module(hidden)
    masked = log_p.index_fill(1, torch.tensor([2, 4]), -torch.inf)
    loss = fused_drsl_loss(masked, y, 0.0)
    p = naive(kind, module, hidden)[:, [0, 1, 3, 5]]
    torch.testing.assert_close(loss.double(), -(p[range(ROWS), y] / p.sum(1)).log().mean(), rtol=1e-5, atol=0.0)
    for grad in torch.autograd.grad(loss, parameters(module)):
        assert grad.isfinite().all()


@BOTH
def test_log_probabilities_are_their_own_log_softmax(kind: str) -> None:
    log_p = mixture(kind)(random_logits(200, FEATURES, spread=5.0))
    torch.testing.assert_close(log_p.log_softmax(-1), log_p, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(200))


@BOTH
@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0])
def test_losses_of_saturated_rows(gap: float, kind: str) -> None:
    """In float32 a loss of 1e-17 keeps its digits, and so does its gradient."""
    module = mixture(kind, scale=1.0)
    hidden, y = random_logits(ROWS, FEATURES), torch.zeros(ROWS, dtype=torch.int64)
    with torch.no_grad():
        assert module.bias is not None
        module.bias[0] = gap
    twin = KINDS[kind](FEATURES, CLASSES, COMPONENTS, dtype=torch.float64)
    twin.load_state_dict(module.state_dict())
    ours, theirs = module.loss(hidden, y, reduction="none"), twin.loss(hidden.double(), y, reduction="none")
    # The truth: one minus p in float64 is too coarse, the sum of the other classes is not.
    others = naive(kind, module, hidden)[:, 1:].sum(1)
    torch.testing.assert_close(theirs, -torch.log1p(-others), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=0.0)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), parameters(module)),
        torch.autograd.grad(theirs.sum(), parameters(twin)),
        strict=True,
    ):
        assert (a.double() - b).abs().max() <= 1e-4 * b.abs().max()


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"tau": 0.5, "distance": "kl"},
    {"weight": torch.linspace(0.5, 2.0, CLASSES), "reduction": "sum"},
    {"ignore_index": 2, "label_smoothing": 0.1},
]


@BOTH
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda a: ",".join(a) or "defaults")
def test_loss(arguments: dict[str, Any], kind: str) -> None:
    """Of hidden states in batches and sequences: `fused_drsl_loss` over the logarithms of naive probabilities."""
    module, hidden, y = mixture(kind), random_logits(2, 3, FEATURES), random_labels(2, 3, classes=CLASSES)
    log_p = naive(kind, module, hidden).log().flatten(0, 1)
    arguments = {"tau": 0.0, **arguments}
    want = fused_drsl_loss(log_p, y.flatten(), **arguments)
    torch.testing.assert_close(module.loss(hidden, y, **arguments).double(), want, rtol=1e-5, atol=0.0)


@BOTH
def test_loss_of_each_row(kind: str) -> None:
    module, hidden, y = mixture(kind), random_logits(2, 3, FEATURES), random_labels(2, 3, classes=CLASSES)
    tau = torch.rand(2, 3)
    got = module.loss(hidden, y, tau, reduction="none")
    assert got.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(got[i, j], module.loss(hidden[i, j], y[i, j], tau[i, j]))
    soft = random_logits(2, 3, CLASSES).softmax(-1)
    got = module.loss(hidden, soft, reduction="none")
    torch.testing.assert_close(got, -(soft * module(hidden)).sum(-1))


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
