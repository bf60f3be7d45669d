"""Token substitution: a few tokens of what a language model has read are exchanged, to spoil what it predicts next.

Where to look is told by the gradient, in the manner of HotFlip and GCG, or drawn at random; what is found is always
evaluated exactly. Relies on `scoring`; `judging` relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from drsl_kernels.spec import integer

from ..attacks import evaluation_mode
from .scoring import LanguageModel, check_sequences, sequence_losses, token_losses

__all__ = ["PROPOSALS", "Proposal", "Substitution", "substitute_tokens"]

Proposal: TypeAlias = Literal["hotflip", "gcg", "random"]
PROPOSALS: Final[tuple[str, ...]] = get_args(Proposal)

_TOP: Final = 32  # tokens of each place that "gcg" draws from


@dataclass(frozen=True)
class Substitution:
    """Attacked sequences, (N, T + 1), and what each number of substitutions did to the tokens that are scored.

    `nats`, float64, and `correct`, int64, have shape (substitutions + 1, N): row k is the worst that at most k of them
    did, row 0 is before the first. The nats are those of the sequences, round by round; the right predictions are the
    fewest of everything that was tried, and may be those of another candidate. `scored` tokens of each sequence count.
    """

    sequences: Tensor
    nats: Tensor
    correct: Tensor
    scored: int


def substitute_tokens(
    model: LanguageModel,
    sequences: Tensor,
    *,
    prefix: int,
    substitutions: int,
    candidates: int = 32,
    proposal: Proposal = "hotflip",
    allowed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Substitution:
    r"""Exchange tokens of the beginning of each sequence, one after another, to make the rest of it less likely.

    The first `prefix` tokens may be exchanged; scored is -log p of those after them, which stay as they are. So no
    token is both exchanged and scored: the model is asked for the same continuation as before, after another beginning.
    That this continuation has in truth become less likely is not ruled out, as no attack on text without a judge of
    meaning can: compare models, at the same number of substitutions.

    One round: candidates (place i, token v) are proposed, each is evaluated exactly, and the one with the largest sum
    of -log p is kept if it is above that of now. The sum never falls. A place is exchanged once. With e the vectors of
    tokens, x_i the token of now and L the sum, the first-order gain of a candidate is

    .. math:: G_{iv} = (e_v - e_{x_i})^\top \nabla_{e_{x_i}} L

    ============ ===========================================================================================
    ``hotflip``  those with the largest G (Ebrahimi et al., arXiv 1712.06751)
    ``gcg``      a place at random, then one of its 32 tokens with the largest G (Zou et al., arXiv 2307.15043)
    ``random``   place and token at random: what the gradient has to be better than
    ============ ===========================================================================================

    Args:
        model: a `GPT`, or anything with its `embed`, `hidden` and `scores`. Run in evaluation mode.
        sequences: tokens, shape (N, T + 1), int64.
        prefix: how many tokens, from the first on, may be exchanged; from 1 to T.
        substitutions: rounds, and so the most tokens that differ afterwards; at most `prefix`.
        candidates: how many are evaluated in each round, for each sequence.
        proposal: see above.
        allowed: tokens that may be put in, shape (V,), bool; None for all. Give those that occur in the training text:
            vectors of others were never trained.
        generator: for what is drawn, a CPU generator.

    Raises:
        ValueError, TypeError: numbers out of their range, an unknown name, tensors of other shapes or dtypes.
        FloatingPointError: a loss is not finite.
    """
    check_sequences(sequences)
    vocabulary = _checked(model, sequences, prefix, substitutions, candidates, proposal, allowed)
    if allowed is None:
        allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed = allowed.to(sequences.device)
    now = sequences.clone()
    nats, correct = sequence_losses(model, now, first=prefix)
    rows = [(nats, correct)]
    changed = torch.zeros(len(now), prefix, dtype=torch.bool, device=now.device)
    for _ in range(substitutions):
        gains = _gains(model, now, prefix, vocabulary) if proposal != "random" else None
        places, tokens, valid = _propose(proposal, gains, changed, allowed, candidates, generator)
        tried = now.unsqueeze(1).repeat(1, candidates, 1)
        tried.scatter_(2, places.unsqueeze(2), tokens.unsqueeze(2))
        values, right = (
            found.view(len(now), candidates) for found in sequence_losses(model, tried.flatten(0, 1), first=prefix)
        )
        if not bool(values.isfinite().all()):
            raise FloatingPointError("the attack met losses that are not finite; look at the model's weights")
        value, which = values.where(valid, float("-inf")).max(1)
        better = value > nats
        row = torch.arange(len(now), device=now.device)
        now = torch.where(better.unsqueeze(1), tried[row, which], now)
        changed[row, places[row, which]] |= better
        nats = torch.where(better, value, nats)
        correct = torch.minimum(correct, right.where(valid, correct.unsqueeze(1)).amin(1))
        rows.append((nats, correct))
    all_nats, all_correct = (torch.stack(values) for values in zip(*rows, strict=True))
    return Substitution(now, all_nats, all_correct, sequences.shape[1] - prefix)


def _gains(model: LanguageModel, sequences: Tensor, prefix: int, vocabulary: int) -> Tensor:
    """First-order gains (N, prefix, V) of the sum of -log p of the scored tokens."""
    with evaluation_mode(model), torch.enable_grad():  # type: ignore[arg-type]
        vectors = model.embed(sequences[:, :-1]).detach().requires_grad_()
        scores = model.scores(model.hidden(vectors)[:, prefix - 1 :])
        losses, _ = token_losses(scores, sequences[:, prefix:])
        (gradient,) = torch.autograd.grad(losses.sum(), vectors)
    with torch.no_grad():
        table = model.embed(torch.arange(vocabulary, device=sequences.device).unsqueeze(0))[0]
        now = (vectors[:, :prefix] * gradient[:, :prefix]).sum(-1, keepdim=True)
        gains: Tensor = gradient[:, :prefix] @ table.T - now
    return gains


def _propose(
    proposal: str,
    gains: Tensor | None,
    changed: Tensor,
    allowed: Tensor,
    candidates: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Places and tokens to try, (N, candidates) both, and which of them are possible at all."""
    device = changed.device
    if gains is not None:
        gains = gains.masked_fill(~allowed, float("-inf")).masked_fill(changed.unsqueeze(-1), float("-inf"))
    if proposal == "hotflip" and gains is not None:
        vocabulary = gains.shape[-1]
        flat = gains.flatten(1)
        value, index = flat.topk(min(candidates, flat.shape[1]), dim=1)
        index, value = (_filled(part, candidates) for part in (index, value))
        return index // vocabulary, index % vocabulary, value > float("-inf")
    free = (~changed).double().cpu()
    places = torch.multinomial(free, candidates, replacement=True, generator=generator).to(device)
    drawn = torch.rand(places.shape, generator=generator, dtype=torch.float64).to(device)
    if gains is None:
        known = allowed.nonzero().flatten()
        tokens = known[(drawn * len(known)).long()]
    else:
        best = gains.topk(min(_TOP, int(allowed.sum())), dim=-1).indices
        rows = torch.arange(len(places), device=device).unsqueeze(1)
        tokens = best[rows, places, (drawn * best.shape[-1]).long()]
    return places, tokens, torch.ones_like(places, dtype=torch.bool)


