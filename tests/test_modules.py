"""`DRSLLoss`, the module twin; and `info()`, which says what runs here."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import os
import pickle
import subprocess
import sys
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from cases import random_labels, random_logits
from torch import Tensor, nn
from truth import DISTANCES, loss_and_gradient

import drsl_kernels
from drsl_kernels import DRSLLoss, backends, fused_drsl_loss

WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.75, 3.0])
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"distance": "kl"},
    {"weight": WEIGHT},
    {"ignore_index": 2},
    {"reduction": "sum"},
    {"label_smoothing": 0.2},
]


def batch() -> tuple[Tensor, Tensor]:
    return random_logits(6, 5), random_labels(6, classes=5)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda a: ",".join(a) or "defaults")
def test_same_as_the_function(arguments: dict[str, Any], backend: str) -> None:
    z, y = batch()
    module = DRSLLoss(0.5, backend=backend, **arguments)
    assert torch.equal(module(z, y), fused_drsl_loss(z, y, 0.5, backend=backend, **arguments))


def test_takes_the_place_of_cross_entropy_loss(backend: str) -> None:
    z, y = batch()
    for arguments in ({}, {"weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": 3, "reduction": "sum"}):
        torch.testing.assert_close(
            DRSLLoss(0.0, backend=backend, **arguments)(z, y), nn.CrossEntropyLoss(**arguments)(z, y)
        )


def test_takes_the_constructor_arguments_of_cross_entropy_loss() -> None:
    theirs = inspect.signature(nn.CrossEntropyLoss).parameters
    ours = inspect.signature(DRSLLoss).parameters
    assert {name: p.default for name, p in theirs.items()} == {name: ours[name].default for name in theirs}
    module, twin = DRSLLoss(0.0, WEIGHT, ignore_index=3), nn.CrossEntropyLoss(WEIGHT, ignore_index=3)
    assert module.weight is WEIGHT
    for name in ("weight", "ignore_index", "reduction", "label_smoothing"):
        assert repr(getattr(module, name)) == repr(getattr(twin, name))


@pytest.mark.parametrize(("size_average", "reduce"), [*itertools.product([None, True, False], repeat=2)])
def test_deprecated_reductions(size_average: bool | None, reduce: bool | None) -> None:
    """They win over `reduction`, with the warning that `nn.CrossEntropyLoss` gives; None is silent."""
    arguments: dict[str, Any] = {"size_average": size_average, "reduce": reduce, "reduction": "sum"}
    caught = []
    for make in (nn.CrossEntropyLoss, lambda **arguments: DRSLLoss(0.0, **arguments)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            caught.append((make(**arguments).reduction, [(w.category, str(w.message)) for w in seen]))
    assert caught[0] == caught[1]
    assert len(caught[1][1]) == (size_average is not None or reduce is not None)


@pytest.mark.parametrize("arguments", [{}, {"weight": WEIGHT, "label_smoothing": 0.1}], ids=["plain", "weights"])
def test_class_probabilities(arguments: dict[str, Any], backend: str) -> None:
    z = random_logits(6, 5)
    y = random_logits(6, 5, seed=1).softmax(1)
    torch.testing.assert_close(
        DRSLLoss(0.0, backend=backend, **arguments)(z, y), nn.CrossEntropyLoss(**arguments)(z, y)
    )
    module = DRSLLoss(0.5, distance="kl", backend=backend, **arguments)
    assert torch.equal(module(z, y), fused_drsl_loss(z, y, 0.5, distance="kl", backend=backend, **arguments))


def test_tau_may_follow_a_schedule() -> None:
    z, y = batch()
    module = DRSLLoss(0.0)
    learned = DRSLLoss(torch.tensor(0.0))
    for tau in (0.1, 0.2):
        module.tau = tau
        assert isinstance(learned.tau, Tensor)
        learned.tau.fill_(tau)
        want = fused_drsl_loss(z, y, tau)
        assert torch.equal(module(z, y), want)
        torch.testing.assert_close(learned(z, y), want)


def test_tau_as_a_parameter_is_learned(backend: str) -> None:
    z, y = batch()
    module = DRSLLoss(nn.Parameter(torch.tensor(0.5)), backend=backend)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(z, y).backward()
    slope = loss_and_gradient(z, y, torch.tensor(0.5), distance="uniform")[2]
    assert slope is not None
    optimizer.step()
    torch.testing.assert_close(module.tau.detach(), 0.5 - 0.1 * slope, check_dtype=False)
    assert dict(module.named_parameters()).keys() == {"tau"}


def test_tensors_are_in_the_state(backend: str) -> None:
    module = DRSLLoss(torch.tensor(0.5), weight=WEIGHT, backend=backend)
    assert module.state_dict().keys() == {"tau", "weight"}
    assert list(module.parameters()) == []
    other = DRSLLoss(torch.tensor(0.0), weight=torch.zeros(5), backend=backend)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(*batch()), module(*batch()))


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["no_weight", "weight"])
@pytest.mark.parametrize("tau", ["number", "tensor", "per_row", "parameter"])
def test_state_makes_the_round_trip(tau: str, weight: Tensor | None) -> None:
    """Through a file, strictly: with the keys that the module has, and with no others."""

    def make(value: float, weight: Tensor | None) -> DRSLLoss:
        of_tensor = nn.Parameter if tau == "parameter" else torch.clone
        tensor = torch.full((6,) if tau == "per_row" else (), value)
        return DRSLLoss(0.5 if tau == "number" else of_tensor(tensor), weight)

    module, other = make(0.5, weight), make(0.0, None if weight is None else torch.zeros(5))
    state = module.state_dict()
    assert ("tau" in state, "weight" in state) == (tau != "number", weight is not None)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert other.load_state_dict(torch.load(file), strict=True) == ([], [])
    assert torch.equal(other(*batch()), module(*batch()))
    assert dict(other.named_parameters()).keys() == dict(module.named_parameters()).keys()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "scale": torch.tensor(1.0)})
    if state:
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict({})


def test_moves_with_its_tensors() -> None:
    module = DRSLLoss(torch.tensor(0.5), weight=WEIGHT).to("meta")
    assert module.weight is not None
    assert module.weight.is_meta
    assert isinstance(module.tau, Tensor)
    assert module.tau.is_meta
    assert DRSLLoss(torch.tensor(0.5)).double().tau.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_its_tensors_need_not_have_the_dtype_of_the_logits(dtype: torch.dtype, backend: str) -> None:
    """A model is turned to half precision with the loss in it; what counts is the logits' dtype."""
    z, y = batch()
    module = DRSLLoss(torch.tensor(0.3), weight=WEIGHT, backend=backend).to(dtype)
    assert module.weight is not None
    assert module.weight.dtype == module.tau.dtype == dtype
    loss = module(z, y)
    assert loss.dtype == torch.float32
    want = loss_and_gradient(z, y, module.tau.float(), distance="uniform", weight=WEIGHT.to(dtype).float())[0]
    torch.testing.assert_close(loss, want, check_dtype=False)


