"""The reference as an operator, so that C++ autograd can call it for second derivatives.

Relies on `reference` and `spec`; csrc/ops.cpp finds the operator by name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import Library

from . import reference
from .spec import spec_of_codes

_library: Any = Library("drsl_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "reference_loss(Tensor logits, Tensor y, Tensor? weight, Tensor? margins, Tensor? tau, float tau_value, int truth, "
    "float q, int distance, float scale, float margin, int ignore_index, int reduction, float label_smoothing, "
    "bool soft, float threshold, int activation) -> Tensor"
)


def _reference_loss(
    logits: Tensor,
    y: Tensor,
    weight: Tensor | None,
    margins: Tensor | None,
    tau: Tensor | None,
    tau_value: float,
    *codes: Any,
) -> Tensor:
    spec = spec_of_codes(*codes)
    loss, _ = reference.softmax_loss(logits, y, tau_value if tau is None else tau, weight, spec, margins=margins)
    return loss


_library.impl("reference_loss", _reference_loss, "CompositeImplicitAutograd")
