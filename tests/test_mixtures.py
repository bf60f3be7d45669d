"""`MixtureOfSoftmax` and `MixtureOfSigsoftmax` against the naive sum of probabilities in float64.

Modules as such are the matter of test_mixture_modules.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import DTYPES, assert_error, random_labels, random_logits
from torch import Tensor, nn

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
