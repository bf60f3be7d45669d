"""Balls around samples: where attacks start, which way they go, and how they stay inside.

Relies on torch alone; attacks, `adversarial`, `evaluate`, `recipe`, `settings`, `train_command` and `lm` rely on it.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor

__all__ = ["NORMS", "Norm", "ascent_direction", "check_norm", "lengths", "per_sample_view", "project", "random_point"]

Norm: TypeAlias = Literal["linf", "l2"]
NORMS: Final[tuple[str, ...]] = get_args(Norm)


def check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")


def random_point(x: Tensor, eps: float, norm: str, generator: torch.Generator | None) -> Tensor:
    """A point drawn uniformly from the ball around x."""
    if norm == "linf":
        return x + eps * (2 * _uniform(x.shape, x, generator) - 1)
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    # The volume within radius r grows as r^d: the d-th root of a uniform number spreads points evenly.
    radius = _uniform(x.shape[:1], x, generator) ** (1 / max(1, x[:1].numel()))
    return x + eps * per_sample_view(radius, x) * _unit_length(direction)


def ascent_direction(gradient: Tensor, norm: str) -> Tensor:
    return gradient.sign() if norm == "linf" else _unit_length(gradient)


def project(points: Tensor, x: Tensor, eps: float, norm: str, bounds: tuple[float, float]) -> Tensor:
    """The nearest point of the ball around x, then the nearest within the bounds.

    The second step cannot leave the ball, for x itself lies within the bounds.
    """
    change = points.detach() - x
    if norm == "linf":
        change = change.clamp(-eps, eps)
    else:
        shrink = (eps / lengths(change, norm).clamp(min=torch.finfo(x.dtype).tiny)).clamp(max=1)
        change = change * per_sample_view(shrink, x)
    return (x + change).clamp(*bounds)


def lengths(change: Tensor, norm: str) -> Tensor:
    """The norm of each sample's change, shape (N,)."""
    length: Tensor = torch.linalg.vector_norm(change.flatten(1), torch.inf if norm == "linf" else 2, dim=1)
    return length


def per_sample_view(values: Tensor, like: Tensor) -> Tensor:
    """Values of shape (N,) made to broadcast against samples of shape (N, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _uniform(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


def _unit_length(vectors: Tensor) -> Tensor:
    """Each sample's vector scaled to Euclidean length 1; zero vectors stay zero."""
    smallest = torch.finfo(vectors.dtype).tiny
    flat = vectors.flatten(1)
    # By the largest entry first, so that squares of gradients around 1e-30 do not vanish.
    flat = flat / flat.abs().amax(1, keepdim=True).clamp(min=smallest)
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return torch.div(flat, length.clamp(min=smallest)).view_as(vectors)
