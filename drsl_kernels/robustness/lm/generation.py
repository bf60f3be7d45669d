"""Text that a language model writes, token by token.

Relies on `model`; `judging` relies on it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drsl_kernels.spec import integer

from ..attacks import evaluation_mode
from .model import GPT

__all__ = ["continued"]


def continued(
    model: GPT, tokens: Tensor, count: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    r"""Tokens with so many more behind them, each drawn from what the model predicts after those before it.

    .. math:: x_{t+1} \sim \mathrm{softmax}(z_t / \theta)

    with the scores z of the model and the temperature theta. Where there are more tokens than its context, the model
    reads the last ones. Run in evaluation mode, without gradients.

    Args:
        model: a `GPT`.
        tokens: to begin with, int64, shape (N, T), T of 1 or more; on the model's device.
        count: how many tokens to add, 0 or more.
        temperature: below 1 likely tokens become more likely; at 0 the most likely one is taken.
        generator: for what is drawn, on the device of tokens.

    Returns:
        int64, shape (N, T + count), `tokens` first.

    Raises:
        ValueError: tokens without a first one, a negative count or temperature.
        FloatingPointError: the model's scores are not finite.
    """
    if tokens.dim() != 2 or not tokens.shape[1]:
        raise ValueError(f"tokens must have shape (N, T) with T of 1 or more, got {tuple(tokens.shape)}")
    if integer("count", count) < 0:
        raise ValueError(f"count must be 0 or more, got {count!r}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more and finite, got {temperature!r}")
    with evaluation_mode(model), torch.no_grad():
        for _ in range(count):
            hidden = model.hidden(model.embed(tokens[:, -model.shape.context :]))
            scores = model.scores(hidden[:, -1:])[:, 0]
            if bool(scores.isnan().any()):
                raise FloatingPointError("the model's scores are not finite; look at its weights")
            if temperature:
                p = (scores / temperature).softmax(-1)
                drawn = torch.multinomial(p, 1, generator=generator)
            else:
                drawn = scores.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, drawn], dim=1)
    return tokens
