"""Mixtures of softmax or sigsoftmax: output layers whose log-probabilities are not limited to the rank of the logits.

Both are one module with another activation. Their logarithms of probabilities are logits to every loss of this package.
Relies on `activations` and `functional`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from .activations import exponents
from .checks import inside_function_transform
from .functional import fused_drsl_loss
from .spec import BackendName, Distance, Reduction, integer

__all__ = ["MixtureOfSigsoftmax", "MixtureOfSoftmax"]

# Logits, of all components together, that are computed at a time: some multiple of them fits into a CPU's cache, and
# elsewhere they are enough to occupy the device.
BLOCK = {"cpu": 2**22}
DEFAULT_BLOCK = 2**27


class _Mixture(nn.Module):
    """What both mixtures share: everything but the activation, `log_activation`."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        classes: int,
        components: int,
        *,
        width: int | None = None,
        embedding: nn.Parameter | None = None,
        bias: bool = True,
        checkpoint: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = _positive("features", features)
        self.classes = _positive("classes", classes)
        self.components = _positive("components", components)
        if embedding is not None:
            _check_embedding(embedding, self.classes, width)
            device, dtype = device or embedding.device, dtype or embedding.dtype
            width = embedding.shape[1]
        self.width = self.features if width is None else _positive("width", width)
        self.checkpoint = checkpoint
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.prior = nn.Linear(self.features, self.components, bias=False, **where)
        self.latent = nn.Linear(self.features, self.components * self.width, **where)
        if embedding is None:
            embedding = nn.Parameter(torch.empty(self.classes, self.width, **where).uniform_(-0.1, 0.1))
        self.weight = embedding
        self.bias = nn.Parameter(torch.zeros(self.classes, **where)) if bias else None

    @staticmethod
    def log_activation(logits: Tensor) -> Tensor:
        """Logarithms of class probabilities over the last dimension, float32 or float64."""
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        """Logarithms of the class probabilities, shape (..., classes), of `hidden`, shape (..., features)."""
        if not isinstance(hidden, Tensor):
            raise TypeError(f"hidden must be a Tensor, got {type(hidden).__name__}")
        if hidden.dim() == 0 or hidden.shape[-1] != self.features:
            raise ValueError(f"hidden must have shape (..., {self.features}), got {tuple(hidden.shape)}")
        rows = hidden.reshape(-1, self.features)
        contexts = self.latent(rows).tanh().unflatten(-1, (self.components, self.width))
        priors = self.prior(rows)
        log_priors = priors.to(_accumulator(priors.dtype)).log_softmax(-1)
        # Under autocast the layers' results have its dtype, and what meets them must have it, too.
        weight = self.weight.to(contexts.dtype)
        bias = None if self.bias is None else self.bias.to(contexts.dtype)
        size = self._rows_at_once(len(rows), rows.device.type)
        blocks = zip(contexts.split(size), log_priors.split(size), strict=True)
        parts = [self._block(*block, weight, bias) for block in blocks]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        return mixed.reshape(*hidden.shape[:-1], self.classes)

    def loss(
        self,
        hidden: Tensor,
        y: Tensor,
        tau: Tensor | float = 0.0,
        *,
        distance: Distance = "uniform",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        backend: BackendName | None = None,
    ) -> Tensor:
        """`fused_drsl_loss` of the mixture: cross-entropy plus tau times the distance, of its probabilities.

        Args:
            hidden: shape (..., features).
            y: class indices, shape (...), or class probabilities, shape (..., classes).
            tau: a float, a tensor of shape (), or one value per row, shape (...).

        The other arguments are those of `fused_drsl_loss`. With reduction="none" the loss has shape (...).
        """
        log_p = self(hidden)
        rows = log_p.shape[:-1]
        if isinstance(y, Tensor) and y.shape not in (rows, log_p.shape):
            want = f"{tuple(rows)} (or {tuple(log_p.shape)} for class probabilities)"
            raise ValueError(
                f"y must have shape {want} for hidden of shape {tuple(hidden.shape)}, got {tuple(y.shape)}"
            )
        if isinstance(tau, Tensor) and tau.shape not in ((), rows):
            raise ValueError(f"tau must have shape () or that of y, {tuple(rows)}, got {tuple(tau.shape)}")
        if len(rows) > 1:
            log_p, y = log_p.flatten(0, -2), y.flatten(0, len(rows) - 1)
            tau = tau.flatten() if isinstance(tau, Tensor) and tau.dim() > 0 else tau
        losses = fused_drsl_loss(
            log_p,
            y,
            tau,
            distance=distance,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            backend=backend,
        )
        return losses.reshape(rows) if reduction == "none" else losses

    def extra_repr(self) -> str:
        """The sizes, and what differs from the defaults."""
        shown = [f"{name}={getattr(self, name)}" for name in ("features", "classes", "components", "width")]
        shown += ["bias=False"] * (self.bias is None) + ["checkpoint=True"] * self.checkpoint
        return ", ".join(shown)

    def _rows_at_once(self, rows: int, device: str) -> int:
        """A compiler fuses by itself, and would take the number of blocks for a constant."""
        if torch.compiler.is_compiling():
            return rows
        return max(1, BLOCK.get(device, DEFAULT_BLOCK) // (self.components * self.classes))

    def _block(self, contexts: Tensor, log_priors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Of some rows: contexts (n, components, width) and log_priors (n, components) to (n, classes)."""
        # Checkpoints are made of saved-tensor hooks, which torch.func does not have.
        if self.checkpoint and torch.is_grad_enabled() and not inside_function_transform():
            arguments = (contexts, log_priors, weight, bias)
            mixed: Tensor = checkpointed(self._mix, *arguments, use_reentrant=False, preserve_rng_state=False)
            return mixed
        return self._mix(contexts, log_priors, weight, bias)

    def _mix(self, contexts: Tensor, log_priors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        log_p = self.log_activation(F.linear(contexts, weight, bias))
        return torch.logsumexp(log_p + log_priors.unsqueeze(-1), 1)


class MixtureOfSoftmax(_Mixture):
    r"""A mixture of softmaxes as output layer.

    .. math:: \log p = \log \sum_{k=1}^K \pi_k \, \mathrm{softmax}(E c_k + b), \qquad
              c_k = \tanh(W_k h + v_k), \qquad \pi = \mathrm{softmax}(U h)

    of hidden states h. E, the embedding of the classes, and b are shared by all components. The layers and their
    start are those of the authors' code; of its regularisers (dropout of h and c) there is none in here.

    The sum is taken over logarithms (the authors' code adds 1e-8 to p), so that every log-probability is finite, and
    `fused_drsl_loss` of them keeps its precision on saturated rows. They are logits to each loss: their log-softmax is
    they themselves. To leave classes out, fill them with -inf: the losses are then those of the others' share.

    Rows are computed in blocks. For the backward pass all K components of all N rows are kept, about 2 K times the
    size of the result (3 K with sigsoftmax), or with `checkpoint` none of them: each block is computed again.

    Args:
        features: size of h.
        classes: number of classes C.
        components: number of components K.
        width: size of c_k; that of `features` unless given.
        embedding: E, an `nn.Parameter` of shape (classes, width), to share it with the layer that it comes from
            (``nn.Embedding(...).weight``); a new one where None. The other parameters get its device and dtype
            unless these are given.
        bias: whether there is a b.
        checkpoint: keep nothing of the size of K times N times C, compute it again in the backward pass instead.
        device, dtype: of the parameters.

    Called with h of shape (..., features) it returns log p of shape (..., classes): float64 for float64, float32 for
    float32, bfloat16 and float16. Inside ``torch.compile`` all rows are one block.

    Raises:
        ValueError: a size below 1, an embedding of another shape, h or y of a wrong shape.
        TypeError: a size that is not an int, an embedding that is not an `nn.Parameter`, h that is not a tensor.

    Source: Yang et al., "Breaking the Softmax Bottleneck: A High-Rank RNN Language Model", ICLR 2018 (arXiv
    1711.03953), and github.com/zihangdai/mos.
    """

    @staticmethod
    def log_activation(logits: Tensor) -> Tensor:
        """log softmax over the last dimension, float32 or float64."""
        return logits.log_softmax(-1, dtype=_accumulator(logits.dtype))


class MixtureOfSigsoftmax(_Mixture):
    r"""A mixture of sigsoftmaxes as output layer: `MixtureOfSoftmax` with `sigsoftmax` for its softmax.

    .. math:: \log p = \log \sum_{k=1}^K \pi_k \, \mathrm{sigsoftmax}(E c_k + b)

    Arguments, results and errors are those of `MixtureOfSoftmax`. With one component it is a sigsoftmax layer.

    Source: Kanai et al., "Sigsoftmax: Reanalysis of the Softmax Bottleneck", NeurIPS 2018 (arXiv 1805.10829).
    """

    @staticmethod
    def log_activation(logits: Tensor) -> Tensor:
        """log sigsoftmax over the last dimension, float32 or float64."""
        return exponents(logits).log_softmax(-1)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _positive(argument: str, value: object) -> int:
    number = integer(argument, value)
    if number < 1:
        raise ValueError(f"{argument} must be at least 1, got {number}")
    return number


def _check_embedding(embedding: object, classes: int, width: int | None) -> None:
    if not isinstance(embedding, nn.Parameter):
        raise TypeError(f"embedding must be an nn.Parameter, such as nn.Embedding(...).weight, got {embedding!r}")
    expected = f"({classes}, {'width' if width is None else width})"
    if embedding.dim() != 2 or embedding.shape[0] != classes or width not in (None, embedding.shape[1]):
        raise ValueError(f"embedding must have shape {expected}, got {tuple(embedding.shape)}")
