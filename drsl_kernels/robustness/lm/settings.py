"""All that decides a language model's training: `LanguageSettings`. Kept in a run's folder, to go on with the same.

Relies on `losses` and `model`; `engine`, `experiment` and the command rely on it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from .losses import LanguageLoss
from .model import Positions, Shape
from .text import STDLIB
from .tokens import LEAST_VOCABULARY, TOKENS, TokensName

__all__ = ["SHARDINGS", "LanguageSettings", "Sharding"]

Sharding: TypeAlias = Literal["none", "fsdp"]
SHARDINGS: Final[tuple[str, ...]] = get_args(Sharding)

_SIZES: Final = ("steps", "batch_size", "evaluate_every", "validation_windows", "threads")


@dataclass(frozen=True)
class LanguageSettings:
    """What decides the weights that a run ends with.

    Attributes:
        loss: what to descend.
        seed: of the first weights and of the windows of text that are drawn.
        text: "stdlib", or the path of a file or a folder; compared by its content, not by its name.
        tokens, vocabulary: "bytes", or "bpe" with at most so many tokens.
        context, layers, heads, width, positions, tied, components: of the model, see `Shape`.
        steps, batch_size: windows of context + 1 tokens per step, of all processes together.
        learning_rate: its highest value, of AdamW with betas 0.9 and 0.95; reached after a share `warmup` of the steps,
            then it falls along half a cosine to a tenth.
        weight_decay: of matrices, not of norms.
        clip_norm: gradients are shortened to this length.
        evaluate_every: steps between evaluations on the validation part, the best of which chooses the weights.
        validation_windows: so many windows of it, spread evenly.
        device: "cpu", "cuda" or "cuda:1"; with torchrun each process takes a GPU of its own.
        threads: CPU threads of each process. They change the last digits.
        sharding: with several processes "none" gives each all weights, "fsdp" a part of them (FSDP2).

    Raises:
        ValueError: a number out of its range, or an unknown name.
    """

    loss: LanguageLoss = field(default_factory=lambda: LanguageLoss("ce"))
    seed: int = 0
    text: str = STDLIB
    tokens: TokensName = "bytes"
    vocabulary: int = 1024
    context: int = 128
    layers: int = 4
    heads: int = 4
    width: int = 128
    positions: Positions = "rotary"
    tied: bool = True
    components: int = 4
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    evaluate_every: int = 100
    validation_windows: int = 128
    device: str = "cpu"
    threads: int = 1
    sharding: Sharding = "none"

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)!r}")
        if self.tokens not in TOKENS:
            raise ValueError(f"tokens must be one of {', '.join(TOKENS)}, got {self.tokens!r}")
        if self.sharding not in SHARDINGS:
            raise ValueError(f"sharding must be one of {', '.join(SHARDINGS)}, got {self.sharding!r}")
        if self.vocabulary < LEAST_VOCABULARY:
            raise ValueError(f"vocabulary must be {LEAST_VOCABULARY} or more, got {self.vocabulary!r}")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be 0 or more and finite, got {self.weight_decay!r}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be from 0 to 1, a share of the steps, got {self.warmup!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed!r}")
        self.shape(LEAST_VOCABULARY)

    def shape(self, vocabulary: int) -> Shape:
        """Of the model, for the tokens that the text came to."""
        names = ("context", "layers", "heads", "width", "positions", "tied", "components")
        return Shape(vocabulary, head=self.loss.head, **{name: getattr(self, name) for name in names})

    def learning_rate_at(self, step: int) -> float:
        """Of a step, counted from 0."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        share = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)

    def as_json(self) -> dict[str, Any]:
        """Names, numbers and a dict for the loss, as JSON gives them back."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"loss": asdict(self.loss)}

    @staticmethod
    def from_json(content: dict[str, Any]) -> LanguageSettings:
        """The inverse of `as_json`; KeyError, TypeError or ValueError for anything else."""
        loss = cast("dict[str, Any]", content["loss"])
        return LanguageSettings(**content | {"loss": LanguageLoss(**loss)})

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to go on: where the text lies has not, and bytes have no vocabulary."""
        without = {"text"} | ({"vocabulary"} if self.tokens == "bytes" else set())
        return {name: value for name, value in self.as_json().items() if name not in without}
