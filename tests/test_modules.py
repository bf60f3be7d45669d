"""`DRSLLoss`, the module twin; and `info()`, which says what runs here."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
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
    assert DRSLLoss(0.5).state_dict() == {}


def test_moves_with_its_tensors() -> None:
    module = DRSLLoss(torch.tensor(0.5), weight=WEIGHT).to("meta")
    assert module.weight is not None
    assert module.weight.is_meta
    assert isinstance(module.tau, Tensor)
    assert module.tau.is_meta
    assert DRSLLoss(torch.tensor(0.5)).double().tau.dtype == torch.float64


def test_copies_pickles_and_saves(backend: str) -> None:
    module = DRSLLoss(torch.tensor(0.5), distance="kl", weight=WEIGHT, label_smoothing=0.1, backend=backend)
    want = module(*batch())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(*batch()), want)


def test_representation() -> None:
    assert repr(DRSLLoss(0.5)) == "DRSLLoss(tau=0.5, distance='uniform')"
    text = repr(DRSLLoss(torch.tensor(0.5), distance="kl", reduction="sum", ignore_index=3, label_smoothing=0.1))
    assert text == "DRSLLoss(tau=0.5, distance='kl', ignore_index=3, reduction='sum', label_smoothing=0.1)"
    assert "tau=tensor of shape (4,)" in repr(DRSLLoss(torch.zeros(4)))


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
