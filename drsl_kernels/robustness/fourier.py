"""The single Fourier attack: one wave, the same for all images, that changes what a network says of them.

It looks at every frequency of an image, and needs no gradient. Relies on `attacks` for its checks of samples and
models; `attack_objects`, `attack_names`, `evaluate` and `attack_run` rely on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from drsl_kernels.spec import integer, number

from .attacks import Model, Norm, check_samples, checked_logits, evaluation_mode, largest_label

__all__ = ["FourierAttack", "FourierSweep", "SettledFourier", "fourier_direction", "single_fourier_attack"]


def fourier_direction(
    l: int,  # noqa: E741 - the papers' symbol
    m: int,
    height: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""A wave over an image, real, of one frequency, scaled so that its largest entry is 1 in size.

    .. math:: d_{a b} = \frac{\cos t - \sin t}{\max |\cos t - \sin t|}, \qquad
        t = 2 \pi \left(\frac{l a}{H} + \frac{m b}{W}\right)

    a is the row, b the column. cos t - sin t is half of (1 + i) F + (1 - i) conj(F), with F = exp(i t) the Fourier
    basis function of the frequency (l, m) and conj(F) that of (-l, -m): a wave whose phase is an eighth of a turn ahead
    of the cosine. The direction of (-l, -m) is its mirror image, cos t + sin t: the same wave, a quarter of a turn
    behind. At (0, 0) all entries are 1. Elsewhere they sum to 0.

    Args:
        l, m: frequency downwards and to the right, in waves per image. Those that differ by `height` and `width`, or
            a multiple, are the same.
        height, width: of the image, H and W; 1 or more.
        dtype, device: of the result; it is computed in float64.

    Returns:
        Shape (height, width), largest entry exactly 1 in size.

    Raises:
        TypeError, ValueError: a number that is no integer, a size below 1, or a dtype that is not a floating one.

    Source: Tsuzuku & Sato, "On the Structural Sensitivity of Deep Convolutional Networks to the Directions of Fourier
    Basis Functions", CVPR 2019, arXiv 1809.04098. Its abstract alone was at hand; the combination of F and conj(F) is
    the one that a public implementation gives for it.
    """
    for name, value in {"l": l, "m": m, "height": height, "width": width}.items():
        integer(name, value)
    if min(height, width) < 1:
        raise ValueError(f"height and width must be 1 or more, got {height!r} and {width!r}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating one, got {dtype}")
    frequency = torch.tensor([l % height * width + m % width])
    return _Waves(height, width, torch.device("cpu"))(frequency)[0].to(device=device, dtype=dtype)


@dataclass(frozen=True)
class FourierSweep:
    """What every frequency does to the images of one model, and which does most.

    Attributes:
        eps: the radius.
        samples: how many images there were, N.
        fooled: int64 (2, H, W), on the CPU: of how many images the prediction changed. [0] is of eps times
            `fourier_direction` (l, m) = (row, column), [1] of -eps times it; frequencies above H / 2 and W / 2 are the
            negative ones.
        errors: int64 (2, H, W), on the CPU: how many images were misclassified.
        frequency: the worst (l, m), l from -H / 2 to below H / 2 and m likewise: the one that fools most images; of
            several that misclassifies most; of several the first row by row.
        sign: 1 or -1: what its direction is multiplied with, besides eps.
        images: shape, dtype and device of x: all images with that one perturbation, within the bounds.
    """

    eps: float
    samples: int
    fooled: Tensor
    errors: Tensor
    frequency: tuple[int, int]
    sign: int
    images: Tensor

    def fooling_rate(self) -> Tensor:
        """float64 (H, W): the share of images whose prediction changed, under the worse of the two signs."""
        return self.fooled.amax(0).double() / self.samples

    def error_rate(self) -> Tensor:
        """float64 (H, W): the share of images that were misclassified, under the worse of the two signs."""
        return self.errors.amax(0).double() / self.samples


