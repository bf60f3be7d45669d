"""Heads that stand in the place of a classifier's last linear layer: classes as Gaussians in the space of features.

`GaussianMixtureHead` is the Gaussian-mixture head of Wan et al. (CVPR 2018), `gaussian_mixture_loss` the loss that goes
with it. Relies on `functional`; `robustness` relies on it.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from .functional import softmax_loss
from .spec import BackendName, Distance, Reduction, integer, number

__all__ = ["COVARIANCES", "Covariance", "GaussianMixtureHead", "gaussian_mixture_loss"]

Covariance: TypeAlias = Literal["identity", "diagonal"]
COVARIANCES: Final[tuple[str, ...]] = get_args(Covariance)


class GaussianMixtureHead(nn.Module):
    r"""Logits of classes that are Gaussians, each with a learnable mean and, if wanted, a diagonal covariance.

    .. math:: z_k = -d_k - \tfrac{1}{2} \log |\Lambda_k|, \qquad
              d_k = \tfrac{1}{2} (f - \mu_k)^T \Lambda_k^{-1} (f - \mu_k)

    It takes the place of a classifier's last linear layer. With equal priors softmax(z) is the posterior of the
    classes; `loss` trains with a margin and a likelihood term, and `log_likelihood` tells how much a feature vector
    resembles those of training. Classes are predicted without a margin, by the largest z_k.

    With covariance "identity" :math:`\Lambda_k = I`, and the class with the largest logit is that of a linear layer
    with weights :math:`\mu_k` and biases :math:`-|\mu_k|^2 / 2`. With "diagonal" the variances of each class are

    .. math:: \Lambda_{k,jj} = v_0 + e^{s_{k,j}}

    with parameters s (`log_variances`) and the constant :math:`v_0` (`least_variance`), so that no class can collapse
    onto a point, where the density has no bound. At first all variances are 1.

    All distances come from one matrix product: the square is expanded around the mean of the means, from where features
    are near, and no tensor has more than N * max(C, 2D) or C * 2D values. In the product's rounding a distance may
    become less than 0; it is then 0, and its gradient is exact. Computed in float32, under autocast, too; in
    float64 where features or parameters are.

    Args:
        features: D, length of a feature vector; 1 or more.
        classes: C, number of classes; 1 or more.
        covariance: "identity" or "diagonal".
        least_variance: :math:`v_0`, in (0, 1); below it no variance of "diagonal" can fall.
        device, dtype: of the parameters.

    Attributes:
        means: (C, D); at first normal with variance 2 / D.
        log_variances: (C, D), s above; None for "identity".

    Raises:
        ValueError: an unknown covariance, or a number out of its range.
        TypeError: a number of a wrong type.

    Sources: Wan et al., arXiv 1803.02988, and arXiv 2011.09066 for its use against adversarial examples; first means
    and the bound from below as in the authors' code (WeitaoVan/L-GM-loss), where it is 1e-4, too.
    """

    means: Tensor
    log_variances: Tensor | None

    def __init__(
        self,
        features: int,
        classes: int,
        covariance: Covariance = "identity",
        *,
        least_variance: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("features", features), ("classes", classes)):
            if integer(name, value) < 1:
                raise ValueError(f"{name} must be 1 or more, got {value!r}")
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance must be one of {', '.join(map(repr, COVARIANCES))}, got {covariance!r}")
        if not 0 < number("least_variance", least_variance) < 1:
            raise ValueError(f"least_variance must be above 0 and below 1, got {least_variance!r}")
        self.features, self.classes, self.covariance = features, classes, covariance
        self.least_variance = least_variance
        self.means = nn.Parameter(torch.empty(classes, features, device=device, dtype=dtype))
        diagonal = nn.Parameter(torch.empty_like(self.means)) if covariance == "diagonal" else None
        self.register_parameter("log_variances", diagonal)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the means anew and set all variances to 1."""
        nn.init.normal_(self.means, std=math.sqrt(2 / self.features))
        if self.log_variances is not None:
            nn.init.constant_(self.log_variances, math.log1p(-self.least_variance))

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, D) -> logits (N, C), float64 where features or parameters are, else float32.

        With covariance "identity" no logit is above 0.

        Raises:
            ValueError: features of another shape.
        """
        wide = self._wide(features)
        with _full_precision(wide):
            scores, offset = self._scores(wide)
            logits = scores - offset
            # What a distance is below 0, by rounding; as a constant it leaves the gradients as they are.
            log_determinants = self._half_log_determinants(wide.dtype)
            below = logits if log_determinants is None else logits + log_determinants
            return logits - relu(below.detach())

    def log_likelihood(self, features: Tensor) -> Tensor:
        r"""How likely features (N, D) are under the mixture with equal priors, shape (N,); abnormal ones have less.

        .. math:: \log \frac{1}{C} \sum_k e^{z_k} = \log p(f) + \tfrac{D}{2} \log 2 \pi

        Classes that have become narrower than their Gaussians, as they can with identity covariance, leave a place
        between the means that is likelier than they are. Where that is so the largest logit, which is the
        log-likelihood under the predicted class alone, finds abnormal features better.
        """
        logits: Tensor = self(features)
        return logits.logsumexp(1) - math.log(self.classes)

    def loss(
        self,
        features: Tensor,
        y: Tensor,
        *,
        alpha: float,
        likelihood: float,
        distance: Distance | None = None,
        tau: Tensor | float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        backend: BackendName | None = None,
    ) -> Tensor:
        r"""Cross-entropy with a margin, plus the negative log-likelihood of the label's Gaussian; for training.

        .. math:: L = -\log p_y + \tau D + \lambda \left( d_y + \tfrac{1}{2} \log |\Lambda_y| \right), \qquad
                  p = \mathrm{softmax}(z - \alpha d_y e_y)

        The margin makes the label's distance, and not its determinant, 1 + alpha times as large. The label's distance
        is computed from the difference of feature and mean, and what is common to a row's logits is left out, so
        that the loss is precise close to a mean and for features far away from all.

        Args:
            features: (N, D), as in `forward`.
            y: classes, (N,), int64.
            alpha: margin, 0 or more. The authors let it grow in training: 0.1, after 1/24 of the steps 0.2, after
                2/24 of them 0.3.
            likelihood: weight lambda of the likelihood term, 0 or more. The authors' example for CIFAR-100 has 0.1.
            distance, tau: a distance of the softmax p, with the margin, as in `softmax_loss`.
            ignore_index, reduction, label_smoothing, backend: as in `softmax_loss`.

        Raises:
            ValueError: alpha or likelihood negative or not finite, features or y of another shape.
            IndexError, RuntimeError, TypeError: as `softmax_loss`.
        """
        _check_weights(alpha, likelihood)
        wide = self._wide(features)
        _check_labels(y, wide.shape[:1])
        wide = wide.masked_fill((y == ignore_index).unsqueeze(1), 0.0)  # an ignored row may hold NaN
        with _full_precision(wide):
            scores, _ = self._scores(wide)  # without what is common to a row, which the softmax does not see
            distances, negative = self._label_terms(wide, y)
            if alpha:
                scores = scores.scatter_add(1, _indices(y, self.classes).unsqueeze(1), -alpha * distances.unsqueeze(1))
            cross_entropy = softmax_loss(
                scores,
                y,
                distance=distance,
                tau=tau,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
                backend=backend,
            )
            return cross_entropy + likelihood * _reduced(negative, y, ignore_index, reduction)

    def extra_repr(self) -> str:
        return f"features={self.features}, classes={self.classes}, covariance={self.covariance!r}"

    def _wide(self, features: object) -> Tensor:
        if not isinstance(features, Tensor):
            raise TypeError(f"features must be a Tensor, got {type(features).__name__}")
        if features.dim() != 2 or features.shape[1] != self.features:
            raise ValueError(f"features must have shape (N, D) = (N, {self.features}), got {tuple(features.shape)}")
        parameters = torch.promote_types(self.means.dtype, torch.float32)
        return features.to(torch.promote_types(features.dtype, parameters))

    def _scores(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits as scores (N, C) minus an offset (N, 1) that is common to a row.

        The offset is a square of the features, and far from the means much larger than the scores differ.
        """
        # Any point would do, so it is a constant for autograd.
        centre = self.means.detach().to(features.dtype).mean(0)
        f, means = features - centre, self.means.to(features.dtype) - centre
        variances = self._log_variances(features.dtype)
        if variances is None:
            biases = -means.square().sum(1) / 2
            return torch.addmm(biases, f, means.T), f.square().sum(1, keepdim=True) / 2
        precisions = (-variances).exp()
        common = precisions.mean(0)
        weights = torch.cat([(common - precisions) / 2, precisions * means], 1)
        biases = -(precisions * means.square() + variances).sum(1) / 2
        squares = f.square()
        return torch.addmm(biases, torch.cat([squares, f], 1), weights.T), (squares @ common).unsqueeze(1) / 2

    def _label_terms(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """d_y and d_y + log|Lambda_y| / 2, each of shape (N,)."""
        labels = _indices(y, self.classes)
        squares = (features - self.means.to(features.dtype)[labels]).square()
        variances = self._log_variances(features.dtype)
        if variances is None:
            distances = squares.sum(1) / 2
            return distances, distances
        mine = variances[labels]
        distances = (squares * (-mine).exp()).sum(1) / 2
        return distances, distances + mine.sum(1) / 2

    def _log_variances(self, dtype: torch.dtype) -> Tensor | None:
        """log(least_variance + exp(s)), which neither overflows nor, for a large negative s, loses its gradient."""
        if self.log_variances is None:
            return None
        least = math.log(self.least_variance)
        return least + softplus(self.log_variances.to(dtype) - least)

    def _half_log_determinants(self, dtype: torch.dtype) -> Tensor | None:
        variances = self._log_variances(dtype)
        return None if variances is None else variances.detach().sum(1) / 2


def gaussian_mixture_loss(
    logits: Tensor,
    y: Tensor,
    *,
    alpha: float,
    likelihood: float,
    distance: Distance | None = None,
    tau: Tensor | float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    backend: BackendName | None = None,
) -> Tensor:
    r"""The loss of a `GaussianMixtureHead` with identity covariance, from its logits z alone.

    .. math:: L = -\log p_y + \tau D - \lambda z_y, \qquad p = \mathrm{softmax}(z + \alpha z_y e_y)

    The margin is `softmax_loss` with scale 1 + alpha: one fused pass. With a diagonal covariance the margin would
    multiply the determinant, too: use `GaussianMixtureHead.loss`, which is also more precise for features far
    away from all means.

    Args:
        logits: (N, C), from the head: minus the distances, 0 or less.
        y: classes, (N,), int64.

    The other arguments, the result and the errors are those of `GaussianMixtureHead.loss`.

    Source: Wan et al., arXiv 1803.02988.
    """
    _check_weights(alpha, likelihood)
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a Tensor, got {type(logits).__name__}")
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape (N, C), got {tuple(logits.shape)}")
    _check_labels(y, logits.shape[:1])
    cross_entropy = softmax_loss(
        logits,
        y,
        scale=1 + alpha,
        distance=distance,
        tau=tau,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        backend=backend,
    )
    if not likelihood:
        return cross_entropy
    of_label = logits.gather(1, _indices(y, logits.shape[1]).unsqueeze(1)).squeeze(1).to(cross_entropy.dtype)
    return cross_entropy - likelihood * _reduced(of_label, y, ignore_index, reduction)


def _check_weights(alpha: float, likelihood: float) -> None:
    for name, value in (("alpha", alpha), ("likelihood", likelihood)):
        if not 0 <= number(name, value) < math.inf:
            raise ValueError(f"{name} must be 0 or more and finite, got {value!r}")


def _check_labels(y: object, rows: torch.Size) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a Tensor, got {type(y).__name__}")
    if y.is_floating_point() or y.shape != rows:
        raise ValueError(f"y must hold one class for each row, shape {tuple(rows)}, got {tuple(y.shape)} of {y.dtype}")


def _indices(y: Tensor, classes: int) -> Tensor:
    """Labels to index with: those that are ignored, and those that the fused loss refuses, become some class."""
    return y.to(torch.int64).clamp(0, classes - 1)


def _reduced(rows: Tensor, y: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
    """As `softmax_loss` reduces its rows: those that are ignored are 0 and do not count in the mean."""
    counted = y != ignore_index
    rows = rows.masked_fill(~counted, 0.0)
    if reduction == "none":
        return rows
    return rows.sum() / counted.sum() if reduction == "mean" else rows.sum()


def _full_precision(features: Tensor) -> AbstractContextManager[object]:
    """In half precision the expanded square would be lost, so autocast is turned off, where the device has it."""
    device = features.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
