"""How a trained language model is judged: what it predicts of held-out text, and what attacks leave of that.

Two kinds of attack: on the vectors of tokens, within radii, and by exchanging tokens, so many of them. Of each the
worst case over several attacks is taken, sequence by sequence: the most nats, and the fewest right predictions.
Relies on `embedding_attack`, `substitution` and
`scoring`; `experiment` relies on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ..balls import Norm, check_norm
from ..random_streams import generator_for
from ..storage import read_json, write_json
from .corpus import PARTS, Corpus, Part, windows
from .embedding_attack import EMBEDDING_LOSSES, EmbeddingAttack, EmbeddingLoss, embedding_pgd, mean_embedding_norm
from .engine import StepRow
from .generation import continued
from .losses import LanguageLoss
from .model import GPT
from .scoring import Score
from .substitution import PROPOSALS, Proposal, Substitution, substitute_tokens

__all__ = ["JUDGED", "LanguageJudging", "LanguageResult", "Point", "judge", "load_result", "save_result"]

JUDGED: Final = "judged.json"
_BATCH: Final = 32  # sequences attacked at a time
_SAMPLE: Final = 200  # tokens that a model writes, to be looked at


@dataclass(frozen=True)
class LanguageJudging:
    """Which sequences a model is judged with, and by which attacks.

    Attributes:
        radii: of the balls around embedded tokens, as shares of the mean length of the model's own vectors, so that
            they mean the same for all models; in "linf" each entry may change by that share of the length over the
            root of the width.
        norm: "l2" or "linf", of the change of each token.
        losses: what PGD ascends; see `embedding_pgd`.
        steps, restarts: of PGD.
        budgets: numbers of substitutions, ascending.
        proposals: where candidates come from; see `substitute_tokens`.
        candidates: evaluated for each substitution.
        sequences: so many are attacked, spread evenly over the part. Their first half may be exchanged.
        held_out: the part of the text, "test" or "validation".

    Raises:
        ValueError: a number out of its range, or an unknown name.
    """

    radii: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    norm: Norm = "l2"
    losses: tuple[EmbeddingLoss, ...] = ("log_odds", "ce")
    steps: int = 10
    restarts: int = 2
    budgets: tuple[int, ...] = (1, 2, 4, 8)
    proposals: tuple[Proposal, ...] = ("hotflip", "gcg", "random")
    candidates: int = 24
    sequences: int = 24
    held_out: Part = "test"

    def __post_init__(self) -> None:
        check_norm(self.norm)
        for name, known in (("losses", EMBEDDING_LOSSES), ("proposals", PROPOSALS)):
            wrong = [value for value in getattr(self, name) if value not in known]
            if wrong or not getattr(self, name):
                raise ValueError(f"{name} must be some of {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.radii or not all(0 < radius < math.inf for radius in self.radii):
            raise ValueError(f"radii must be above 0 and finite, got {self.radii!r}")
        if not self.budgets or not all(budget >= 1 for budget in self.budgets):
            raise ValueError(f"budgets must be 1 or more, got {self.budgets!r}")
        for name in ("steps", "restarts", "candidates", "sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)!r}")
        if self.held_out not in PARTS:
            raise ValueError(f"held_out must be one of {', '.join(PARTS)}, got {self.held_out!r}")
        object.__setattr__(self, "radii", tuple(sorted(set(self.radii))))
        object.__setattr__(self, "budgets", tuple(sorted(set(self.budgets))))

    def attacks(self) -> int:
        """How many attacks `judge` makes, each on a batch of sequences."""
        return -(-self.sequences // _BATCH) * (len(self.radii) * len(self.losses) + len(self.proposals))

    def as_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def check_context(self, context: int) -> None:
        """ValueError where half of a sequence has fewer tokens than shall be exchanged."""
        if self.budgets[-1] > context // 2:
            raise ValueError(
                f"budgets must be at most half of the context, {context // 2}, got {self.budgets[-1]} substitutions"
            )


@dataclass(frozen=True)
class Point:
    """What an attack of one size (a radius, a number of substitutions) left: sums over all sequences, see `Score`."""

    size: float
    nats: float
    correct: int
    tokens: int

    @property
    def perplexity(self) -> float:
        return Score(self.nats, self.correct, self.tokens, self.tokens).perplexity

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens


@dataclass(frozen=True)
class LanguageResult:
    """One loss, one seed: how training went, the score on the whole part, and the attacked sequences.

    `embedding` and `substitution` are the worst case over their attacks, the first point being without an attack, most
    nats and fewest right predictions each on their own;
    `by_attack` has the same of each attack by its name. `embedding_norm` is the length that radii are shares of, and
    `sample` text that the model wrote after the first half of the first attacked sequence.
    """

    loss: LanguageLoss
    seed: int
    rows: tuple[StepRow, ...]
    best_step: int
    score: Score
    embedding_norm: float
    embedding: tuple[Point, ...]
    substitution: tuple[Point, ...]
    by_attack: dict[str, tuple[Point, ...]]
    sample: str


def judge(
    model: GPT,
    corpus: Corpus,
    judging: LanguageJudging,
    *,
    loss: LanguageLoss,
    seed: int,
    rows: tuple[StepRow, ...],
    best_step: int,
    on_attack: Callable[[str], None] | None = None,
) -> LanguageResult:
    """Score and attack a model on its device.

    Raises:
        FloatingPointError: a loss or a gradient is not finite.
    """
    device, context = model.embedding.weight.device, model.shape.context
    part = corpus.part(judging.held_out)
    tell = on_attack or (lambda name: None)
    length = mean_embedding_norm(model, corpus.seen.nonzero().to(device))
    attacked = windows(part, context, judging.sequences).to(device)
    batches = torch.split(attacked, _BATCH)
    embedding = _joined([_embedding(model, batch, judging, length, (seed, i), tell) for i, batch in enumerate(batches)])
    exchanged = _joined(
        [_substitution(model, batch, judging, corpus.seen, (seed, i), tell) for i, batch in enumerate(batches)]
    )
    return LanguageResult(
        loss=loss,
        seed=seed,
        rows=rows,
        best_step=best_step,
        score=Score.of(model, windows(part, context).to(device), corpus.byte_lengths),
        embedding_norm=length,
        embedding=embedding.pop("worst"),
        substitution=exchanged.pop("worst"),
        by_attack=embedding | exchanged,
        sample=_sample(model, corpus, attacked[:1, : context // 2], seed),
    )


def save_result(path: Path, identity: dict[str, Any], result: LanguageResult) -> None:
    write_json(path, {"identity": identity, "result": asdict(result)})


def load_result(path: Path, identity: dict[str, Any]) -> LanguageResult | None:
    """What `save_result` wrote under the same identity; None where there is nothing of the kind, or it is damaged."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("identity") != identity:
        return None
    try:
        result = content["result"]
        return LanguageResult(
            **result
            | {
                "loss": LanguageLoss(**result["loss"]),
                "rows": tuple(StepRow(**row) for row in result["rows"]),
                "score": Score(**result["score"]),
                "embedding": _as_points(result["embedding"]),
                "substitution": _as_points(result["substitution"]),
                "by_attack": {name: _as_points(points) for name, points in result["by_attack"].items()},
            }
        )
    except (AttributeError, KeyError, TypeError, ValueError):  # not what asdict(LanguageResult) gives
        return None


