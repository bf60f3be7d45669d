"""Bad input: each error names the argument, the value it had and what would be right, on both backends alike; and
the error types are those of F.cross_entropy wherever it has the same condition.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import random_labels, random_logits
from truth import DISTANCES, TRUTHS

from drsl_kernels import DRSLLoss, fused_drsl_loss, softmax_loss

# The checks are the same for all.
pytestmark = pytest.mark.backends("cpp", "reference")

NAN, INF = math.nan, math.inf
ROWS, CLASSES = 4, 5

# arguments of softmax_loss that differ from a valid call -> error type, and what its message says
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "tau_nan": ({"tau": NAN}, ValueError, "tau must be finite, got nan"),
    "tau_inf": ({"tau": INF}, ValueError, "tau must be finite, got inf"),
    "tau_tensor_nan": ({"tau": torch.tensor(NAN)}, ValueError, "tau must be finite, got nan"),
    "tau_rows_inf": ({"tau": torch.tensor([0.0, 1.0, -INF, NAN])}, ValueError, "tau must be finite, got -inf"),
    "tau_shape": (
        {"tau": torch.zeros(CLASSES)},
        ValueError,
        r"tau must have shape \(\) or that of y, \(4,\), got \(5,\)",
    ),
    "tau_one_element": ({"tau": torch.zeros(1)}, ValueError, r"tau must have shape .*, got \(1,\)"),
    "tau_matrix": ({"tau": torch.zeros(ROWS, 1)}, ValueError, r"tau must have shape .*, got \(4, 1\)"),
    "tau_integer_tensor": ({"tau": torch.tensor(1)}, TypeError, "tau must be of a floating dtype, got torch.int64"),
    "tau_complex": ({"tau": torch.tensor(1j)}, TypeError, "tau must be of a floating dtype, got torch.complex64"),
    "tau_sparse": ({"tau": torch.zeros(ROWS).to_sparse()}, TypeError, "tau must be a dense tensor, got a torch.sparse"),
    "y_complex": (
        {"y": torch.zeros(ROWS, CLASSES, dtype=torch.complex64)},
        RuntimeError,
        "y must hold class indices .*, got torch.complex64",
    ),
    "tau_string": ({"tau": "0.5"}, TypeError, "tau must be a number, got '0.5'"),
    "tau_none": ({"tau": None}, TypeError, "tau must be a number, got None"),
    "tau_list": ({"tau": [0.1] * ROWS}, TypeError, r"tau must be a number, got \[0.1"),
    "tau_complex_number": ({"tau": 1j}, TypeError, "tau must be a number, got 1j"),
    "tau_on_meta": ({"tau": torch.zeros(ROWS, device="meta")}, RuntimeError, "tau must be on .*cpu, got meta"),
    "distance": ({"distance": "manhattan"}, ValueError, "distance must be one of 'uniform', .*, got 'manhattan'"),
    "truth": ({"truth": "hinge"}, ValueError, "truth must be one of 'ce', 'gce', 'mae', 'log_odds', got 'hinge'"),
    "truth_none": ({"truth": None}, ValueError, "truth must be one of .*, got None"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
    "reduction_list": ({"reduction": ["mean"]}, ValueError, r"reduction must be one of .*, got \['mean'\]"),
    "reduction_none": ({"reduction": None}, ValueError, "reduction must be one of .*, got None"),
    "backend": ({"backend": "numpy"}, ValueError, "backend must be .*one of 'cpp', .*, got 'numpy'"),
    "backend_cuda": ({"backend": "cuda"}, RuntimeError, "backend='cuda' is not usable: .+"),
    "q_zero": ({"q": 0.0}, ValueError, r"q must be in \[1e-30, 1\], got 0.0"),
    "q_above_1": ({"q": 1.01}, ValueError, r"q must be in \[1e-30, 1\], got 1.01"),
    "q_negative": ({"q": -0.5}, ValueError, r"q must be in \[1e-30, 1\], got -0.5"),
    "q_nan": ({"q": NAN}, ValueError, r"q must be in \[1e-30, 1\], got nan"),
    "scale_zero": ({"scale": 0.0}, ValueError, "scale must be positive and finite, got 0.0"),
    "scale_negative": ({"scale": -1.0}, ValueError, "scale must be positive and finite, got -1.0"),
    "scale_inf": ({"scale": INF}, ValueError, "scale must be positive and finite, got inf"),
    "scale_nan": ({"scale": NAN}, ValueError, "scale must be positive and finite, got nan"),
    "margin_inf": ({"margin": -INF}, ValueError, "margin must be finite, got -inf"),
    "margin_nan": ({"margin": NAN}, ValueError, "margin must be finite, got nan"),
    "ignore_index_float": ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got 1.0"),
    "ignore_index_bool": ({"ignore_index": True}, TypeError, "ignore_index must be an int, got True"),
    "ignore_index_none": ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
    "smoothing_above_1": ({"label_smoothing": 1.5}, RuntimeError, "label_smoothing must be between .*, got 1.5"),
    "smoothing_negative": ({"label_smoothing": -0.1}, RuntimeError, "label_smoothing must be between .*, got -0.1"),
    "smoothing_nan": ({"label_smoothing": NAN}, RuntimeError, "label_smoothing must be between .*, got nan"),
    "smoothing_of_gce": (
        {"label_smoothing": 0.1, "truth": "gce"},
        ValueError,
        "label_smoothing must be 0 with truth='gce' .*, got 0.1",
    ),
    "smoothing_of_log_odds": ({"label_smoothing": 0.1, "truth": "log_odds"}, ValueError, "label_smoothing must be 0"),
    "weight_shape": ({"weight": torch.ones(3)}, RuntimeError, r"weight must have shape \(C,\) = \(5,\), got \(3,\)"),
    "weight_scalar": ({"weight": torch.tensor(1.0)}, RuntimeError, r"weight must have shape .*, got \(\)"),
    "weight_integer": (
        {"weight": torch.ones(CLASSES, dtype=torch.long)},
        RuntimeError,
        "weight must be of a floating dtype, got torch.int64",
    ),
    "weight_list": ({"weight": [1.0] * CLASSES}, TypeError, "weight must be a Tensor, got list"),
    "weight_on_meta": (
        {"weight": torch.ones(CLASSES, device="meta")},
        RuntimeError,
        "weight must be on the device of logits, cpu, got meta",
    ),
    "y_batch": (
        {"y": random_labels(3, classes=5)},
        ValueError,
        r"y must have shape \(4,\) for logits of shape \(4, 5\), got \(3,\)",
    ),
    "y_empty": ({"y": random_labels(0, classes=5)}, ValueError, r"y must have shape \(4,\) .*, got \(0,\)"),
    "y_scalar": ({"y": torch.tensor(1)}, ValueError, r"y must have shape \(4,\) .*, got \(\)"),
    "y_more_dimensions": (
        {"y": random_labels(4, 1, classes=5)},
        RuntimeError,
        r"y must have shape \(4,\) .*, got \(4, 1\)",
    ),
    "y_int32": ({"y": torch.zeros(4, dtype=torch.int32)}, RuntimeError, "y must hold .* int64, .*, got torch.int32"),
    "y_bool": ({"y": torch.zeros(4, dtype=torch.bool)}, RuntimeError, "y must hold .* int64, .*, got torch.bool"),
    "y_float": ({"y": torch.zeros(4)}, RuntimeError, "y must have the shape of logits, .* probabilities, got .4,."),
    "y_list": ({"y": [0, 1, 2, 3]}, TypeError, "y must be a Tensor, got list"),
    "y_none": ({"y": None}, TypeError, "y must be a Tensor, got NoneType"),
    "y_on_meta": (
        {"y": torch.zeros(4, dtype=torch.long, device="meta")},
        RuntimeError,
        "y must be on the device of logits, cpu, got meta",
    ),
    "y_out_of_range": (
        {"y": torch.tensor([0, 1, 5, 7])},
        IndexError,
        r"y holds label 5 at row 2, outside \[0, C\) = \[0, 5\)",
    ),
    "y_negative": ({"y": torch.tensor([0, -3, 5, 7])}, IndexError, "y holds label -3 at row 1"),
    "logits_integer": (
        {"logits": torch.ones(4, 5, dtype=torch.long)},
        NotImplementedError,
        "logits must be float32, float64, bfloat16 or float16, got torch.int64",
    ),
    "logits_complex": (
        {"logits": torch.ones(4, 5, dtype=torch.complex64)},
        NotImplementedError,
        "logits must be float32, .*, got torch.complex64",
    ),
    "logits_list": ({"logits": [[0.0] * 5] * 4}, TypeError, "logits must be a Tensor, got list"),
    "logits_none": ({"logits": None}, TypeError, "logits must be a Tensor, got NoneType"),
    "logits_scalar": (
        {"logits": torch.tensor(1.0), "y": torch.tensor(0)},
        RuntimeError,
        r"logits must have shape \(C,\), \(N, C\) or \(N, C, d1, ...\), got \(\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_message_and_type(case: str, backend: str) -> None:
    changes, error, message = BAD[case]
    arguments = {"logits": random_logits(ROWS, CLASSES), "y": random_labels(ROWS, classes=CLASSES), "tau": 0.5}
    arguments |= {"distance": "uniform", "backend": backend} | changes
    with pytest.raises(error, match=message) as caught:
        softmax_loss(**arguments)
    assert type(caught.value) is error


@pytest.mark.parametrize("case", BAD)
def test_message_and_type_with_the_backend_left_open(case: str) -> None:
    changes, error, message = BAD[case]
    arguments = {"logits": random_logits(ROWS, CLASSES), "y": random_labels(ROWS, classes=CLASSES), "tau": 0.5}
    with pytest.raises(error, match=message):
        softmax_loss(**(arguments | {"distance": "uniform"} | changes))


def test_true_is_no_ignore_index_even_after_one(backend: str) -> None:
    z, y = random_logits(ROWS, CLASSES), random_labels(ROWS, classes=CLASSES)
    softmax_loss(z, y, ignore_index=1, backend=backend)
    with pytest.raises(TypeError, match="ignore_index must be an int, got True"):
        softmax_loss(z, y, ignore_index=True, backend=backend)


def test_row_of_a_wrong_label_in_an_image(backend: str) -> None:
    y = torch.zeros(2, 3, 4, dtype=torch.long)
    y[1, 2, 3] = 9
    with pytest.raises(IndexError, match="y holds label 9 at row 23, "):
        fused_drsl_loss(random_logits(2, 5, 3, 4), y, 0.5, backend=backend)


def test_forced_cpp_needs_tensors_on_the_cpu() -> None:
    z, y = torch.empty(4, 5, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    with pytest.raises(RuntimeError, match="backend='cpp' needs logits on the CPU, got meta"):
        fused_drsl_loss(z, y, 0.5, backend="cpp")


def test_keyword_only_and_required_arguments() -> None:
    z, y = random_logits(ROWS, CLASSES), random_labels(ROWS, classes=CLASSES)
    with pytest.raises(TypeError, match="tau"):
        fused_drsl_loss(z, y)
    with pytest.raises(TypeError, match="positional"):
        fused_drsl_loss(z, y, 0.5, "kl")


@pytest.mark.parametrize("name", ["distance", "truth"])
def test_the_message_lists_every_name(name: str) -> None:
    with pytest.raises(ValueError, match="must be one of") as caught:
        softmax_loss(random_logits(ROWS, CLASSES), random_labels(ROWS, classes=CLASSES), **{name: "?"})
    for known in DISTANCES if name == "distance" else TRUTHS:
        assert repr(known) in str(caught.value)


def test_a_refused_call_leaves_the_logits_alone(backend: str) -> None:
    z = random_logits(ROWS, CLASSES).requires_grad_()
    before = z.detach().clone()
    with pytest.raises(IndexError):
        fused_drsl_loss(z, torch.tensor([0, 1, 2, 99]), 0.5, backend=backend)
    assert torch.equal(z, before)
    assert z.grad is None


MODULE_CASES = ["distance", "reduction", "smoothing_above_1", "ignore_index_float", "tau_nan", "tau_string", "backend"]


@pytest.mark.parametrize("case", MODULE_CASES)
def test_the_module_refuses_at_construction(case: str) -> None:
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        DRSLLoss(**({"tau": 0.5} | changes))


# --- the same types as F.cross_entropy --------------------------------------------------------------------------------


def shapes(*pairs: tuple[tuple[int, ...], tuple[int, ...]]) -> dict[str, Any]:
    return {
        f"shape_{z}_{y}".replace(" ", ""): {"logits": torch.zeros(z), "y": torch.zeros(y, dtype=torch.long)}
        for z, y in pairs
    }


PARITY: dict[str, dict[str, Any]] = {
    "wrong_batch": {"y": torch.zeros(3, dtype=torch.long)},
    "int32_target": {"y": torch.zeros(4, dtype=torch.int32)},
    "int16_target": {"y": torch.zeros(4, dtype=torch.int16)},
    "bool_target": {"y": torch.zeros(4, dtype=torch.bool)},
    "float_target_of_labels": {"y": torch.zeros(4)},
    "label_at_c": {"y": torch.tensor([0, 1, 5, 2])},
    "label_minus_one": {"y": torch.tensor([0, 1, -1, 2])},
    "label_far_out": {"y": torch.tensor([0, 1, 2**40, 2])},
    "reduction_unknown": {"reduction": "average"},
    "smoothing_above_1": {"label_smoothing": 1.5},
    "weight_too_long": {"weight": torch.ones(6)},
    "weight_too_short": {"weight": torch.ones(4)},
    "integer_logits": {"logits": torch.zeros(4, 5, dtype=torch.long)},
    "bool_logits": {"logits": torch.zeros(4, 5, dtype=torch.bool)},
    "complex_logits": {"logits": torch.zeros(4, 5, dtype=torch.complex64)},
    "scalar_logits": {"logits": torch.tensor(1.0), "y": torch.tensor(0)},
    "logits_list": {"logits": [[0.0] * 5] * 4},
    "logits_none": {"logits": None},
    "target_list": {"y": [0, 1, 2, 3]},
    "target_none": {"y": None},
    "target_int": {"y": 1},
    "weight_list": {"weight": [1.0] * 5},
    "label_without_classes": {"logits": torch.zeros(2, 0), "y": torch.tensor([0, 0])},
    **shapes(
        ((4, 5), ()),
        ((4, 5), (4, 1)),
        ((4, 5), (3, 1)),
        ((5,), (2,)),
        ((5,), (0,)),
        ((4, 5, 3), (4,)),
        ((4, 5, 3), (3, 3)),
        ((4, 5, 3), (4, 2)),
        ((4, 5, 3), (4, 3, 1)),
        ((4, 5, 3, 2), (4, 2, 3)),
        ((4, 5, 3, 2), (4, 3)),
        ((4, 5, 3, 2), (3, 3, 2)),
        ((4, 5, 3, 2, 2), (4, 3, 2)),
        ((4, 5, 3, 2, 2), (4, 2, 3, 2)),
        ((0, 5), (1,)),
        ((0, 5, 2), (0, 3)),
    ),
}


@pytest.mark.parametrize("case", PARITY)
def test_types_are_those_of_cross_entropy(case: str, backend: str) -> None:
    arguments = {"logits": random_logits(ROWS, CLASSES), "y": random_labels(ROWS, classes=CLASSES)} | PARITY[case]
    logits, y = arguments.pop("logits"), arguments.pop("y")
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.cross_entropy(logits, y, **arguments)
    with pytest.raises(theirs.type) as ours:
        fused_drsl_loss(logits, y, 0.0, backend=backend, **arguments)
    assert ours.type is theirs.type