def single_fourier_attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
) -> FourierSweep:
    """Add the wave of each frequency to all images, up and down, and find the one that fools the model most.

    The perturbation is eps times `fourier_direction`, or minus that: the same for all images and channels, with
    largest entry eps before images are clipped to the bounds. All height * width frequencies are tried with both
    signs, for no two of these perturbations are the same: (l, m) and (-l, -m) are waves a quarter of a turn apart.
    So the model looks at each image 2 * height * width + 1 times, in evaluation mode if it is an ``nn.Module``. No
    gradient is taken.

    Args:
        model: maps x to logits of shape (N, C), C >= 2. Any callable will do.
        x: images, shape (N, channels, height, width), floating point, inside `bounds`. Never written.
        y: true classes, shape (N,), int64; they decide the error rate, and have no part in the fooling rate.
        eps: the largest change of a pixel, in the units of x; 0 or more.
        bounds: smallest and largest value that a pixel may take.
        batch_size: how many perturbed images the model sees at a time: of few images with several perturbations, of
            many a part with one. Memory is bounded by it.
        on_progress: called with (looked at, to look at) after each batch, in perturbed images.

    Returns:
        The counts of every frequency and the images under the worst.

    Raises:
        ValueError: eps or batch_size out of range, x not of such a shape, empty or outside `bounds`, shapes that do not
            fit.
        TypeError, IndexError: as `attacks.pgd`.
        FloatingPointError: the model's logits are NaN.

    Source: as of `fourier_direction`.
    """
    eps = number("eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be 0 or more and finite, got {eps!r}")
    if integer("batch_size", batch_size) < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size!r}")
    check_samples(x, y, bounds)
    if x.dim() != 4 or not x.numel():
        raise ValueError(f"x must have shape (N, channels, height, width) with one image or more, got {tuple(x.shape)}")
    height, width = x.shape[2:]
    shifts = _Shifts(eps, _Waves(height, width, x.device), x.dtype)
    predict = partial(_predictions, partial(checked_logits, model, largest={"y": largest_label(y)}))
    with evaluation_mode(model), torch.no_grad():
        counts = _counts(predict, x, y, shifts, bounds, batch_size, on_progress)
    fooled, errors = counts.view(2, 2, height, width)
    sign, row, column = _worst(fooled, errors)
    worst = torch.tensor([(sign * height + row) * width + column], device=x.device)
    return FourierSweep(
        eps=eps,
        samples=len(y),
        fooled=fooled,
        errors=errors,
        frequency=(_centred(row, height), _centred(column, width)),
        sign=1 - 2 * sign,
        images=_perturbed(x.detach(), shifts(worst), bounds),
    )


@dataclass(frozen=True)
class FourierAttack:
    """`single_fourier_attack` for any radius, to stand beside other attacks.

    One perturbation for all images that are attacked together: the worst frequency is chosen on them, on those that
    still stand where attacks come one after another, and an image falls if that one fools the model. It is not the
    worst case over frequencies, image by image.
    """

    norm: ClassVar[Norm] = "linf"
    restarts: ClassVar[int] = 1
    black_box: ClassVar[bool] = True
    name: ClassVar[str] = "fourier"

    def settle(
        self, model: Model, x: Tensor, y: Tensor, *, eps: float, bounds: tuple[float, float], batch_size: int
    ) -> SettledFourier:
        """The attack with the frequency that is the worst for all of x."""
        return SettledFourier(single_fourier_attack(model, x, y, eps=eps, bounds=bounds, batch_size=batch_size))

    def start(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        eps: float,
        bounds: tuple[float, float],
        generator: torch.Generator | None,
    ) -> Tensor:
        """The images under the frequency that is the worst for them."""
        return single_fourier_attack(model, x, y, eps=eps, bounds=bounds).images


@dataclass(frozen=True)
class SettledFourier:
    """The wave that a sweep found to be the worst, for any radius, whatever the model."""

    sweep: FourierSweep

    norm: ClassVar[Norm] = "linf"
    restarts: ClassVar[int] = 1
    black_box: ClassVar[bool] = True
    name: ClassVar[str] = "fourier"

    def start(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        eps: float,
        bounds: tuple[float, float],
        generator: torch.Generator | None,
    ) -> Tensor:
        l, m = self.sweep.frequency  # noqa: E741
        direction = fourier_direction(l, m, x.shape[2], x.shape[3], dtype=x.dtype, device=x.device)
        return _perturbed(x.detach(), (self.sweep.sign * eps * direction).unsqueeze(0), bounds)

    def found(self) -> dict[str, Any]:
        """Frequency and sign, the images that it was chosen on, and of how many each frequency, under the worse of the
        two signs, changed the prediction; numbers and lists, as JSON gives them back.
        """
        return {
            "frequency": list(self.sweep.frequency),
            "sign": self.sweep.sign,
            "samples": self.sweep.samples,
            "fooled": self.sweep.fooled.amax(0).tolist(),
        }


