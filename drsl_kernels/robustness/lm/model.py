"""A small GPT: a causal transformer over tokens, with any of the output layers that `losses` names.

It is taken in three parts, so that attacks can stand between them: `embed` gives vectors of tokens, `hidden` what the
transformer makes of them, `scores` logits whose softmax is the prediction. Relies on torch, `drsl_kernels`' mixtures
and `losses`; `engine`, `scoring` and the attacks rely on it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drsl_kernels import MixtureOfSigsoftmax, MixtureOfSoftmax, log_sigsoftmax

from .losses import HeadName, LanguageLoss, linear_head_loss

__all__ = ["GPT", "POSITIONS", "Positions", "Shape"]

Positions: TypeAlias = Literal["rotary", "learned"]
POSITIONS: Final[tuple[str, ...]] = get_args(Positions)

_HEADS: Final[tuple[str, ...]] = get_args(HeadName)
_STD: Final = 0.02  # of first weights, as in GPT-2
_BASE: Final = 10_000.0  # of the slowest rotation's wavelength, as in the paper


@dataclass(frozen=True)
class Shape:
    """What a model is made of.

    Attributes:
        vocabulary: number of tokens V.
        context: the longest sequence T that it reads.
        layers, heads, width: of the transformer; the width H is a multiple of the heads, of twice as many with rotary
            positions.
        positions: "rotary" turns queries and keys (Su et al., arXiv 2104.09864); "learned" adds a vector per position.
        tied: the output layer has the weights of the embedding.
        head: the output layer: "linear", "sigsoftmax", "mixture_of_softmax" or "mixture_of_sigsoftmax".
        components: of a mixture; others do without.

    Raises:
        ValueError: a size below 1, a width that does not divide, an unknown name.
    """

    vocabulary: int
    context: int = 128
    layers: int = 4
    heads: int = 4
    width: int = 128
    positions: Positions = "rotary"
    tied: bool = True
    head: HeadName = "linear"
    components: int = 4

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "layers", "heads", "width", "components"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)!r}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {self.positions!r}")
        if self.head not in _HEADS:
            raise ValueError(f"head must be one of {', '.join(_HEADS)}, got {self.head!r}")
        of = 2 * self.heads if self.positions == "rotary" else self.heads
        if self.width % of:
            raise ValueError(
                f"width must be a multiple of {of}, for {self.heads} heads with {self.positions} positions, "
                f"got {self.width!r}"
            )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class GPT(nn.Module):
    """A causal language model.

    Layer normalisation comes before each part of a block and once at the end, the linear layers have no biases, and
    attention is PyTorch's own `scaled_dot_product_attention`. Called with tokens (N, T) it returns scores (N, T, V),
    whose softmax is the prediction of the next token at each place; called with y and a loss, too, that mean loss.

    Args:
        shape: see `Shape`.
        seed: of the first weights. Models of the same seed that differ in their heads alone begin with the same
            transformer.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, for the layout and the first
    weights.
    """

    def __init__(self, shape: Shape, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        learned = shape.positions == "learned"
        self.positions = nn.Embedding(shape.context, shape.width) if learned else None
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, bias=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._first_weights()
            self.head = self._make_head()

    def forward(self, tokens: Tensor, y: Tensor | None = None, loss: LanguageLoss | None = None) -> Tensor:
        """tokens (N, T), int64 -> scores (N, T, V); with y (N, T) and a loss its mean over all tokens, a scalar."""
        hidden = self.hidden(self.embed(tokens))
        if y is None:
            return self.scores(hidden)
        return self.loss(hidden, y, LanguageLoss("ce") if loss is None else loss)

    def embed(self, tokens: Tensor) -> Tensor:
        """The vectors of tokens, (N, T) -> (N, T, H): the place where attacks on embeddings change them."""
        vectors: Tensor = self.embedding(tokens)
        return vectors

    def hidden(self, vectors: Tensor) -> Tensor:
        """What the transformer makes of embedded tokens, (N, T, H) -> (N, T, H). ValueError for T above the context."""
        length = vectors.shape[1]
        if length > self.shape.context:
            raise ValueError(f"a sequence must have at most {self.shape.context} tokens (context), got {length}")
        if self.positions is not None:
            vectors = vectors + self.positions.weight[:length]
        for block in self.blocks:
            vectors = block(vectors)
        out: Tensor = self.norm(vectors)
        return out

    def scores(self, hidden: Tensor) -> Tensor:
        """Logits of the softmax that the prediction is, (N, T, H) -> (N, T, V)."""
        if isinstance(self.head, (MixtureOfSoftmax, MixtureOfSigsoftmax)):
            mixed: Tensor = self.head(hidden)
            return mixed
        logits = F.linear(hidden, self._weight())
        return log_sigsoftmax(logits) if self.shape.head == "sigsoftmax" else logits

    def loss(self, hidden: Tensor, y: Tensor, loss: LanguageLoss) -> Tensor:
        """The mean loss, a scalar, of hidden (N, T, H) and targets (N, T). ValueError for a loss of another head."""
        if loss.head != self.shape.head:
            raise ValueError(f"loss {loss} needs a model with head {loss.head!r}, got {self.shape.head!r}")
        if isinstance(self.head, (MixtureOfSoftmax, MixtureOfSigsoftmax)):
            return self.head.loss(hidden, y)
        return linear_head_loss(hidden, self._weight(), y, loss)

    def _weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight  # type: ignore[return-value]

    def _make_head(self) -> nn.Module | None:
        """None where it is the embedding."""
        shape = self.shape
        if shape.head in ("linear", "sigsoftmax"):
            if shape.tied:
                return None
            linear = nn.Linear(shape.width, shape.vocabulary, bias=False)
            nn.init.normal_(linear.weight, std=_STD)
            return linear
        kind = MixtureOfSoftmax if shape.head == "mixture_of_softmax" else MixtureOfSigsoftmax
        tied: Any = self.embedding.weight if shape.tied else None  # an nn.Parameter
        return kind(shape.width, shape.vocabulary, shape.components, embedding=tied, bias=False)

    def _first_weights(self) -> None:
        """Normal numbers; those that add to the sum of the layers are smaller the more layers there are."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds = name.endswith(("attention.out.weight", "feed.out.weight"))
                nn.init.normal_(parameter, std=_STD / (2 * self.shape.layers) ** 0.5 if adds else _STD)


class _Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(shape.width, bias=False)
        self.attention = _Attention(shape)
        self.before_feed = nn.LayerNorm(shape.width, bias=False)
        self.feed = _Feed(shape.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        out: Tensor = x + self.feed(self.before_feed(x))
        return out


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.project = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.rotary = _Rotary(shape.context, shape.width // shape.heads) if shape.positions == "rotary" else None

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.project(x).chunk(3, dim=-1)
        )
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return out


class _Feed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(F.gelu(self.into(x)))
        return out


class _Rotary(nn.Module):
    """Turns pairs of features by angles that grow with the position, so that attention sees differences of them."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, context: int, features: int) -> None:
        super().__init__()
        speeds = _BASE ** (-torch.arange(0, features, 2) / features)
        angles = torch.outer(torch.arange(context), speeds)
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, heads, T, features)."""
        length = x.shape[-2]
        cosines, sines = self.cosines[:length], self.sines[:length]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cosines - b * sines, b * cosines + a * sines], dim=-1)
