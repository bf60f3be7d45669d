"""`nn.Module` twins of the public functions, to put where `nn.CrossEntropyLoss` stood.

Relies on `functional` and `linear`.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn._reduction import legacy_get_string

from .checks import check_tau_value, check_weight_alone
from .functional import fused_drsl_loss
from .linear import check_layer_numbers, fused_linear_drsl_loss
from .spec import BackendName, Distance, Reduction, check_backend_name, loss_spec

__all__ = ["DRSLLoss", "FusedLinearDRSLLoss"]


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
        _register_tau(self, tau)
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
        return _shown(self, {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0, "backend": None})


class FusedLinearDRSLLoss(nn.Module):
    """`drsl_kernels.fused_linear_drsl_loss` as a module, called with hidden, weight and y.

    The layer's weight is an argument of the call, so that the layer may stay where it is in a model: ``loss_fn(hidden,
    model.lm_head.weight, labels)``. All other arguments are checked at construction. `class_weight` is a buffer, and so
    is a `tau` given as a tensor (a parameter if it is an `nn.Parameter`). Classes that are spread over a group of
    processes, and statistics, are for the function.

    Args:
        tau, class_weight, distance, ignore_index, reduction, label_smoothing: as in `fused_linear_drsl_loss`.
        logit_scale, softcap, memory_budget, backend: as in `fused_linear_drsl_loss`.

    Raises:
        ValueError, TypeError, RuntimeError: as `fused_linear_drsl_loss`.
    """

    class_weight: Tensor | None
    tau: Tensor | float

    def __init__(
        self,
        tau: Tensor | float,
        class_weight: Tensor | None = None,
        *,
        distance: Distance = "uniform",
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        memory_budget: int | None = None,
        backend: BackendName | None = None,
    ) -> None:
        super().__init__()
        loss_spec("ce", 0.7, distance, 1.0, 0.0, ignore_index, reduction, label_smoothing)
        check_tau_value(tau)
        if class_weight is not None:
            check_weight_alone(class_weight, "class_weight")
        check_backend_name("backend", backend)
        _register_tau(self, tau)
        self.register_buffer("class_weight", class_weight)
        self.distance = distance
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale, self.softcap, self.memory_budget = check_layer_numbers(logit_scale, softcap, memory_budget)
        self.backend = backend

    def forward(self, hidden: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
        """The loss of hidden (..., H) against class indices y (...), as in `fused_linear_drsl_loss`."""
        return fused_linear_drsl_loss(
            hidden,
            weight,
            y,
            self.tau,
            bias=bias,
            distance=self.distance,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            memory_budget=self.memory_budget,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, and tau."""
        layer = {"logit_scale": 1.0, "softcap": None, "memory_budget": None}
        return _shown(
            self, {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0, **layer, "backend": None}
        )


def _register_tau(module: nn.Module, tau: Tensor | float) -> None:
    if isinstance(tau, nn.Parameter):
        module.register_parameter("tau", tau)
    elif isinstance(tau, Tensor):
        module.register_buffer("tau", tau)
    else:
        module.tau = tau  # type: ignore[assignment]


def _shown(module: DRSLLoss | FusedLinearDRSLLoss, defaults: dict[str, object]) -> str:
    tau: object = module.tau
    if isinstance(tau, Tensor):
        readable = tau.dim() == 0 and not tau.is_meta
        tau = f"{tau.item():.6g}" if readable else f"tensor of shape {tuple(tau.shape)}"
    shown = [f"tau={tau}", f"distance={module.distance!r}"]
    shown += [f"{name}={value!r}" for name, d in defaults.items() if (value := getattr(module, name)) != d]
    return ", ".join(shown)
