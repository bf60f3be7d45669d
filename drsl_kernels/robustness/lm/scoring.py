"""How well a language model predicts a text: perplexity, bits per byte, next-token accuracy.

Relies on `drsl_kernels.softmax_loss`, exact where a prediction is all but certain; training, the attacks and the
reports rely on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from drsl_kernels import softmax_loss

from ..attacks import evaluation_mode

__all__ = ["LanguageModel", "Score", "check_sequences", "sequence_losses", "token_losses"]

_TOKENS: Final = 4096  # at a time


class LanguageModel(Protocol):
    """What the attacks need of a model; `GPT` is one."""

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (N, T), int64 -> their vectors (N, T, H)."""

    def hidden(self, vectors: Tensor) -> Tensor:
        """Vectors (N, T, H) -> what the output layer is given, (N, T, ...). A place sees none after it."""

    def scores(self, hidden: Tensor) -> Tensor:
        """hidden (N, T, ...) -> logits of the next token, (N, T, V)."""


@dataclass(frozen=True)
class Score:
    r"""Sums over predicted tokens: of -log p in nats, of right predictions, of tokens and of the bytes they stand for.

    .. math:: \mathrm{perplexity} = e^{\mathrm{nats} / \mathrm{tokens}}, \qquad
              \mathrm{bits\ per\ byte} = \frac{\mathrm{nats}}{\log 2 \cdot \mathrm{bytes}}

    Perplexities of models with different tokens cannot be compared; bits per byte can.
    """

    nats: float
    correct: int
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """Infinite where a prediction ruled the text out."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens

    @staticmethod
    def of(model: LanguageModel, sequences: Tensor, byte_lengths: Tensor) -> Score:
        """Of sequences (N, T + 1): all tokens but the first of each are predicted, from those before them.

        Args:
            model: run in evaluation mode, without gradients.
            sequences: int64, on the model's device.
            byte_lengths: bytes of each token of the vocabulary, shape (V,).
        """
        losses, right = sequence_losses(model, sequences)
        return Score(
            float(losses.sum()),
            int(right.sum()),
            sequences[:, 1:].numel(),
            int(byte_lengths.to(sequences.device)[sequences[:, 1:]].sum()),
        )


def sequence_losses(model: LanguageModel, sequences: Tensor, *, first: int = 1) -> tuple[Tensor, Tensor]:
    """Nats, float64, and right predictions, int64, both (N,), of each sequence's tokens from index `first` on."""
    losses, right = [], []
    with evaluation_mode(model), torch.no_grad():  # type: ignore[arg-type]
        for batch in torch.split(sequences, max(1, _TOKENS // sequences.shape[1])):
            hidden = model.hidden(model.embed(batch[:, :-1]))[:, first - 1 :]
            nats, correct = token_losses(model.scores(hidden), batch[:, first:])
            losses.append(nats.double().sum(1))
            right.append(correct.sum(1))
    return torch.cat(losses), torch.cat(right)


def token_losses(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of each target and whether it was the most likely token, (N, T) both; a tie counts as wrong.

    scores (N, T, V), y (N, T).
    """
    losses, stats = softmax_loss(scores.flatten(0, 1), y.flatten(), reduction="none", return_stats=True)
    return losses.view(y.shape), stats.correct.view(y.shape)


def check_sequences(sequences: Tensor) -> None:
    """Raise TypeError or ValueError for what is not tokens of shape (N, T + 1), T of 1 or more."""
    if not isinstance(sequences, Tensor) or sequences.dtype != torch.int64:
        got = sequences.dtype if isinstance(sequences, Tensor) else type(sequences).__name__
        raise TypeError(f"sequences must be a Tensor of tokens, int64, got {got}")
    if sequences.dim() != 2 or sequences.shape[1] < 2:
        raise ValueError(f"sequences must have shape (N, T + 1) with T of 1 or more, got {tuple(sequences.shape)}")
