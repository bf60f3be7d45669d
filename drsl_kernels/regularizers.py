"""Penalties on convolution weights, and the proximal steps that stand in for their gradients: Absum, and L1 beside it.

A penalty that is not differentiable at its minimum is better left to a proximal step after that of the optimizer: it
reaches the minimum exactly, where gradients would jump around it, and costs no backward pass. Relies on torch and on
the checks of numbers in `spec`; `robustness.optimisation` relies on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from .spec import number

__all__ = ["L1", "Absum", "absum_penalty", "absum_step", "l1_penalty", "l1_step"]


def absum_penalty(model: nn.Module | Iterable[nn.Module]) -> Tensor:
    r"""How much the kernels of a model's convolutions add up to: 0 where each of them sums to 0.

    .. math:: R(K) = \sum_{i, j} \left| \sum_a K_{i j a} \right|

    The first sum is over the pairs of an output and an input channel that a kernel connects, in every convolution of
    the model; a runs over the entries of the kernel. With groups these are the pairs within each group, for the others
    have no kernel. Stride, padding and dilation make no difference; of 1x1 kernels it is the L1 norm. Each sum is what
    the convolution answers to an input that is 1 everywhere. Since it is bounded by the L1 norm, a small R asks less of
    a kernel than a small L1 norm: large entries may stay where they cancel.

    Args:
        model: a module, or several. Looked at are all of `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` and their transposed
            forms in them, each weight once, without biases.

    Returns:
        A scalar in the widest dtype of the weights, float32 at least. Where a kernel sums to 0 its gradient is 0.

    Raises:
        TypeError: `model` is no module and holds none, or weights are not of a floating dtype.
        ValueError: there is no convolution, or one whose weight is not initialized.

    Source: Kanai et al., "Absum: Simple Regularization Method for Reducing Structural Sensitivity of Convolutional
    Neural Networks", AAAI 2020, arXiv 1909.08830. What was at hand of it is abstract and introduction.
    """
    return _total([_kernel_sums(weight).abs().sum() for weight in _weights(_convolutions(model))])


def absum_step(model: nn.Module | Iterable[nn.Module], t: float) -> None:
    r"""The proximal step of `absum_penalty`, in place: each kernel moves towards one that sums to 0.

    .. math:: \mathrm{prox}_{t R}(K) = K - \min(\max(\bar K, -t), t)

    That is the X at which t R(X) plus half of the squared Euclidean distance of X from K is smallest.

    The mean of the n entries of a kernel is subtracted from each of them, or t where the mean is above t, or -t where
    it is below -t: K - t if the sum is above n t, K + t if it is below -n t, else K - sum / n. A kernel that sums to 0
    stays as it is. Weights that require no gradient stay, too.

    Args:
        model: as in `absum_penalty`.
        t: learning rate times the weight of the penalty; 0 or more. The step belongs after that of the optimizer.

    Raises:
        TypeError, ValueError: as `absum_penalty`; t negative or not finite; a weight that is computed from other
            tensors (`torch.nn.utils.parametrize`), for which only the penalty is of use.

    Source: as of `absum_penalty`.
    """
    _absum_step(_parameters(_convolutions(model)), _checked("t", t))


def l1_penalty(model: nn.Module | Iterable[nn.Module]) -> Tensor:
    r"""The L1 norm of the weights of a model's convolutions, to compare `absum_penalty` with.

    .. math:: \|K\|_1 = \sum_{i, j, a} |K_{i j a}|

    Arguments, result and errors are those of `absum_penalty`, which is never larger. Biases and the weights of other
    layers do not count, so that both penalize the same numbers.
    """
    weights = _weights(_convolutions(model))
    return _total([weight.abs().sum(dtype=_wide(weight)) for weight in weights])


def l1_step(model: nn.Module | Iterable[nn.Module], t: float) -> None:
    r"""The proximal step of `l1_penalty`, in place: the soft threshold.

    .. math:: \mathrm{prox}_{t \|\cdot\|_1}(k) = \mathrm{sign}(k) \max(|k| - t, 0)

    Arguments and errors are those of `absum_step`.
    """
    _l1_step(_parameters(_convolutions(model)), _checked("t", t))


class _Regularizer:
    """A penalty on the convolutions that a model has now, with its weight."""

    def __init__(self, model: nn.Module | Iterable[nn.Module], strength: float) -> None:
        self.strength = _checked("strength", strength)
        self._convolutions = _convolutions(model)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._convolutions)} convolutions, strength={self.strength:g})"


class Absum(_Regularizer):
    """`absum_penalty` with a weight, for the convolutions of one model: ``Absum(model, 1e-4)``.

    Add ``absum.penalty()`` to the loss, or, which is exact and costs less, call ``absum.step(lr)`` after each
    ``optimizer.step()``; not both.

    Args:
        model: as in `absum_penalty`.
        strength: the weight of the penalty; 0 or more.

    Raises:
        TypeError, ValueError: as `absum_penalty`; strength negative or not finite.
    """

    def penalty(self) -> Tensor:
        """strength times `absum_penalty`."""
        return self.strength * absum_penalty(self._convolutions)

    def step(self, lr: float) -> None:
        """`absum_step` with t = lr times strength; `lr` is the learning rate of the optimizer's step."""
        _absum_step(_parameters(self._convolutions), _checked("lr", lr) * self.strength)


