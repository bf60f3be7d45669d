"""How values on the command line are written and checked. The commands rely on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import click

from .attack_names import canonical_names
from .loss_names import canonical_loss
from .losses import TrainingLoss

__all__ = ["Attacks", "Decorator", "Distance", "Folder", "Loss", "Losses", "Names", "Radii", "Tau", "check_radius"]

# A click that knows the type of a parameter's value is newer than the oldest that is supported.
if TYPE_CHECKING:
    _ParamType: TypeAlias = click.ParamType[Any]
else:
    _ParamType = click.ParamType

# What click.option gives.
Decorator: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]

_Parameter: TypeAlias = click.Parameter | None
_Context: TypeAlias = click.Context | None


class Folder(click.Path):
    """The path of a folder; an empty one, which would mean the current folder, is an error."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: _Parameter, ctx: _Context) -> Any:
        if value == "":
            self.fail("the name of the folder is empty; . is the current one", param, ctx)
        return super().convert(value, param, ctx)


class Names(_ParamType):
    """Names with commas between, each one of `known`, as a tuple without repetitions."""

    name = "names"

    def __init__(self, what: str, known: tuple[str, ...], aliases: Mapping[str, str] | None = None) -> None:
        self.what = what
        self.known = known
        self.aliases = aliases or {}

    def convert(self, value: Any, param: _Parameter, ctx: _Context) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        parts = (part.strip() for part in value.split(","))
        names = tuple(dict.fromkeys(self.aliases.get(part, part) for part in parts))
        for name in names:
            if name not in self.known:
                self.fail(f"unknown {self.what} {name!r}; choose from {', '.join(self.known)}", param, ctx)
        return names


class Loss(_ParamType):
    """The name of a loss to train with, in its shortest form."""

    name = "loss"

    def convert(self, value: Any, param: _Parameter, ctx: _Context) -> str:
        try:
            return canonical_loss(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Losses(Loss):
    """Names of losses with commas between, as a tuple without repetitions."""

    name = "losses"

    def convert(self, value: Any, param: _Parameter, ctx: _Context) -> Any:
        if isinstance(value, tuple):
            return value
        names = (super(Losses, self).convert(part.strip(), param, ctx) for part in value.split(","))
        return tuple(dict.fromkeys(names))


class Radii(_ParamType):
    """Numbers or fractions with commas between, each from 0 to `largest`, as a tuple of floats."""

    name = "numbers"

    def __init__(self, largest: float = 1.0) -> None:
        self.largest = largest

    def convert(self, value: Any, param: _Parameter, ctx: _Context) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self._radius(text.strip(), param, ctx) for text in value.split(","))

    def _radius(self, text: str, param: _Parameter, ctx: _Context) -> float:
        numerator, slash, denominator = text.partition("/")
        try:
            radius = float(numerator) / float(denominator if slash else 1)
        except (ValueError, ZeroDivisionError):
            self.fail(f"{text!r} is neither a number such as 0.1 nor a fraction such as 8/255", param, ctx)
        if not 0 <= radius <= self.largest or radius == math.inf:
            what = "0 or more and finite" if self.largest == math.inf else f"from 0 to {self.largest:g}, as pixels are"
            self.fail(f"{text!r} is not {what}", param, ctx)
        return radius


def check_radius(radius: float, norm: str, option: str) -> None:
    """Refuse a radius or a step that is larger than the distance between any two images, pixels being from 0 to 1."""
    largest, why = (1.0, "as pixels are") if norm == "linf" else (1e6, "no two images are as far apart")
    if radius > largest:
        raise click.BadParameter(f"'{radius:g}' is not from 0 to {largest:g}, {why}", param_hint=option)


class Distance(Radii):
    """One number or fraction from 0 to `largest`."""

    name = "number"

    def convert(self, value: Any, param: _Parameter, ctx: _Context) -> Any:
        if isinstance(value, float):
            return value
        distances = super().convert(value, param, ctx)
        if len(distances) != 1:
            self.fail(f"{value!r} must be one number", param, ctx)
        return distances[0]


class Attacks(_ParamType):
    """Names of attacks with commas between, as canonical names."""

    name = "attacks"

    def convert(self, value: Any, param: _Parameter, ctx: _Context) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return canonical_names([part.strip() for part in value.split(",")])
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Tau(_ParamType):
    """NAME=VALUE or NAME=VALUE,VALUE as the losses that it names."""

    name = "name=value"

    def convert(self, value: Any, param: _Parameter, ctx: _Context) -> tuple[TrainingLoss, ...]:
        if isinstance(value, tuple):
            return cast("tuple[TrainingLoss, ...]", value)
        name, equals, numbers = value.partition("=")
        if not equals:
            self.fail(f"{value!r} must look like non_target_logits=0.3", param, ctx)
        try:
            taus = dict.fromkeys(float(number) for number in numbers.split(","))
        except ValueError:
            self.fail(f"{numbers!r} must be a number, or several with commas between", param, ctx)
        try:
            return tuple(TrainingLoss(name, tau) for tau in taus)
        except ValueError as error:
            self.fail(str(error), param, ctx)
