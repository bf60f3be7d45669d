"""`nn.Module` twins of the public functions, to put where `nn.CrossEntropyLoss` stood.

Relies on `functional`.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn._reduction import legacy_get_string

from .checks import check_tau_value, check_weight_alone
from .functional import fused_drsl_loss
from .spec import BackendName, Distance, Reduction, check_backend_name, loss_spec

__all__ = ["DRSLLoss"]


class DRSLLoss(nn.Module):
    """Cross-entropy plus tau times the distance of the softmax from uniform, as a module.

    Takes the arguments of `nn.CrossEntropyLoss` behind `tau`. They mean what they mean in
    `drsl_kernels.fused_drsl_loss`, and are checked at construction. `weight` is a buffer, and so is a `tau` given as a
    tensor (a parameter if it is an `nn.Parameter`): they follow `.to(device)` and appear in the state dict.

    Args:
        tau, weight, distance, ignore_index, reduction, label_smoothing, backend: as in `fused_drsl_loss`.
        size_average, reduce: deprecated, as in `nn.CrossEntropyLoss`. Where one of them is given, they decide instead
            of `reduction`, with a warning: "none" for reduce=False, else "sum" for size_average=False, else "mean".

    Raises:
        ValueError, TypeError, RuntimeError: as `fused_drsl_loss`.
    """

    weight: Tensor | None
    tau: Tensor | float

    def __init__(
        self,
        tau: Tensor | float,
        weight: Tensor | None = None,
        *,
        distance: Distance = "uniform",
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        size_average: bool | None = None,
        reduce: bool | None = None,
        backend: BackendName | None = None,
    ) -> None:
        super().__init__()
        if size_average is not None or reduce is not None:
            reduction = cast(Reduction, legacy_get_string(size_average, reduce))
        loss_spec("ce", 0.7, distance, 1.0, 0.0, ignore_index, reduction, label_smoothing)
        check_tau_value(tau)
        if weight is not None:
            check_weight_alone(weight)
        check_backend_name("backend", backend)
        if isinstance(tau, nn.Parameter):
            self.register_parameter("tau", tau)
        elif isinstance(tau, Tensor):
            self.register_buffer("tau", tau)
        else:
            self.tau = tau
        self.register_buffer("weight", weight)
        self.distance = distance
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.backend = backend

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of `logits` against class indices or class probabilities `y`, as in `fused_drsl_loss`."""
        return fused_drsl_loss(
            logits,
            y,
            self.tau,
            distance=self.distance,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, and tau."""
        tau: object = self.tau
        if isinstance(tau, Tensor):
            readable = tau.dim() == 0 and not tau.is_meta
            tau = f"{tau.item():.6g}" if readable else f"tensor of shape {tuple(tau.shape)}"
        shown = [f"tau={tau}", f"distance={self.distance!r}"]
        defaults = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0, "backend": None}
        shown += [f"{name}={value!r}" for name, d in defaults.items() if (value := getattr(self, name)) != d]
        return ", ".join(shown)
