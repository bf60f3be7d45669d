"""A text as tokens, its three parts, and windows of them to train on and to judge with.

Relies on `text` and `tokens`; `engine`, `experiment` and the attacks' caller rely on it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..random_streams import generator_for
from ..storage import write_text
from .text import Text
from .tokens import BPETokens, ByteTokens, Tokens, TokensName

__all__ = ["PARTS", "TOKENIZER", "Corpus", "Part", "drawn_windows", "load_corpus", "make_tokens", "windows"]

Part: TypeAlias = Literal["test", "validation"]
PARTS: Final[tuple[str, ...]] = get_args(Part)

TOKENIZER: Final = "tokenizer.json"
_LEARNED_FROM: Final = "tokenizer.txt"  # which text and vocabulary the tokenizer beside it is made of


@dataclass(frozen=True)
class Corpus:
    """A text as tokens. `train`, `validation` and `test` are int64, shape (T,), on the CPU.

    `byte_lengths` has the bytes of each token of the vocabulary, `seen` whether it occurs in the training part.
    """

    text: Text
    tokens: Tokens
    train: Tensor
    validation: Tensor
    test: Tensor
    byte_lengths: Tensor
    seen: Tensor

    @staticmethod
    def of(text: Text, tokens: Tokens) -> Corpus:
        train, validation, test = (tokens.encode(part) for part in (text.train, text.validation, text.test))
        seen = torch.zeros(tokens.vocabulary, dtype=torch.bool)
        seen[train] = True
        return Corpus(text, tokens, train, validation, test, tokens.byte_lengths(), seen)

    def part(self, name: Part) -> Tensor:
        return self.test if name == "test" else self.validation


def make_tokens(name: TokensName, text: Text, vocabulary: int, folder: Path) -> Tokens:
    """The tokens of a run: bytes, or BPE learned from the training part and kept in the folder, to be used again."""
    if name == "bytes":
        return ByteTokens()
    path, about = folder / TOKENIZER, f"{text.digest} {vocabulary}\n"
    learned_from = folder / _LEARNED_FROM
    if path.exists() and learned_from.exists() and learned_from.read_text(encoding="utf-8") == about:
        with suppress(ValueError):  # a damaged one is learned again, and is the same
            return BPETokens.load(path)
    tokens = BPETokens.train(text.train, vocabulary)
    learned_from.unlink(missing_ok=True)  # killed between the two files, it is learned again
    tokens.save(path)
    write_text(learned_from, about)
    return tokens


def load_corpus(text: Text, tokens: Tokens, *, context: int) -> Corpus:
    """A text as tokens.

    Raises:
        ValueError: a part is shorter than a window of context + 1 tokens.
    """
    corpus = Corpus.of(text, tokens)
    for name in ("train", "validation", "test"):
        length = len(getattr(corpus, name))
        if length <= context:
            raise ValueError(
                f"context must be below the tokens of each part of the text, got {context}, and the {name} part of "
                f"{text.source} has {length}"
            )
    return corpus


def drawn_windows(tokens: Tensor, context: int, count: int, *place: object) -> Tensor:
    """So many windows of context + 1 tokens, shape (count, context + 1), drawn where `place` says, and nothing else."""
    starts = torch.randint(len(tokens) - context, (count,), generator=generator_for(*place))
    return tokens[starts.unsqueeze(1) + torch.arange(context + 1)]


def windows(tokens: Tensor, context: int, most: int | None = None) -> Tensor:
    """Windows of context + 1 tokens, each beginning with the last token of the one before: shape (N, context + 1).

    Every token but the first is predicted once, and those after the last whole window are left out. With `most`,
    that many of them, spread evenly over the part.
    """
    found = tokens.unfold(0, context + 1, context)
    if most is not None and most < len(found):
        found = found[torch.linspace(0, len(found) - 1, most).long()]
    return found.contiguous()
