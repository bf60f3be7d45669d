"""Labels that no class has, on the device: NaN for their row, nothing for the others, no read out of bounds."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, random_labels, random_logits, run
from on_device import assert_true_on

pytestmark = pytest.mark.gpu

# (rows, classes): several rows per program, and rows that are too long for one
SHAPES = pytest.mark.parametrize("shape", [(9, 10), (3, 9001)], ids=["few", "many"])

WRONG = {
    "minus_one": -1,
    "past_the_end": None,  # the number of classes
    "next_row": 10**4,
    "32_bits": 2**32,  # 0 in the lower half
    "most": 2**63 - 1,
    "least": -(2**63),
}


@pytest.fixture
def unchecked(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels on the CPU are looked at before a kernel sees them: not here."""
    if device.type == "cpu":
        monkeypatch.setattr("drsl_kernels.checks._check_labels", lambda *arguments: None)


@pytest.mark.usefixtures("unchecked")
@SHAPES
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_label_is_nan_for_its_row(
    wrong: str, shape: tuple[int, int], device: torch.device, gpu_backend: str
) -> None:
    rows, classes = shape
    label = WRONG[wrong]
    z = random_logits(rows, classes)
    y = random_labels(rows, classes=classes)
    right = run(z.to(device), y.to(device), 0.5, distance="uniform", reduction="none", backend=gpu_backend)
    y[1] = classes if label is None else label
    loss, grad, _ = run(z.to(device), y.to(device), 0.5, distance="uniform", reduction="none", backend=gpu_backend)
    others = [i for i in range(rows) if i != 1]
    assert loss[1].isnan()
    assert grad[1].isnan().all()
    assert torch.equal(loss[others], right[0][others])
    assert torch.equal(grad[others], right[1][others])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_wrong_label_is_never_averaged_away(reduction: str, device: torch.device, gpu_backend: str) -> None:
    z, y = random_logits(9, 10).to(device), random_labels(9, classes=10).to(device)
    y[4] = 10
    loss, grad, _ = run(z, y, 0.5, distance="uniform", reduction=reduction, backend=gpu_backend)
    assert loss.isnan()
    assert grad[4].isnan().all()


@pytest.mark.usefixtures("unchecked")
def test_a_wrong_label_with_class_weights(device: torch.device, gpu_backend: str) -> None:
    """The weight of a class that does not exist is not read."""
    z, y, weight = random_logits(9, 10).to(device), random_labels(9, classes=10).to(device), torch.ones(10).to(device)
    y[4] = 2**40
    loss, grad, _ = run(z, y, 0.5, distance="uniform", reduction="none", weight=weight, backend=gpu_backend)
    assert loss.isnan().nonzero().flatten().tolist() == [4]
    assert grad.isnan().any(1).nonzero().flatten().tolist() == [4]


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_may_hold_anything(
    dtype: str, shape: tuple[int, int], device: torch.device, gpu_backend: str
) -> None:
    rows, classes = shape
    z, y = random_logits(rows, classes, dtype=DTYPES[dtype]), random_labels(rows, classes=classes)
    y[0] = y[2] = -100
    assert_true_on(device, z, y, 0.5, distance="uniform", backend=gpu_backend)
    z[0], z[2] = torch.nan, torch.inf
    loss, grad, _ = run(z.to(device), y.to(device), 0.5, distance="uniform", reduction="none", backend=gpu_backend)
    assert not loss[[0, 2]].any()
    assert not grad[[0, 2]].any()


def test_all_rows_ignored(device: torch.device, gpu_backend: str) -> None:
    z, y = random_logits(4, 10).to(device), torch.full((4,), -100).to(device)
    loss, grad, _ = run(z, y, 0.5, distance="uniform", backend=gpu_backend)
    assert loss.isnan()  # as F.cross_entropy
    assert not grad.any()


@SHAPES
def test_nan_stays_in_its_row(shape: tuple[int, int], device: torch.device, gpu_backend: str) -> None:
    rows, classes = shape
    z, y = random_logits(rows, classes), random_labels(rows, classes=classes)
    z[1, classes - 1] = torch.nan
    loss, grad, _ = run(z.to(device), y.to(device), 0.5, distance="uniform", reduction="none", backend=gpu_backend)
    assert loss.isnan().nonzero().flatten().tolist() == [1]
    assert grad.isnan().any(1).nonzero().flatten().tolist() == [1]
