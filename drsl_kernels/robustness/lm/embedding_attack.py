"""Projected gradient descent on the vectors of the tokens that a language model reads.

Tokens are a finite set, their vectors are not: around each of them lies a ball, and the attack looks for the points in
all of these balls together at which the model predicts the same text worst. Relies on `..balls` and `..attack_losses`;
`judging` relies on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..attack_losses import objective_of
from ..attack_objects import REACH
from ..attacks import check_numbers, evaluation_mode
from ..balls import Norm, ascent_direction, project, random_point
from .scoring import LanguageModel, check_sequences, token_losses

__all__ = ["EMBEDDING_LOSSES", "EmbeddingAttack", "EmbeddingLoss", "embedding_pgd", "mean_embedding_norm"]

EmbeddingLoss: TypeAlias = Literal["log_odds", "ce", "margin"]
EMBEDDING_LOSSES: Final[tuple[str, ...]] = get_args(EmbeddingLoss)

_EVERYWHERE: Final = (-math.inf, math.inf)


@dataclass(frozen=True)
class EmbeddingAttack:
    """The worst of each sequence: most nats, float64, and fewest right predictions, int64, both (N,).

    Each is that of all points visited, and they need not be of the same one; `vectors` (N, T, H) have the nats.
    """

    vectors: Tensor
    nats: Tensor
    correct: Tensor

    def or_worse(self, other: EmbeddingAttack) -> EmbeddingAttack:
        """Of two attacks on the same sequences, sequence by sequence."""
        worse = other.nats > self.nats
        return EmbeddingAttack(
            torch.where(worse.view(-1, 1, 1), other.vectors, self.vectors),
            torch.where(worse, other.nats, self.nats),
            torch.minimum(other.correct, self.correct),
        )


def embedding_pgd(
    model: LanguageModel,
    sequences: Tensor,
    *,
    eps: float,
    alpha: float | None = None,
    steps: int = 10,
    loss: EmbeddingLoss = "log_odds",
    norm: Norm = "l2",
    restarts: int = 1,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> EmbeddingAttack:
    r"""Move the vector of every token that is read, to make the predictions of the text as bad as possible.

    .. math:: e_{t} \leftarrow \Pi_t\left(e_{t} + \alpha\, u\left(\nabla_{e_t} \sum_{s} L(z_s, x_{s+1})\right)\right)

    with e_t the vector of the token at place t, z_s the logits at place s and x_{s+1} the token that follows there;
    u and the ball, on which Pi projects, are those of `drsl_kernels.robustness.pgd`, of each token alone. The targets
    stay as they are, and all are scored.

    Of every point visited, in all restarts, and of the vectors as they are, each sequence keeps the one with the
    largest sum of -log p, and the fewest right predictions, which may be those of another point.

    Args:
        model: a `GPT`, or anything with its `embed`, `hidden` and `scores`. Run in evaluation mode; its parameters get
            no gradient.
        sequences: tokens, shape (N, T + 1), int64; the first T are read, the last T predicted.
        eps: radius of each token's ball, in the units of the vectors: see `mean_embedding_norm`.
        alpha: step size, in the same units; None for 2.5 eps over all steps.
        steps: gradient steps from each start.
        loss: what is ascended, summed over tokens: "log_odds", whose gradient does not fade where a prediction is
            certain; "ce", the cross-entropy, computed through the log-odds; or "margin".
        norm: "l2" bounds the length of each token's change, "linf" each of its entries.
        restarts, random_start, generator: as in `drsl_kernels.robustness.pgd`.

    Raises:
        ValueError, TypeError: numbers out of their range, an unknown name, sequences of another shape or dtype.
        FloatingPointError: a gradient or a loss is not finite.
    """
    check_sequences(sequences)
    if loss not in EMBEDDING_LOSSES:
        raise ValueError(f"loss must be one of {', '.join(map(repr, EMBEDDING_LOSSES))}, got {loss!r}")
    if alpha is None:
        alpha = REACH * eps / max(1, steps) if eps else 1.0
    eps, alpha, steps, restarts, _ = check_numbers(eps, alpha, steps, norm, restarts, random_start, _EVERYWHERE, "best")
    read, y = sequences[:, :-1], sequences[:, 1:]
    with evaluation_mode(model), torch.enable_grad():  # type: ignore[arg-type]
        start = model.embed(read).detach()
        shape, x = start.shape, start.flatten(0, 1)  # each token is a sample to the balls
        best = _look(model, start, y, loss, gradient=False)[0]
        for _ in range(restarts):
            point = random_point(x, eps, norm, generator) if random_start else x
            point = project(point, x, eps, norm, _EVERYWHERE)
            for _ in range(steps):
                found, gradient = _look(model, point.view(shape), y, loss)
                best = best.or_worse(found)
                step = alpha * ascent_direction(gradient.flatten(0, 1), norm)
                point = project(point + step, x, eps, norm, _EVERYWHERE)
            best = best.or_worse(_look(model, point.view(shape), y, loss, gradient=False)[0])
    return best


def mean_embedding_norm(model: LanguageModel, tokens: Tensor) -> float:
    """The mean Euclidean length of the vectors of the given tokens, each counted once: a yardstick for radii.

    A radius that is a share of it says the same of models whose vectors have other lengths. For "linf", whose ball has
    entries and no length, `judging` divides it by the root of H: the corners of that cube are as far away.

    Args:
        tokens: int64, any shape: those that occur in the text the model was trained on. Vectors of the others were
            never used.
    """
    with torch.no_grad():
        vectors = model.embed(torch.unique(tokens).unsqueeze(0))[0]
    return float(torch.linalg.vector_norm(vectors.double(), dim=1).mean())


def _look(
    model: LanguageModel, vectors: Tensor, y: Tensor, loss: EmbeddingLoss, *, gradient: bool = True
) -> tuple[EmbeddingAttack, Tensor]:
    """What a point does to each sequence, and the gradient of the loss, zeros unless it is asked for."""
    vectors = vectors.detach().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        scores = model.scores(model.hidden(vectors))
        up = torch.zeros_like(vectors)
        if gradient:
            losses, _ = objective_of(loss)(scores.flatten(0, 1), y.flatten(), None)
            (up,) = torch.autograd.grad(losses.sum(), vectors)
    nats, correct = token_losses(scores.detach(), y)
    found = EmbeddingAttack(vectors.detach(), nats.double().sum(1), correct.sum(1))
    if not bool(found.nats.isfinite().all() & up.isfinite().all()):
        raise FloatingPointError("the attack met losses or gradients that are not finite; look at the model's weights")
    return found, up
