"""Sigsoftmax, an output activation that is no longer limited to the rank of its logits.

Plain, differentiable PyTorch: it needs as much memory as `torch.log_softmax`, and runs under autograd to any order,
`torch.func`, forward-mode differentiation and `torch.compile`. Relies on `spec`; `mixtures` relies on it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .spec import LOGITS_DTYPES, integer

__all__ = ["log_sigsoftmax", "sigsoftmax"]


def sigsoftmax(z: Tensor, dim: int = -1) -> Tensor:
    r"""Class probabilities proportional to exp(z) sigmoid(z): what `torch.softmax` is for exp(z).

    .. math:: p_k = \frac{e^{z_k} \sigma(z_k)}{\sum_j e^{z_j} \sigma(z_j)} = \mathrm{softmax}(u)_k, \qquad
              u = z + \log \sigma(z), \qquad \frac{du}{dz} = 1 + \sigma(-z)

    A constant added to z changes p: for large ones p is softmax(z), for very negative ones softmax(2 z). u grows with
    z, so the order of the classes is that of z.

    The logarithm of p is no linear function of z. Where z has rank d (contexts times classes), log softmax(z) has at
    most rank d + 1, whatever the number of classes; log sigsoftmax(z) has no such bound.

    Args:
        z: logits of any shape, float32, float64, bfloat16 or float16. Entries at -inf have probability and gradient
            0. A slice with nothing else is NaN, as in `torch.softmax`.
        dim: the dimension of the classes, along which the result sums to 1.

    Returns:
        Probabilities, of the shape and dtype of z. Computed in float32 for bfloat16 and float16, and rounded once.
        Finite where 2 z is finite in the dtype of the computation.

    Raises:
        TypeError: z is not a tensor, or dim not an int.
        NotImplementedError: z is of another dtype.
        IndexError: z has no dimension `dim`.

    Source: Kanai et al., "Sigsoftmax: Reanalysis of the Softmax Bottleneck", NeurIPS 2018 (arXiv 1805.10829).
    """
    return torch.softmax(_checked_exponents(z, dim), dim).to(z.dtype)


def log_sigsoftmax(z: Tensor, dim: int = -1) -> Tensor:
    r"""The logarithm of `sigsoftmax`, where the latter would be 0: what `torch.log_softmax` is for `torch.softmax`.

    .. math:: \log p_k = u_k - \log \sum_j e^{u_j}, \qquad u = z + \log \sigma(z) = 2 z - \log(1 + e^z)

    As logits of `fused_drsl_loss` it makes any of the losses one of sigsoftmax, with loss and label gradient exact on
    saturated rows. By itself it is as exact as `torch.log_softmax`: the likeliest class, close to 0, has an absolute
    error of a rounding unit.

    Arguments, result and errors are those of `sigsoftmax`. Values are finite except at entries of -inf, which stay.
    """
    return torch.log_softmax(_checked_exponents(z, dim), dim).to(z.dtype)


def exponents(z: Tensor) -> Tensor:
    """u = z + log sigmoid(z), at least in float32: sigsoftmax(z) = softmax(u)."""
    z = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    # With beta = -1 softplus is log sigmoid. Unlike logsigmoid it keeps nothing but z for the backward pass. Beyond
    # the threshold it returns z: exp(-40) is below the rounding of 40 even in float64.
    return softplus(z, beta=-1, threshold=40) + z


def _checked_exponents(z: object, dim: object) -> Tensor:
    if not isinstance(z, Tensor):
        raise TypeError(f"z must be a Tensor, got {type(z).__name__}")
    if z.dtype not in LOGITS_DTYPES:
        raise NotImplementedError(f"z must be float32, float64, bfloat16 or float16, got {z.dtype}")
    dimensions = max(z.dim(), 1)
    if not -dimensions <= integer("dim", dim) < dimensions:
        raise IndexError(f"dim must be in [{-dimensions}, {dimensions - 1}] for z of shape {tuple(z.shape)}, got {dim}")
    return exponents(z)
