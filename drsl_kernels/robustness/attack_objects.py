"""Attacks as objects: settings checked once, then called with a model, samples and classes as often as one likes.

Relies on `attacks` and `fourier`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drsl_kernels.spec import integer

from .attack_losses import AttackLoss, objective_of
from .attacks import Keep, Model, Norm, check_numbers, fgsm, pgd
from .fourier import single_fourier_attack

__all__ = ["FGSM", "PGD", "REACH", "SingleFourier"]

# How far all steps together may go, in units of eps: the value of Madry et al., enough to cross the ball.
REACH = 2.5


@dataclass(frozen=True, kw_only=True)
class PGD:
    """`pgd` with its settings: ``PGD(eps=8/255, steps=20)(model, x, y)`` gives the perturbed samples.

    Attributes:
        eps, steps, loss, norm, restarts, random_start, bounds, keep: as in `pgd`.
        alpha: step size, in the units of x; None for 2.5 * eps / steps.

    Raises:
        ValueError, TypeError: as `pgd`, when the object is made.
    """

    eps: float
    steps: int = 20
    alpha: float | None = None
    loss: AttackLoss = "log_odds"
    norm: Norm = "linf"
    restarts: int = 1
    random_start: bool = True
    bounds: tuple[float, float] = (0.0, 1.0)
    keep: Keep = "best"

    def __post_init__(self) -> None:
        objective_of(self.loss)
        alpha = 1.0 if self.alpha is None else self.alpha  # where it follows from the others, these are checked
        check_numbers(
            self.eps,
            alpha,
            self.steps,
            self.norm,
            self.restarts,
            self.random_start,
            self.bounds,
            self.keep,
        )

    def step_size(self) -> float:
        if self.alpha is not None:
            return self.alpha
        # In a ball of radius 0 any step leads back to its centre.
        return REACH * self.eps / max(1, self.steps) or 1.0

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        targeted: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x perturbed, as `pgd` returns it."""
        return pgd(
            model,
            x,
            y,
            eps=self.eps,
            alpha=self.step_size(),
            steps=self.steps,
            loss=self.loss,
            norm=self.norm,
            restarts=self.restarts,
            random_start=self.random_start,
            bounds=self.bounds,
            generator=generator,
            targeted=targeted,
            keep=self.keep,
        )


@dataclass(frozen=True, kw_only=True)
class FGSM:
    """`fgsm` with its settings: ``FGSM(eps=8/255)(model, x, y)`` gives the perturbed samples.

    Attributes:
        eps, loss, bounds: as in `fgsm`.

    Raises:
        ValueError, TypeError: as `pgd`, when the object is made.
    """

    eps: float
    loss: AttackLoss = "log_odds"
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        PGD(eps=self.eps, loss=self.loss, bounds=self.bounds)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, targeted: Tensor | None = None) -> Tensor:
        """x perturbed, as `fgsm` returns it."""
        return fgsm(model, x, y, eps=self.eps, loss=self.loss, bounds=self.bounds, targeted=targeted)


@dataclass(frozen=True, kw_only=True)
class SingleFourier:
    """`single_fourier_attack` with its settings: ``SingleFourier(eps=8/255)(model, x, y)`` gives the perturbed images.

    Attributes:
        eps, bounds, batch_size: as in `single_fourier_attack`.

    Raises:
        ValueError, TypeError: as `pgd`, when the object is made; batch_size below 1.
    """

    eps: float
    bounds: tuple[float, float] = (0.0, 1.0)
    batch_size: int = 256

    def __post_init__(self) -> None:
        PGD(eps=self.eps, bounds=self.bounds)
        if integer("batch_size", self.batch_size) < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size!r}")

    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """x under the one wave that fools the model on most of these images."""
        return single_fourier_attack(model, x, y, eps=self.eps, bounds=self.bounds, batch_size=self.batch_size).images
