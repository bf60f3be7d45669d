"""What a classifier shows beyond its accuracy: how far its softmax is from even, and how it sees attacked images.

Relies on scikit-learn for the planes; `judging` relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor, nn

from drsl_kernels import fused_drsl_loss

from .attacks import Model, evaluation_mode

__all__ = ["PLANE_IMAGES", "Plane", "feature_planes", "wrong_class_distances"]

Array = NDArray[Any]

PLANE_IMAGES: Final = 150
_PERPLEXITY: Final = 30.0


@dataclass(frozen=True)
class Plane:
    """Features of the same images, before and after an attack, in two dimensions.

    Attributes:
        method: "PCA" or "t-SNE".
        clean, attacked: a point (horizontal, vertical) for each image, in the units of the method.
        labels: the true class of each image.
    """

    method: str
    clean: tuple[tuple[float, float], ...]
    attacked: tuple[tuple[float, float], ...]
    labels: tuple[int, ...]


def wrong_class_distances(model: Model, x: Tensor, y: Tensor, *, batch_size: int = 256) -> Tensor:
    r"""How far the softmax values of the wrong classes are from their average, shape (N,), float64.

    .. math:: \sum_{k \ne y} \left(p_k - \frac{1 - p_y}{C - 1}\right)^2

    Source: the distance of Wang et al., arXiv 2303.12363, there related to whether an attack succeeds.
    """
    parts = []
    with evaluation_mode(model), torch.no_grad():
        for some, labels in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
            _, stats = fused_drsl_loss(
                model(some).double(), labels, 1.0, distance="non_target", reduction="none", return_stats=True
            )
            parts.append(stats.distance)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def feature_planes(model: nn.Module, x: Tensor, attacked: Tensor, y: Tensor) -> tuple[Plane, ...]:
    """The model's features of at most `PLANE_IMAGES` images and of their attacked twins, by PCA and by t-SNE.

    Args:
        model: has `features`, which maps images to vectors.
        x, attacked: images (N, ...), in the same order; y: their classes.

    Returns:
        One plane per method; none where there are too few images to spread out (three or fewer).
    """
    x, attacked, y = (some[:PLANE_IMAGES] for some in (x, attacked, y))
    if len(y) < 4:
        return ()
    with evaluation_mode(model), torch.no_grad():
        vectors = model.get_submodule("features")(torch.cat([x, attacked])).flatten(1).double().cpu().numpy()
    perplexity = min(_PERPLEXITY, (len(vectors) - 1) / 3)
    methods = {
        "PCA": PCA(n_components=2, random_state=0),
        "t-SNE": TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=0),
    }
    return tuple(_plane(name, method.fit_transform(vectors), y) for name, method in methods.items())


def _plane(method: str, points: Array, y: Tensor) -> Plane:
    if not np.isfinite(points).all():  # all features alike: there is nothing to spread out
        points = np.zeros_like(points)
    clean, attacked = np.split(points.astype(float), 2)
    pairs = [tuple((float(a), float(b)) for a, b in half) for half in (clean, attacked)]
    return Plane(method, pairs[0], pairs[1], tuple(y.tolist()))
