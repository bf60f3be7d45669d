"""Members of the family by their names: thin functions over `softmax_loss`, and their `nn.Module` twins.

Relies on `functional` and `spec`.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, overload

from torch import Tensor, nn
from typing_extensions import Unpack

from .checks import check_margin_alone, check_tau_value, check_weight_alone
from .functional import softmax_loss
from .spec import Activation, BackendName, Distance, LossStats, Reduction, check_backend_name, loss_spec

__all__ = ["GCELoss", "ISCELoss", "LogOddsLoss", "MAELoss", "gce_loss", "isce_loss", "log_odds_loss", "mae_loss"]


class Common(TypedDict, total=False):
    """The arguments that all members share, with the meaning and the defaults that they have in `softmax_loss`."""

    distance: Distance | None
    tau: Tensor | float
    weight: Tensor | None
    ignore_index: int
    reduction: Reduction
    activation: Activation
    backend: BackendName | None


@overload
def gce_loss(
    logits: Tensor,
    y: Tensor,
    q: float = ...,
    *,
    threshold: float = ...,
    return_stats: Literal[False] = ...,
    **common: Unpack[Common],
) -> Tensor: ...
@overload
def gce_loss(
    logits: Tensor,
    y: Tensor,
    q: float = ...,
    *,
    threshold: float = ...,
    return_stats: Literal[True],
    **common: Unpack[Common],
) -> tuple[Tensor, LossStats]: ...
def gce_loss(
    logits: Tensor,
    y: Tensor,
    q: float = 0.7,
    *,
    threshold: float = 0.0,
    return_stats: bool = False,
    **common: Unpack[Common],
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Generalized cross-entropy: between cross-entropy (q -> 0) and the mean absolute error (q = 1), for noisy labels.

    .. math:: T = \frac{1 - \max(p_y, k)^q}{q}

    Its gradient is that of cross-entropy times :math:`p_y^q`: labels that the model finds unlikely weigh less, and at
    p_y = 0 the gradient is 0 and finite. With a threshold k the loss is the truncated one: labels less likely than k
    have a constant loss, (1 - k^q) / q, and no gradient. Their rows still count in the mean.

    Args:
        q: in (0, 1] (no less than 1e-30). At 1 the loss is half of `mae_loss`.
        threshold: k, in [0, 1); 0 for the loss without truncation. The paper trains with 0.5.

    The other arguments (`distance`, `tau`, `weight`, `ignore_index`, `reduction`, `activation`, `return_stats`,
    `backend`), the result and the errors are those of `softmax_loss`.

    Source: Zhang & Sabuncu, NeurIPS 2018, arXiv 1805.07836, equations 6 and 9.
    """
    return softmax_loss(logits, y, truth="gce", q=q, threshold=threshold, return_stats=return_stats, **common)


