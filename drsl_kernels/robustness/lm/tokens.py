"""Text as numbers and back: bytes, or byte-pair encoding (BPE) learned from the training part alone.

Both lose nothing, and both know how many bytes a token stands for, so that models with either can be compared in bits
per byte. Relies on the package tokenizers for BPE; `corpus` relies on it.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from ..storage import write_atomically

if TYPE_CHECKING:
    import tokenizers

__all__ = ["LEAST_VOCABULARY", "TOKENS", "BPETokens", "ByteTokens", "Tokens", "TokensName"]

TokensName: TypeAlias = Literal["bytes", "bpe"]
TOKENS: Final[tuple[str, ...]] = get_args(TokensName)
LEAST_VOCABULARY: Final = 256  # BPE begins with every byte


class Tokens(Protocol):
    """A way to write text as numbers."""

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""

    @property
    def digest(self) -> str:
        """What tells it from another one."""

    def encode(self, text: bytes) -> Tensor:
        """The tokens of a text, int64, shape (T,)."""

    def decode(self, tokens: Tensor) -> bytes:
        """The text of tokens."""

    def byte_lengths(self) -> Tensor:
        """How many bytes each token of the vocabulary stands for, int64."""


class ByteTokens:
    """One token for each byte: 256 of them, any file will do."""

    vocabulary: Final = 256
    digest: Final = "bytes"

    def encode(self, text: bytes) -> Tensor:
        """The bytes as int64, shape (T,)."""
        if not text:
            return torch.empty(0, dtype=torch.int64)
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def decode(self, tokens: Tensor) -> bytes:
        """The inverse of `encode`."""
        return bytes(tokens.tolist())

    def byte_lengths(self) -> Tensor:
        """All of them 1."""
        return torch.ones(256, dtype=torch.int64)


class BPETokens:
    """Byte-pair encoding: frequent strings become one token each; of text in UTF-8, without unknown characters.

    Args:
        tokenizer: of the package tokenizers, at the level of bytes, as `train` and `load` make it.

    Source: Sennrich et al., arXiv 1508.07909; over bytes as in GPT-2.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    @staticmethod
    def train(text: bytes, vocabulary: int) -> BPETokens:
        """Learn a vocabulary of at most so many tokens from a text, the training part.

        Raises:
            ModuleNotFoundError: the package tokenizers is not installed.
            ValueError: fewer than 256 tokens, which the bytes themselves need, or a text that is not UTF-8.
        """
        _needs_package()
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if vocabulary < LEAST_VOCABULARY:
            raise ValueError(f"vocabulary must be {LEAST_VOCABULARY} or more, got {vocabulary!r}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(_as_text(text).splitlines(keepends=True), trainer)
        return BPETokens(tokenizer)

    @staticmethod
    def load(path: Path) -> BPETokens:
        """What `save` wrote.

        Raises:
            ValueError: the file is missing, or is no tokenizer.
        """
        _needs_package()
        from tokenizers import Tokenizer

        try:
            return BPETokens(Tokenizer.from_file(str(path)))
        except Exception as error:  # the package raises Exception itself
            raise ValueError(f"{path} is no tokenizer: {error}") from error

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_atomically(path, lambda temporary: self._tokenizer.save(str(temporary)))

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return self._tokenizer.get_vocab_size()

    @property
    def digest(self) -> str:
        """The sha256 of its merges and tokens."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: bytes) -> Tensor:
        """The tokens of a text in UTF-8, int64, shape (T,). ValueError for other text."""
        return torch.tensor(self._tokenizer.encode(_as_text(text)).ids, dtype=torch.int64)

    def decode(self, tokens: Tensor) -> bytes:
        """The inverse of `encode`; bytes that are no UTF-8, which other tokens may give, are replaced."""
        text: str = self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        return text.encode()

    def byte_lengths(self) -> Tensor:
        """How many bytes each token stands for: a letter each, in the alphabet that its vocabulary is written in."""
        names = (self._tokenizer.id_to_token(token) for token in range(self.vocabulary))
        return torch.tensor([len(name or "") for name in names], dtype=torch.int64)


def _needs_package() -> None:
    if find_spec("tokenizers") is None:
        raise ModuleNotFoundError("tokens 'bpe' need the package tokenizers: pip install 'drsl_kernels[lab]'")


def _as_text(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"BPE needs text in UTF-8, and byte {error.start} of a part is {text[error.start : error.start + 1]!r}; "
            "tokens 'bytes' take any file"
        ) from error
