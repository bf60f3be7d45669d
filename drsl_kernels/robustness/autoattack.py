"""The members of AutoAttack, of its authors' code, in the form of this package's attacks.

Relies on the package pyautoattack, which is imported when one of them is used; `attack_command` relies on it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from drsl_kernels.spec import integer

from .attacks import Model, Norm, check_generator, evaluation_mode
from .balls import project

__all__ = ["AUTOATTACK", "STANDARD", "AutoAttackMember", "require_package"]

AUTOATTACK: Final = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")

# What the authors call the standard version, in its order.
STANDARD: Final = ("apgd-ce", "apgd-t", "fab-t", "square")

_NORMS: Final = {"linf": "Linf", "l2": "L2"}

# The DLR loss compares with the third largest logit, its targeted form with the fourth.
_LEAST_CLASSES: Final = {"apgd-dlr": 3, "apgd-t": 4}

# The package warns of zero gradients here; `masking.gradients_vanish` counts them.
_LOGGER: Final = logging.getLogger("drsl_kernels.robustness.autoattack")
_LOGGER.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class AutoAttackMember:
    """One attack of AutoAttack, for any radius, with the authors' settings.

    ============ =========================================================================================
    ``apgd-ce``  PGD that adapts its step size, on `F.cross_entropy`
    ``apgd-dlr`` the same on the DLR loss; 3 classes or more
    ``apgd-t``   the same on the DLR loss towards each of `targets` classes; 4 classes or more
    ``fab``      looks for the nearest misclassified point; a gradient for each class at every step
    ``fab-t``    the same towards each of `targets` classes
    ``square``   random squares, no gradient; images only
    ============ =========================================================================================

    The package draws from the global random state; that is put back, and the draws follow from `generator`. It leaves
    gradients in parameters; here they accumulate nothing. It computes in float32. Points are put back into the ball,
    out of which rounding may carry them. Samples that it does not break are returned as they were.

    Attributes:
        member: one of `AUTOATTACK`.
        norm: "linf" or "l2".
        restarts: 1 in the standard version.
        steps: of APGD and FAB; 100 in the standard version.
        queries: how many points Square looks at, from each start; 5000 in the standard version.
        targets: classes of ``apgd-t`` and ``fab-t``; 9 in the standard version, and all wrong ones if there are fewer.

    Raises:
        ValueError: an unknown member or norm, or a number below 1; in use, bounds other than (0, 1), a model of too
            few classes, or samples that are no images.
        TypeError: a number that is no integer; in use, a generator that is none.
        ModuleNotFoundError: in use, pyautoattack is not installed.

    Source: Croce & Hein, arXiv 2003.01690; FAB: arXiv 1907.02044; Square: Andriushchenko et al., arXiv 1912.00049.
    """

    member: str
    norm: Norm = "linf"
    restarts: int = 1
    steps: int = 100
    queries: int = 5000
    targets: int = 9

    def __post_init__(self) -> None:
        if self.member not in AUTOATTACK:
            raise ValueError(f"member must be one of {', '.join(map(repr, AUTOATTACK))}, got {self.member!r}")
        if self.norm not in _NORMS:
            raise ValueError(f"norm must be one of {', '.join(map(repr, _NORMS))}, got {self.norm!r}")
        for argument in ("restarts", "steps", "queries", "targets"):
            if integer(argument, getattr(self, argument)) < 1:
                raise ValueError(f"{argument} must be 1 or more, got {getattr(self, argument)!r}")

    @property
    def name(self) -> str:
        return self.member

    @property
    def black_box(self) -> bool:
        return self.member == "square"

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
        """Points within eps of x: shape, dtype and device of x."""
        require_package()
        if tuple(bounds) != (0, 1):
            raise ValueError(f"bounds must be (0, 1), which {self.member} assumes, got {bounds!r}")
        if self.member == "square" and x.dim() != 4:
            raise ValueError(f"x must have shape (N, C, height, width) for square, got {tuple(x.shape)}")
        check_generator(generator)
        seed = int(torch.randint(2**31, (), generator=generator, device=x.device))
        devices = [x.device] if x.device.type == "cuda" else []
        # Leaving inference mode and copying makes tensors that autograd can record, wherever the caller is.
        with evaluation_mode(model), torch.inference_mode(False), torch.random.fork_rng(devices=devices):
            x, y = x.detach().clone(memory_format=torch.contiguous_format), y.clone()
            look = _Look(model, x.dtype)
            attack = self._attack(look, self._classes(look, x), eps, seed, x.device)
            with torch.enable_grad():
                found: Tensor = attack.perturb(x.float(), y)
        return project(found.to(x.dtype), x, eps, self.norm, (bounds[0], bounds[1]))

    def _classes(self, look: _Look, x: Tensor) -> int:
        with torch.no_grad():
            classes = look(x[:1]).shape[1]
        least = _LEAST_CLASSES.get(self.member, 2)
        if classes < least:
            raise ValueError(f"{self.member} needs a model of {least} classes or more, got {classes}")
        return classes

    def _attack(self, look: _Look, classes: int, eps: float, seed: int, device: torch.device) -> Any:
        from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
        from pyautoattack.fab_pt import FABAttack_PT
        from pyautoattack.square import SquareAttack

        shared = {"eps": eps, "norm": _NORMS[self.norm], "n_restarts": 1, "seed": seed, "device": device}
        targets = min(self.targets, classes - 1)
        if self.member == "square":
            return SquareAttack(look, n_queries=self.queries, p_init=0.8, resc_schedule=False, **shared)
        if self.member in ("fab", "fab-t"):
            towards = self.member == "fab-t"
            return FABAttack_PT(look, n_iter=self.steps, targeted=towards, n_target_classes=targets, **shared)
        if self.member == "apgd-t":
            return APGDAttack_targeted(look, n_iter=self.steps, n_target_classes=targets, logger=_LOGGER, **shared)
        return APGDAttack(look, n_iter=self.steps, loss=self.member.removeprefix("apgd-"), logger=_LOGGER, **shared)


def require_package() -> None:
    """Raise ModuleNotFoundError, which says what to install, where pyautoattack is missing."""
    try:
        import pyautoattack  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "pyautoattack":
            raise
        raise ModuleNotFoundError(
            "the attacks of AutoAttack need the package 'pyautoattack': pip install 'drsl_kernels[autoattack]'",
            name="pyautoattack",
        ) from error


@dataclass(frozen=True)
class _Look:
    """The model as the package may see it: gradients reach the input alone."""

    model: Model
    dtype: torch.dtype

    def __call__(self, points: Tensor) -> Tensor:
        if torch.is_grad_enabled() and points.requires_grad:
            logits: Tensor = _InputGradient.apply(points, self)  # type: ignore[no-untyped-call]
            return logits
        with torch.no_grad():
            # A copy: Square writes to the logits that it is given.
            return self.model(points.to(self.dtype)).float().clone()


class _InputGradient(torch.autograd.Function):
    """The model with a backward pass that stops at its input, however the caller asks for it.

    FAB calls `backward()`, several times for one forward pass, which would add to the gradients of the parameters.
    """

    @staticmethod
    def forward(ctx: Any, points: Tensor, look: _Look) -> Tensor:
        with torch.enable_grad():
            inputs = points.detach().requires_grad_()
            logits = look.model(inputs.to(look.dtype)).float()
        ctx.saved = inputs, logits
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        inputs, logits = ctx.saved
        (gradient,) = torch.autograd.grad(logits, inputs, upstream[0], retain_graph=True)
        return gradient.contiguous(), None