class L1(_Regularizer):
    """`l1_penalty` with a weight, for the convolutions of one model; used as `Absum` is.

    Args:
        model, strength: as in `Absum`.

    Raises:
        TypeError, ValueError: as `Absum`.
    """

    def penalty(self) -> Tensor:
        """strength times `l1_penalty`."""
        return self.strength * l1_penalty(self._convolutions)

    def step(self, lr: float) -> None:
        """`l1_step` with t = lr times strength; `lr` is the learning rate of the optimizer's step."""
        _l1_step(_parameters(self._convolutions), _checked("lr", lr) * self.strength)


def _absum_step(weights: list[Tensor], t: float) -> None:
    with torch.no_grad():
        for weight in weights:
            mean = _kernel_sums(weight, keepdim=True) / math.prod(weight.shape[2:])
            weight.sub_(mean.clamp_(-t, t))


def _l1_step(weights: list[Tensor], t: float) -> None:
    with torch.no_grad():
        for weight in weights:
            weight.sub_(weight.clamp(-t, t))


def _kernel_sums(weight: Tensor, *, keepdim: bool = False) -> Tensor:
    """The sum of each kernel's entries: the channels come first, whether a convolution is transposed or has groups."""
    return weight.sum(tuple(range(2, weight.dim())), keepdim=keepdim, dtype=_wide(weight))


def _convolutions(model: nn.Module | Iterable[nn.Module]) -> list[_ConvNd]:
    """The convolutions in a module or in several, each once."""
    if not isinstance(model, nn.Module | Iterable):
        raise TypeError(f"model must be a module or several, got {type(model).__name__}")
    modules = [model] if isinstance(model, nn.Module) else list(model)
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"model must be a module or several, got {type(module).__name__} among them")
    found = dict.fromkeys(part for module in modules for part in module.modules() if isinstance(part, _ConvNd))
    if not found:
        kinds = ", ".join(type(module).__name__ for module in modules) or "no module"
        raise ValueError(f"model must have a convolution, of nn.Conv1d to nn.Conv3d or transposed, got {kinds}")
    return list(found)


def _weights(convolutions: Iterable[_ConvNd]) -> list[Tensor]:
    """Their weights, each once though several convolutions may share it."""
    found: dict[int, Tensor] = {}
    for convolution in convolutions:
        weight: Tensor = convolution.weight
        if isinstance(weight, UninitializedParameter):
            raise ValueError(f"model must be initialized, by a first batch, got {convolution} without weights")
        if not weight.is_floating_point():
            raise TypeError(f"weights of convolutions must be of a floating dtype, got {weight.dtype} in {convolution}")
        found[id(weight)] = weight
    return list(found.values())


def _parameters(convolutions: Iterable[_ConvNd]) -> list[Tensor]:
    """Their weights as far as they are trained, to be written to."""
    weights = _weights(convolutions)
    for weight in weights:
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"weights of convolutions must be parameters, got one of shape {tuple(weight.shape)} that is computed "
                "from other tensors: add the penalty to the loss instead"
            )
    return [weight for weight in weights if weight.requires_grad]


def _total(penalties: list[Tensor]) -> Tensor:
    """Their sum, though models may lie on several devices."""
    total = penalties[0]
    for penalty in penalties[1:]:
        total = total + penalty.to(total.device)
    return total


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _checked(argument: str, value: float) -> float:
    if not 0 <= number(argument, value) < math.inf:
        raise ValueError(f"{argument} must be 0 or more and finite, got {value!r}")
    return float(value)