def _sample(model: GPT, corpus: Corpus, beginning: Tensor, seed: int) -> str:
    """The beginning and what the model writes after it; bytes that are no text are replaced."""
    generator = generator_for(seed, "sample", device=beginning.device)
    written = continued(model, beginning, _SAMPLE, generator=generator)
    return corpus.tokens.decode(written[0].cpu()).decode("utf-8", errors="replace")


def _as_points(content: Sequence[dict[str, Any]]) -> tuple[Point, ...]:
    return tuple(Point(**point) for point in content)


def _embedding(
    model: GPT,
    sequences: Tensor,
    judging: LanguageJudging,
    length: float,
    place: tuple[int, int],
    tell: Callable[[str], None],
) -> dict[str, list[Point]]:
    """PGD with each loss within each radius. What was found within a smaller radius counts within a larger one."""
    unit = length if judging.norm == "l2" else length / math.sqrt(model.shape.width)
    clean = embedding_pgd(model, sequences, eps=0.0, steps=0, random_start=False)
    tokens = sequences[:, 1:].numel()
    worst = dict.fromkeys((*map(_pgd_name, judging.losses), "worst"), clean)
    points = {name: [_point(0.0, clean, tokens)] for name in worst}
    for radius in judging.radii:
        for loss in judging.losses:
            found = embedding_pgd(
                model,
                sequences,
                eps=radius * unit,
                steps=judging.steps,
                loss=loss,
                norm=judging.norm,
                restarts=judging.restarts,
                generator=generator_for(*place, "embedding", loss, radius, device=sequences.device),
            )
            for name in (_pgd_name(loss), "worst"):
                worst[name] = worst[name].or_worse(found)
            tell(f"{_pgd_name(loss)}, radius {radius:g}")
        for name, attack in worst.items():
            points[name].append(_point(radius, attack, tokens))
    return points


def _substitution(
    model: GPT,
    sequences: Tensor,
    judging: LanguageJudging,
    seen: Tensor,
    place: tuple[int, int],
    tell: Callable[[str], None],
) -> dict[str, list[Point]]:
    """Each way to propose candidates, up to the largest budget; the worst case is taken at each."""
    found: dict[str, Substitution] = {}
    for proposal in judging.proposals:
        found[proposal] = substitute_tokens(
            model,
            sequences,
            prefix=model.shape.context // 2,
            substitutions=judging.budgets[-1],
            candidates=judging.candidates,
            proposal=proposal,
            allowed=seen,
            generator=generator_for(*place, "substitution", proposal),
        )
        tell(f"{proposal}, {judging.budgets[-1]} substitutions")
    nats, correct = (torch.stack([getattr(one, name) for one in found.values()]) for name in ("nats", "correct"))
    sums = {name: (one.nats, one.correct) for name, one in found.items()} | {"worst": (nats.amax(0), correct.amin(0))}
    tokens = found[judging.proposals[0]].scored * len(sequences)
    return {
        name: [
            Point(float(size), float(loss[size].sum()), int(right[size].sum()), tokens)
            for size in (0, *judging.budgets)
        ]
        for name, (loss, right) in sums.items()
    }


def _pgd_name(loss: str) -> str:
    return f"pgd:{loss}"


def _point(size: float, attack: EmbeddingAttack, tokens: int) -> Point:
    return Point(size, float(attack.nats.sum()), int(attack.correct.sum()), tokens)


def _joined(batches: Sequence[dict[str, list[Point]]]) -> dict[str, tuple[Point, ...]]:
    """Points of all batches of sequences, added up."""
    return {
        name: tuple(
            Point(same[0].size, sum(p.nats for p in same), sum(p.correct for p in same), sum(p.tokens for p in same))
            for same in zip(*(batch[name] for batch in batches), strict=True)
        )
        for name in batches[0]
    }