def _filled(values: Tensor, size: int) -> Tensor:
    """Rows of a small vocabulary, made long enough by their last entry."""
    return (
        values if values.shape[1] == size else torch.cat([values, values[:, -1:].expand(-1, size - values.shape[1])], 1)
    )


def _checked(
    model: LanguageModel,
    sequences: Tensor,
    prefix: int,
    substitutions: int,
    candidates: int,
    proposal: str,
    allowed: Tensor | None,
) -> int:
    """The size of the vocabulary, if the arguments are right."""
    if proposal not in PROPOSALS:
        raise ValueError(f"proposal must be one of {', '.join(map(repr, PROPOSALS))}, got {proposal!r}")
    most = sequences.shape[1] - 1
    if not 1 <= integer("prefix", prefix) <= most:
        raise ValueError(f"prefix must be from 1 to T = {most}, got {prefix!r}")
    if not 0 <= integer("substitutions", substitutions) <= prefix:
        raise ValueError(f"substitutions must be from 0 to prefix = {prefix}, got {substitutions!r}")
    if integer("candidates", candidates) < 1:
        raise ValueError(f"candidates must be 1 or more, got {candidates!r}")
    with evaluation_mode(model), torch.no_grad():  # type: ignore[arg-type]
        vocabulary = model.scores(model.hidden(model.embed(sequences[:1, :1]))).shape[-1]
    if allowed is not None and (allowed.dtype != torch.bool or allowed.shape != (vocabulary,) or not allowed.any()):
        raise ValueError(
            f"allowed must be bool, of shape (V,) = ({vocabulary},), and allow a token, got {allowed.dtype} of shape "
            f"{tuple(allowed.shape)}, {int(allowed.sum())} of them allowed"
        )
    return int(vocabulary)