def _counts(
    predict: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    y: Tensor,
    shifts: _Shifts,
    bounds: tuple[float, float],
    batch_size: int,
    on_progress: Callable[[int, int], None] | None,
) -> Tensor:
    """How many images each shift fools, and how many are misclassified under it: (2, shifts), on the CPU."""
    counts = torch.zeros(2, len(shifts), dtype=torch.int64, device=x.device)
    everything = torch.arange(len(shifts), device=x.device)
    nan = torch.zeros((), dtype=torch.bool, device=x.device)  # looked at in the end: a GPU would have to wait
    looked = 0
    for images, labels in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
        clean, bad = predict(images)
        nan |= bad
        for which in torch.split(everything, max(1, batch_size // len(labels))):
            found, bad = predict(_perturbed(images, shifts(which), bounds))
            nan |= bad
            classes = found.view(len(which), len(labels))
            counts[0, which] += (classes != clean).sum(1)
            counts[1, which] += (classes != labels).sum(1)
            looked += classes.numel()
            if on_progress is not None:
                on_progress(looked, len(shifts) * len(y))
    if nan:
        raise FloatingPointError("the model's logits are NaN; look at its weights")
    return counts.cpu()


class _Waves:
    """Directions by index, row by row of frequencies. As many as pixels, they are made when they are needed."""

    def __init__(self, height: int, width: int, device: torch.device) -> None:
        self.height, self.width = height, width
        # Of whole turns a remainder counts, in integers: equal frequencies give equal bits, on every device.
        t = torch.arange(height * width).double() * (2 * math.pi / (height * width))
        self.values = (t.cos() - t.sin()).to(device)
        self.rows = torch.arange(height, device=device).unsqueeze(1)
        self.columns = torch.arange(width, device=device)

    def __call__(self, which: Tensor) -> Tensor:
        """Indices (P,) -> float64 (P, height, width)."""
        l = (which // self.width).view(-1, 1, 1)  # noqa: E741
        m = (which % self.width).view(-1, 1, 1)
        turns = (l * self.width * self.rows + m * self.height * self.columns) % len(self.values)
        waves = self.values[turns]
        return waves / waves.abs().amax((1, 2), keepdim=True)


@dataclass(frozen=True)
class _Shifts:
    """All perturbations by index: eps times each direction, then minus eps times each."""

    eps: float
    waves: _Waves
    dtype: torch.dtype

    def __len__(self) -> int:
        return 2 * len(self.waves.values)

    def __call__(self, which: Tensor) -> Tensor:
        """Indices (P,) -> (P, height, width)."""
        signs = 1 - 2 * (which // len(self.waves.values)).to(self.dtype)
        directions = self.waves(which % len(self.waves.values)).to(self.dtype)
        return self.eps * signs.view(-1, 1, 1) * directions


def _perturbed(x: Tensor, shifts: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Every image under every shift (P, height, width), within the bounds: (P * N, channels, height, width)."""
    return (x + shifts[:, None, None]).clamp_(*bounds).flatten(0, 1)


def _predictions(look: Model, points: Tensor) -> tuple[Tensor, Tensor]:
    """The class of the largest logit of each point, and whether any logit is NaN."""
    logits = look(points)
    return logits.argmax(1), logits.isnan().any()


def _worst(fooled: Tensor, errors: Tensor) -> tuple[int, int, int]:
    """Index of the sign, row and column of the worst frequency; with several of one kind the first."""
    most = int(errors.max()) + 1
    index = int((fooled * most + errors).flatten().argmax())
    sign, place = divmod(index, fooled[0].numel())
    return sign, *divmod(place, fooled.shape[2])


def _centred(index: int, size: int) -> int:
    """The frequency from -size / 2 to below size / 2 that is the same."""
    return index if 2 * index < size else index - size