def test_shares_its_memory() -> None:
    module = DRSLLoss(torch.tensor(0.5), WEIGHT.clone()).share_memory()
    assert module.weight is not None
    assert module.weight.is_shared()
    assert module.tau.is_shared()
    assert torch.equal(module(*batch()), DRSLLoss(0.5, WEIGHT)(*batch()))


def test_copies_pickles_and_saves(backend: str) -> None:
    module = DRSLLoss(torch.tensor(0.5), distance="kl", weight=WEIGHT, label_smoothing=0.1, backend=backend)
    want = module(*batch())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(*batch()), want)
        assert repr(twin) == repr(module)
        assert twin.weight is not module.weight


def test_a_saved_module_names_one_class_to_trust() -> None:
    """`torch.load` refuses to make objects of classes that the user did not name, of this class as of any other."""
    file = io.BytesIO()
    torch.save(DRSLLoss(torch.tensor(0.5), WEIGHT), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match=r"DRSLLoss"):
        torch.load(file)
    file.seek(0)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(file) == ["drsl_kernels.modules.DRSLLoss"]
    file.seek(0)
    with torch.serialization.safe_globals([DRSLLoss]):
        assert torch.equal(torch.load(file)(*batch()), DRSLLoss(0.5, WEIGHT)(*batch()))


