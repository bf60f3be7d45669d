"""Arguments of the wrong kind: the error names the argument and what it was. NumPy numbers are numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from drsl_kernels import DRSLLoss, fused_drsl_loss, softmax_loss

# The checks are the same for all.
pytestmark = pytest.mark.backends("cpp", "reference")

Z, Y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tau": "1"}, TypeError, "tau must be a number, got '1'"),
    ({"tau": True}, TypeError, "tau must be a number, got True"),
    ({"tau": None}, TypeError, "tau must be a number, got None"),
    ({"tau": 10**400}, ValueError, "tau must fit in a float"),
    ({"label_smoothing": "x"}, TypeError, "label_smoothing must be a number, got 'x'"),
    ({"q": None}, TypeError, "q must be a number, got None"),
    ({"q": 1e-50}, ValueError, r"q must be in \[1e-30, 1\], got 1e-50"),
    ({"scale": [1.0]}, TypeError, r"scale must be a number, got \[1.0\]"),
    ({"margin": None}, TypeError, "margin must be a number, got None"),
    ({"margin": 10**400}, ValueError, "margin must fit in a float"),
    ({"ignore_index": 2**70}, ValueError, "ignore_index must fit in 64 bits"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got 1.0"),
    ({"distance": np.array(["kl"])}, ValueError, "distance must be one of .*, got array"),
    ({"distance": ["kl"]}, ValueError, r"distance must be one of .*, got \['kl'\]"),
    ({"return_stats": "no"}, TypeError, "return_stats must be a bool, got 'no'"),
    ({"weight": [1.0] * 5}, TypeError, "weight must be a Tensor, got list"),
    ({"weight": torch.ones(5).to_sparse()}, TypeError, "weight must be a dense tensor"),
]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=[str(w[0])[:40] for w in WRONG])
def test_wrong_kind(arguments: dict[str, Any], error: type[Exception], message: str, backend: Any) -> None:
    with pytest.raises(error, match=message):
        softmax_loss(Z, Y, **{"distance": "kl", "tau": 0.1, "backend": backend, **arguments})


def test_no_distance_is_for_softmax_loss() -> None:
    with pytest.raises(ValueError, match=r"distance must be one of .*, got None"):
        fused_drsl_loss(Z, Y, 0.1, distance=None)  # type: ignore[call-overload]


@pytest.mark.parametrize("layout", ["sparse", "nested"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_only_dense(layout: str, backend: Any) -> None:
    z = Z.to_sparse() if layout == "sparse" else torch.nested.nested_tensor([Z[0], Z[1]])
    with pytest.raises(TypeError, match="logits must be a dense tensor"):
        fused_drsl_loss(z, Y, 0.1, backend=backend)
    with pytest.raises(TypeError, match="y must be a dense tensor"):
        fused_drsl_loss(Z, Y.to_sparse(), 0.1, backend=backend)


@pytest.mark.parametrize("weight", [[1.0], torch.ones(3, 3), torch.ones(3, dtype=torch.int64)], ids=repr)
def test_module_checks_its_weight(weight: Any) -> None:
    with pytest.raises((TypeError, RuntimeError), match="weight must"):
        DRSLLoss(0.1, weight=weight)


@pytest.mark.parametrize("tau", [np.float32(0.5), np.float64(0.5), np.int64(1), 1])
def test_numbers_of_numpy(tau: Any) -> None:
    expected = fused_drsl_loss(Z, Y, float(tau))
    assert fused_drsl_loss(Z, Y, tau) == expected
    assert DRSLLoss(tau)(Z, Y) == expected


def test_ignore_index_of_numpy() -> None:
    assert fused_drsl_loss(Z, Y, 0.1, ignore_index=np.int64(2)) == fused_drsl_loss(Z, Y, 0.1, ignore_index=2)
    assert DRSLLoss(0.1, ignore_index=np.int64(2))(Z, Y) == fused_drsl_loss(Z, Y, 0.1, ignore_index=2)


def test_tau_beyond_float32() -> None:
    """A finite tau that float32 cannot hold gives an infinite loss, per row as for all rows."""
    for tau in (1e300, torch.tensor(1e300, dtype=torch.float64), torch.full((4,), 1e300, dtype=torch.float64)):
        assert fused_drsl_loss(Z, Y, tau).isinf()
