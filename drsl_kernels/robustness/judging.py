"""How a trained model is judged in a comparison: attacked image by image, and what was found kept beside its weights.

The attacks are a cascade: radii ascend, at each of them attacks with gradients come before those without, and each
attacks only the images that still stand. Relies on `evaluate`, `attack_names`, `insight` and `storage`; `experiment`
relies on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from .attack_kinds import AnyAttack
from .attack_losses import per_sample
from .attack_names import AttackParameters, canonical_names, describe, make_attack
from .data import Part
from .evaluate import second_largest_softmax, worst_case
from .insight import Plane, feature_planes, wrong_class_distances
from .losses import TrainingLoss
from .storage import read_json, write_json
from .training_logs import EpochRow

__all__ = ["JUDGED", "LISTED", "Judging", "RunResult", "judge", "load_result", "save_result"]

JUDGED: Final = "judged.json"

# Values of single images are kept for so many, the first: enough for a histogram, and files stay small.
LISTED: Final = 1000

_HISTOGRAM_EPS: Final = 0.1


@dataclass(frozen=True)
class Judging:
    """Which images a model is judged with, and by which attacks.

    Attributes:
        epsilons: radii of the attacks in the L-infinity norm, pixels being in [0, 1].
        attacks: names, see `attack_names`; an image must survive all of them. Those without gradients are put last.
        parameters: of the attacks.
        held_out: the images to judge with, "test" or "validation" (see `data.load`).
        images: only the first so many of them; None for all.

    Raises:
        ValueError: no radius or one out of [0, 1], an unknown attack or one on another model, images below 1.
    """

    epsilons: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3)
    attacks: tuple[str, ...] = ("pgd:log_odds", "pgd:margin", "pgd:ce")
    parameters: AttackParameters = field(default_factory=AttackParameters)
    held_out: Part = "test"
    images: int | None = None

    def __post_init__(self) -> None:
        if not self.epsilons or not all(0 <= eps <= 1 for eps in self.epsilons):
            raise ValueError(f"eps must be between 0 and 1 (pixels are), got {self.epsilons!r}")
        if not self.attacks:
            raise ValueError(f"attacks must not be empty, got {self.attacks!r}")
        if self.images is not None and self.images < 1:
            raise ValueError(f"images must be 1 or more, got {self.images!r}")
        object.__setattr__(self, "epsilons", tuple(sorted(set(self.epsilons))))
        made = [
            (make_attack(name, self.parameters, training_loss=_unknown), name) for name in canonical_names(self.attacks)
        ]
        made.sort(key=lambda pair: pair[0].black_box)
        object.__setattr__(self, "attacks", tuple(name for _, name in made))

    def made(self) -> list[AnyAttack]:
        """The attacks, to be looked at and not to be run."""
        return self.make_attacks(_unknown)

    def make_attacks(self, training_loss: Callable[[Tensor, Tensor], Tensor]) -> list[AnyAttack]:
        """The attacks, those without gradients last; `training_loss` is what the model was trained with."""
        return [make_attack(name, self.parameters, training_loss=training_loss) for name in self.attacks]

    def starts(self) -> int:
        """How many starts all attacks at all radii have."""
        return len(self.epsilons) * sum(attack.restarts for attack in self.made())

    def histogram_eps(self) -> float:
        """The radius of the "after" histograms: the one nearest to 0.1."""
        return min(self.epsilons, key=lambda eps: abs(eps - _HISTOGRAM_EPS))

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"epsilons": list(self.epsilons), "attacks": list(self.attacks)}

    def identity(self) -> dict[str, Any]:
        """What decides the numbers, besides the images themselves: numbers of attacks that are not run do not."""
        attacks = [describe(attack) for attack in self.made()]
        return {"epsilons": list(self.epsilons), "attacks": attacks, "held_out": self.held_out}


@dataclass(frozen=True)
class RunResult:
    """One loss, one seed: how training went, and what the attacks left.

    Accuracies are fractions of `images` held-out images; `robust_accuracy` has one value per radius. `best_epoch` is
    the one of `epochs` whose weights were judged. Of each image: `fell` says at which radius, to which attack and at
    which start it fell, as in `WorstCase`.

    Of the first `LISTED` images also: the second largest softmax values before and after the worst attack found within
    `Judging.histogram_eps`, and `distances` of the wrong classes' softmax from their average, without an attack.
    `planes` shows features before and after.
    """

    loss: TrainingLoss
    seed: int
    images: int
    clean_accuracy: float
    robust_accuracy: tuple[float, ...]
    epochs: tuple[EpochRow, ...]
    best_epoch: int
    fell: tuple[tuple[int, int, int], ...]
    second_largest_before: tuple[float, ...]
    second_largest_after: tuple[float, ...]
    distances: tuple[float, ...]
    planes: tuple[Plane, ...]

    def right(self) -> tuple[bool, ...]:
        """Of each of the first `LISTED` images, whether it is classified rightly without an attack."""
        return tuple(at >= 0 for at, _, _ in self.fell[:LISTED])

    def survived(self, radius: int) -> tuple[bool, ...]:
        """Of each of the first `LISTED` images, whether it survived the attacks at the radius of this index."""
        return tuple(at > radius for at, _, _ in self.fell[:LISTED])


def judge(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    judging: Judging,
    *,
    loss: TrainingLoss,
    label_smoothing: float,
    seed: int,
    epochs: tuple[EpochRow, ...],
    best_epoch: int,
    on_start: Callable[[float, AnyAttack], None] | None = None,
) -> RunResult:
    """Attack a model that was trained with `loss`; x, y are the images, on its device.

    Raises:
        FloatingPointError: the model gives NaN.
        ValueError: an attack that needs more classes than there are.
    """
    found = worst_case(
        model,
        x,
        y,
        epsilons=judging.epsilons,
        attacks=judging.make_attacks(per_sample(loss, label_smoothing=label_smoothing)),
        generator=torch.Generator(device=x.device).manual_seed(seed),
        on_restart=on_start,
    )
    attacked = found.points[found.epsilons.index(judging.histogram_eps())][:LISTED]
    listed, labels = x[:LISTED], y[:LISTED]
    return RunResult(
        loss=loss,
        seed=seed,
        images=len(y),
        clean_accuracy=found.clean_accuracy(),
        robust_accuracy=found.robust_accuracy(),
        epochs=epochs,
        best_epoch=best_epoch,
        fell=tuple(_triple(row) for row in found.fell.tolist()),
        second_largest_before=tuple(second_largest_softmax(model, listed).tolist()),
        second_largest_after=tuple(second_largest_softmax(model, attacked).tolist()),
        distances=tuple(wrong_class_distances(model, listed, labels).tolist()),
        planes=feature_planes(model, listed, attacked, labels),
    )


def save_result(path: Path, identity: dict[str, Any], result: RunResult) -> None:
    write_json(path, {"identity": identity, "result": asdict(result)})


def load_result(path: Path, identity: dict[str, Any]) -> RunResult | None:
    """What `save_result` wrote under the same identity; None where there is nothing of the kind, or it is damaged."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("identity") != identity:
        return None
    try:
        result = _as_result(content["result"])
        return result if _is_sound(result, identity["judging"]) else None
    except (KeyError, TypeError, ValueError):  # not what asdict(RunResult) gives
        return None