@overload
def mae_loss(logits: Tensor, y: Tensor, *, return_stats: Literal[False] = ..., **common: Unpack[Common]) -> Tensor: ...
@overload
def mae_loss(
    logits: Tensor, y: Tensor, *, return_stats: Literal[True], **common: Unpack[Common]
) -> tuple[Tensor, LossStats]: ...
def mae_loss(
    logits: Tensor, y: Tensor, *, return_stats: bool = False, **common: Unpack[Common]
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Mean absolute error of the softmax against the one-hot label, summed over the classes.

    .. math:: T = \sum_k |p_k - [k = y]| = 2 (1 - p_y)

    The arguments, the result and the errors are those of `softmax_loss`.

    Source: Ghosh et al., AAAI 2017, arXiv 1712.09482.
    """
    return softmax_loss(logits, y, truth="mae", return_stats=return_stats, **common)


@overload
def isce_loss(
    logits: Tensor,
    y: Tensor,
    margin: Tensor | float,
    scale: float = ...,
    *,
    label_smoothing: float = ...,
    return_stats: Literal[False] = ...,
    **common: Unpack[Common],
) -> Tensor: ...
@overload
def isce_loss(
    logits: Tensor,
    y: Tensor,
    margin: Tensor | float,
    scale: float = ...,
    *,
    label_smoothing: float = ...,
    return_stats: Literal[True],
    **common: Unpack[Common],
) -> tuple[Tensor, LossStats]: ...
def isce_loss(
    logits: Tensor,
    y: Tensor,
    margin: Tensor | float,
    scale: float = 1.0,
    *,
    label_smoothing: float = 0.0,
    return_stats: bool = False,
    **common: Unpack[Common],
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Cross-entropy with a margin: the label's logit must stand out by m before it counts.

    .. math:: T = -\log \frac{e^{s z_y - m}}{e^{s z_y - m} + \sum_{k \ne y} e^{z_k}}

    This is this project's reading of I-SCE ("a margin-like inference information" added to the softmax cross-entropy):
    its published formula was not available, and the margin form is taken from its abstract. The known relative is
    AM-softmax (Wang et al., arXiv 1801.05599), which subtracts the margin from the cosine of the label. With margins
    that depend on the class it is the loss of LDAM (Cao et al., arXiv 1906.07413).

    Args:
        margin: m, a number or one per class, of shape (C,), of which each row takes that of its label. No gradient
            flows to it.
        scale: s > 0, multiplies the label's logit alone.
        label_smoothing: in [0, 1], as in `F.cross_entropy`, of the logits with the margin.

    The other arguments, the result and the errors are those of `softmax_loss`.
    """
    return softmax_loss(
        logits, y, margin=margin, scale=scale, label_smoothing=label_smoothing, return_stats=return_stats, **common
    )


@overload
def log_odds_loss(
    logits: Tensor, y: Tensor, *, return_stats: Literal[False] = ..., **common: Unpack[Common]
) -> Tensor: ...
@overload
def log_odds_loss(
    logits: Tensor, y: Tensor, *, return_stats: Literal[True], **common: Unpack[Common]
) -> tuple[Tensor, LossStats]: ...
def log_odds_loss(
    logits: Tensor, y: Tensor, *, return_stats: bool = False, **common: Unpack[Common]
) -> Tensor | tuple[Tensor, LossStats]:
    r"""How much likelier all wrong classes together are than the label, in logarithm: the loss to attack with.

    .. math:: T = \log \frac{1 - p_y}{p_y} = \log \sum_{k \ne y} e^{z_k} - z_y

    Its gradient points where that of cross-entropy points and never vanishes, however sure the model is. The
    arguments, the result and the errors are those of `softmax_loss`.
    """
    return softmax_loss(logits, y, truth="log_odds", return_stats=return_stats, **common)


class _Member(nn.Module):
    """What the modules share: the common arguments, checked at construction, tensors among them as buffers."""

    tau: Tensor | float
    weight: Tensor | None

    def __init__(self, truth: str, own: dict[str, Any], common: Common) -> None:
        super().__init__()
        arguments: dict[str, Any] = {**own, **common}
        unknown = arguments.keys() - own.keys() - Common.__annotations__.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} got an unexpected argument {min(unknown)!r}")
        tensors = ("tau", "weight", "margin")
        numbers = {k: v for k, v in arguments.items() if not (isinstance(v, Tensor) and k in tensors)}
        _check_numbers(truth, numbers)
        check_tau_value(arguments.get("tau", 0.0))
        if arguments.get("weight") is not None:
            check_weight_alone(arguments["weight"])
        if isinstance(arguments.get("margin"), Tensor):
            check_margin_alone(arguments["margin"])
        self.truth = truth
        self.shown = tuple(arguments)
        for name, value in arguments.items():
            if isinstance(value, nn.Parameter) and name == "tau":
                self.register_parameter(name, value)
            elif isinstance(value, Tensor):
                self.register_buffer(name, value.detach())  # no gradient flows to weights and margins of classes
            else:
                setattr(self, name, value)

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of `logits` against class indices `y`."""
        arguments: dict[str, Any] = {name: getattr(self, name) for name in self.shown}
        loss: Tensor = softmax_loss(logits, y, truth=self.truth, **arguments)  # type: ignore[call-overload]
        return loss

    def extra_repr(self) -> str:
        """The arguments that were given, and the loss's own."""
        values = [(name, getattr(self, name)) for name in self.shown]
        return ", ".join(
            f"{name}=tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{name}={value!r}"
            for name, value in values
        )


def _check_numbers(truth: str, numbers: dict[str, Any]) -> None:
    loss_spec(
        truth,
        numbers.get("q", 0.7),
        numbers.get("distance"),
        numbers.get("scale", 1.0),
        numbers.get("margin", 0.0),
        numbers.get("ignore_index", -100),
        numbers.get("reduction", "mean"),
        numbers.get("label_smoothing", 0.0),
        numbers.get("threshold", 0.0),
        numbers.get("activation", "softmax"),
    )
    check_backend_name("backend", numbers.get("backend"))


class GCELoss(_Member):
    """Generalized cross-entropy as a module: the arguments are those of `drsl_kernels.gce_loss`."""

    def __init__(self, q: float = 0.7, *, threshold: float = 0.0, **common: Unpack[Common]) -> None:
        super().__init__("gce", {"q": q, "threshold": threshold}, common)


class MAELoss(_Member):
    """Mean absolute error of the softmax as a module: the arguments are those of `drsl_kernels.mae_loss`."""

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__("mae", {}, common)


class ISCELoss(_Member):
    """Cross-entropy with a margin as a module: the arguments are those of `drsl_kernels.isce_loss`."""

    def __init__(
        self, margin: Tensor | float, scale: float = 1.0, *, label_smoothing: float = 0.0, **common: Unpack[Common]
    ) -> None:
        super().__init__("ce", {"margin": margin, "scale": scale, "label_smoothing": label_smoothing}, common)


class LogOddsLoss(_Member):
    """The log-odds against the label as a module: the arguments are those of `drsl_kernels.log_odds_loss`."""

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__("log_odds", {}, common)