def test_representation() -> None:
    assert repr(DRSLLoss(0.5)) == "DRSLLoss(tau=0.5, distance='uniform')"
    text = repr(DRSLLoss(torch.tensor(0.5), distance="kl", reduction="sum", ignore_index=3, label_smoothing=0.1))
    assert text == "DRSLLoss(tau=0.5, distance='kl', ignore_index=3, reduction='sum', label_smoothing=0.1)"
    assert "tau=tensor of shape (4,)" in repr(DRSLLoss(torch.zeros(4)))
    assert "tau=0.3," in repr(DRSLLoss(nn.Parameter(torch.tensor(0.3))))
    assert "tau=tensor of shape ()" in repr(DRSLLoss(torch.tensor(0.5)).to("meta"))  # has no value


@pytest.mark.parametrize("distance", DISTANCES)
def test_trains_a_linear_classifier(distance: str, backend: str) -> None:
    x, y = random_logits(60, 8, seed=2), random_labels(60, classes=3)
    model, criterion = nn.Linear(8, 3), DRSLLoss(0.05, distance=distance, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_module_hooks(backend: str) -> None:
    seen = []
    module = DRSLLoss(0.5, backend=backend)
    module.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_in[0]))
    z, y = batch()
    module(z.requires_grad_(), y).backward()
    assert torch.equal(seen[0], z.grad)


def test_environment_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = batch()
    monkeypatch.setattr(backends, "ENVIRONMENT", "reference")
    assert backends.choose(z, None) is drsl_kernels.reference.softmax_loss
    assert backends.choose(z, "cpp") is not drsl_kernels.reference.softmax_loss  # what a call says counts more
    monkeypatch.setattr(backends, "ENVIRONMENT", "cuda")
    with pytest.raises(RuntimeError, match=r"DRSL_KERNELS_BACKEND=cuda is not usable: .+"):
        fused_drsl_loss(z, y, 0.5)
    # Inside torch.func and its like, calls that leave the backend open go through the reference as ever.
    torch.func.grad(lambda z: fused_drsl_loss(z, y, 0.5))(z)
    monkeypatch.setattr(backends, "ENVIRONMENT", "numpy")
    with pytest.raises(ValueError, match=r"DRSL_KERNELS_BACKEND must be one of 'cpp', .*, got 'numpy'"):
        fused_drsl_loss(z, y, 0.5)


def test_environment_is_read() -> None:
    code = "from drsl_kernels import backends; print(backends.ENVIRONMENT)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DRSL_KERNELS_BACKEND": "reference"},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "reference", result.stderr


def test_info_names_every_backend() -> None:
    info = drsl_kernels.info()
    assert [b.name for b in info.backends] == ["cpp", "reference", "triton", "cuda"]
    assert info.version == drsl_kernels.__version__
    usable = {b.name: b.usable for b in info.backends}
    assert usable["reference"]
    assert usable["triton"] == (find_spec("triton") is not None)  # the tests interpret it
    assert not usable["cuda"]
    lines = str(info).splitlines()
    assert lines[0] == f"drsl_kernels {drsl_kernels.__version__}, torch {torch.__version__}"
    for b, line in zip(info.backends, lines[1:], strict=True):
        assert b.detail
        assert line.split()[0] == b.name
        assert line.endswith(b.detail)
        assert ("not usable" in line) == (not b.usable)


def test_the_public_names_are_there() -> None:
    for name in drsl_kernels.__all__:
        assert getattr(drsl_kernels, name) is not None
    assert set(drsl_kernels.LossStats._fields) == {"cross_entropy", "distance", "margin", "correct"}


def test_the_compiled_backend_is_chosen_by_itself() -> None:
    """backend=None and "cpp" give the same bits, and no warning, where the extension is loaded."""
    if not {b.name: b.usable for b in drsl_kernels.info().backends}["cpp"]:
        pytest.skip("no compiled backend here")
    z, y = random_logits(300, 33), random_labels(300, classes=33)
    assert fused_drsl_loss(z.requires_grad_(), y, 0.5).grad_fn.name() == "SoftmaxLossBackward"
    assert torch.equal(fused_drsl_loss(z, y, 0.5), fused_drsl_loss(z, y, 0.5, backend="cpp"))