def _unknown(logits: Tensor, y: Tensor) -> Tensor:
    """Stands for the training loss where attacks are made only to be looked at."""
    raise NotImplementedError


def _triple(row: list[int]) -> tuple[int, int, int]:
    radius, attack, start = row
    return radius, attack, start


def _as_result(content: Any) -> RunResult:
    lists = ("robust_accuracy", "second_largest_before", "second_largest_after", "distances")
    changed = {name: tuple(content[name]) for name in lists} | {
        "loss": TrainingLoss(**content["loss"]),
        "epochs": tuple(EpochRow(**row) for row in content["epochs"]),
        "fell": tuple(_triple(row) for row in content["fell"]),
        "planes": tuple(_as_plane(plane) for plane in content["planes"]),
    }
    return RunResult(**content | changed)


def _as_plane(plane: Any) -> Plane:
    clean, attacked = (tuple((x, y) for x, y in plane[which]) for which in ("clean", "attacked"))
    return Plane(plane["method"], clean, attacked, tuple(plane["labels"]))


def _is_sound(result: RunResult, judging: dict[str, Any]) -> bool:
    """Whether a result from a file has the values, and as many of each, that its identity promises."""
    listed = (result.second_largest_before, result.second_largest_after, result.distances)
    fractions = (result.clean_accuracy, *result.robust_accuracy, *listed[0], *listed[1])
    radii = range(-1, len(judging["epsilons"]) + 1)
    attacks = range(-1, len(judging["attacks"]))
    return (
        len(result.fell) == result.images
        and all(at in radii and attack in attacks and start >= 0 for at, attack, start in result.fell)
        and all(len(values) == min(result.images, LISTED) for values in listed)
        and all(len(half) == len(plane.labels) for plane in result.planes for half in (plane.clean, plane.attacked))
        and len(result.robust_accuracy) == len(judging["epsilons"])
        and 1 <= result.best_epoch <= len(result.epochs)
        and [row.epoch for row in result.epochs] == list(range(1, len(result.epochs) + 1))
        and all(type(row.train_loss) is float for row in result.epochs)
        and all(type(value) is float for value in (*fractions, *result.distances))
        and all(0 <= value <= 1 for value in fractions)
    )
