"""The comparison: train with each loss and seed, attack the result, keep what was found.

`Settings` says all that decides the numbers, `compare` does the work, `RunResult` and `Comparison` hold the
outcome. Finished runs are kept in a folder and used again when all that decides their numbers is the same.
Relies on `train`, `evaluate`, `timing`, `data`, `models` and `storage`; `report`, `pictures` and `commands`
rely on it.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from drsl_kernels import info

from .attacks import ATTACK_LOSSES, AttackLossName
from .data import Part, Split, digits
from .evaluate import Attack, second_largest_softmax, worst_case
from .insight import Plane, feature_planes, wrong_class_distances
from .losses import BASELINE, TrainingLoss
from .models import small_cnn
from .storage import read_json, write_json
from .timing import EpochTime, time_epochs
from .train import EpochLog, Recipe, train

__all__ = ["Comparison", "Progress", "RunResult", "Settings", "compare", "environment", "run_path"]

# Part of every run's identity. Raise it when a change to training, attacks or data changes the numbers.
_REVISION: Final = 2

_HISTOGRAM_EPS: Final = 0.1


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run, besides its loss and its seed.

    Attributes:
        recipe: how to train.
        epsilons: radii of the attacks in the L-infinity norm, pixels being in [0, 1].
        attack_losses: what the attacks ascend; a sample must survive all of them.
        steps, restarts: of each attack.
        held_out: the images to judge with, "test" or "validation" (see `digits`).
        samples: use only so many training images and as many held-out ones; None for all.
        device, threads: where it is computed, and on how many CPU threads.
    """

    recipe: Recipe = field(default_factory=Recipe)
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3)
    attack_losses: tuple[AttackLossName, ...] = ("log_odds", "margin", "ce")
    steps: int = 20
    restarts: int = 5
    held_out: Part = "test"
    samples: int | None = None
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.epsilons or not all(0 <= eps <= 1 for eps in self.epsilons):
            raise ValueError(f"eps must be between 0 and 1 (pixels are), got {self.epsilons!r}")
        unknown = [name for name in self.attack_losses if name not in ATTACK_LOSSES]
        if unknown or not self.attack_losses:
            raise ValueError(f"attack_losses must be among {ATTACK_LOSSES!r}, got {self.attack_losses!r}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples must be 1 or more, got {self.samples!r}")
        self.attacks()
        object.__setattr__(self, "epsilons", tuple(sorted(set(self.epsilons))))

    def attacks(self) -> list[Attack]:
        return [Attack(loss, steps=self.steps, restarts=self.restarts) for loss in self.attack_losses]

    def histogram_eps(self) -> float:
        """The radius of the "after" histograms: the one nearest to 0.1."""
        return min(self.epsilons, key=lambda eps: abs(eps - _HISTOGRAM_EPS))

    def load(self) -> Split:
        split = digits(self.held_out)
        return (split if self.samples is None else split.first(self.samples)).to(self.device)


@dataclass(frozen=True)
class RunResult:
    """One loss, one seed.

    Accuracies are fractions of `images` held-out images; `robust_accuracy` has one value per radius. The
    second largest softmax values are those of the held-out images, before and after the worst attack found
    within `Settings.histogram_eps`. Of each image also: `distances` of the wrong classes' softmax from their
    average, without an attack, and whether it `survived` that attack. `planes` shows features before and after.
    """

    loss: TrainingLoss
    seed: int
    images: int
    clean_accuracy: float
    robust_accuracy: tuple[float, ...]
    epochs: tuple[EpochLog, ...]
    second_largest_before: tuple[float, ...]
    second_largest_after: tuple[float, ...]
    distances: tuple[float, ...]
    survived: tuple[bool, ...]
    planes: tuple[Plane, ...]


@dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`: runs by loss, then seed; `reused` counts those found in the folder."""

    settings: Settings
    losses: tuple[TrainingLoss, ...]
    seeds: tuple[int, ...]
    runs: tuple[RunResult, ...]
    times: dict[TrainingLoss, EpochTime]
    reused: int

    def of(self, loss: TrainingLoss) -> list[RunResult]:
        return [run for run in self.runs if run.loss == loss]

    def accuracy_by_eps(self, run: RunResult) -> dict[float, float]:
        """A run's accuracies, ascending in eps; eps 0 is the clean one."""
        return {0.0: run.clean_accuracy} | dict(zip(self.settings.epsilons, run.robust_accuracy, strict=True))


class Progress(Protocol):
    """Who wants to know how far the work is."""

    def begin_run(self, label: str, steps: int) -> None:
        """A run of so many steps begins."""

    def step(self, doing: str) -> None:
        """One step is done; `doing` says of what kind."""

    def end_run(self) -> None:
        """The run is finished, or was found finished."""

    def begin_timing(self) -> None:
        """All runs are finished; what remains is to time the losses."""


def compare(
    settings: Settings,
    losses: Sequence[TrainingLoss],
    seeds: Sequence[int],
    folder: Path,
    progress: Progress,
    *,
    fresh: bool = False,
) -> Comparison:
    """Make every run that `folder` does not hold yet, then time the losses side by side.

    Runs are kept in folder/runs, one file each, written when the run is complete. A file is used again only
    if it is whole and was made with the same settings, loss, seed, software and machine type; `fresh` ignores
    them all.
    Within a seed all losses start from the same weights and see the images in the same order.
    """
    split = settings.load()
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    runs = []
    reused = 0
    for loss in losses:
        for seed in seeds:
            path = run_path(folder, loss, seed)
            identity = _identity(settings, loss, seed)
            run = None if fresh else _load(path, identity)
            progress.begin_run(f"{loss}, seed {seed}", _steps(settings))
            if run is None:
                run = _run(settings, split, loss, seed, progress)
                write_json(path, {"identity": identity, "result": asdict(run)})
            else:
                reused += 1
            runs.append(run)
            progress.end_run()
    progress.begin_timing()
    times = time_epochs(losses, partial(small_cnn, seed=seeds[0]), split.train_x, split.train_y, settings.recipe)
    return Comparison(settings, tuple(losses), tuple(seeds), tuple(runs), times, reused)


def run_path(folder: Path, loss: TrainingLoss, seed: int) -> Path:
    """The file that keeps a finished run."""
    return folder / "runs" / f"{loss.name}-tau{loss.tau_text()}-seed{seed}.json"


def environment() -> dict[str, str]:
    """The software and the type of machine, on which numbers depend in their last digits."""
    software = info()
    return {
        "drsl_kernels": software.version,
        "backends": "; ".join(f"{b.name}: {b.detail}" for b in software.backends if b.usable),
        "torch": software.torch,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _run(settings: Settings, split: Split, loss: TrainingLoss, seed: int, progress: Progress) -> RunResult:
    model = small_cnn(seed).to(settings.device)
    logs = train(
        model,
        split.train_x,
        split.train_y,
        loss,
        settings.recipe,
        generator=torch.Generator().manual_seed(seed),
        on_epoch=lambda _: progress.step("training"),
    )
    x, y = split.held_out_x, split.held_out_y
    found = worst_case(
        model,
        x,
        y,
        epsilons=settings.epsilons,
        attacks=settings.attacks(),
        generator=torch.Generator(device=settings.device).manual_seed(seed),
        on_restart=lambda eps, _: progress.step(f"attacking, eps {eps:.4g}"),
    )
    radius = found.epsilons.index(settings.histogram_eps())
    attacked = found.points[radius]
    return RunResult(
        loss=loss,
        seed=seed,
        images=len(y),
        clean_accuracy=found.clean_accuracy(),
        robust_accuracy=found.robust_accuracy(),
        epochs=tuple(logs),
        second_largest_before=tuple(second_largest_softmax(model, x).tolist()),
        second_largest_after=tuple(second_largest_softmax(model, attacked).tolist()),
        distances=tuple(wrong_class_distances(model, x, y).tolist()),
        survived=tuple(found.robust[radius].tolist()),
        planes=feature_planes(model, x, attacked, y),
    )


def _steps(settings: Settings) -> int:
    return settings.recipe.epochs + len(settings.epsilons) * len(settings.attack_losses) * settings.restarts


def _identity(settings: Settings, loss: TrainingLoss, seed: int) -> dict[str, Any]:
    """All that decides a run's numbers, as JSON gives it back (lists for tuples)."""
    content = asdict(settings) | {
        "recipe": settings.recipe.as_json(),
        "epsilons": list(settings.epsilons),
        "attack_losses": list(settings.attack_losses),
    }
    return {
        "revision": _REVISION,
        "environment": environment(),
        "loss": asdict(loss),
        "seed": seed,
        "settings": content,
    }


def _load(path: Path, identity: dict[str, Any]) -> RunResult | None:
    content = read_json(path)
    if not isinstance(content, dict) or content.keys() != {"identity", "result"}:
        return None
    if content["identity"] != identity:
        return None
    try:
        run = _as_run(content["result"])
    except (KeyError, TypeError, ValueError):  # not what asdict(RunResult) gives
        return None
    return run if _is_sound(run, identity) else None


def _as_run(result: Any) -> RunResult:
    return RunResult(
        loss=TrainingLoss(**result["loss"]),
        seed=result["seed"],
        images=result["images"],
        clean_accuracy=result["clean_accuracy"],
        robust_accuracy=tuple(result["robust_accuracy"]),
        epochs=tuple(EpochLog(**log) for log in result["epochs"]),
        second_largest_before=tuple(result["second_largest_before"]),
        second_largest_after=tuple(result["second_largest_after"]),
        distances=tuple(result["distances"]),
        survived=tuple(result["survived"]),
        planes=tuple(_as_plane(plane) for plane in result["planes"]),
    )


def _as_plane(plane: Any) -> Plane:
    clean, attacked = (tuple((x, y) for x, y in plane[which]) for which in ("clean", "attacked"))
    return Plane(plane["method"], clean, attacked, tuple(plane["labels"]))


def _is_sound(run: RunResult, identity: dict[str, Any]) -> bool:
    """Whether a run from a file has the values, and as many of each, that its identity promises."""
    settings = identity["settings"]
    softmax = (run.second_largest_before, run.second_largest_after)
    fractions = (run.clean_accuracy, *run.robust_accuracy, *softmax[0], *softmax[1])
    logged = [
        value
        for log in run.epochs
        for value in (log.loss, log.cross_entropy, log.accuracy, log.seconds, log.distance)
        if value is not None or run.loss.name != BASELINE
    ]
    return (
        (asdict(run.loss), run.seed) == (identity["loss"], identity["seed"])
        and type(run.images) is int
        and all(len(values) == run.images for values in (*softmax, run.distances, run.survived))
        and all(type(value) is bool for value in run.survived)
        and all(len(half) == len(plane.labels) for plane in run.planes for half in (plane.clean, plane.attacked))
        and len(run.robust_accuracy) == len(settings["epsilons"])
        and [log.epoch for log in run.epochs] == list(range(1, settings["recipe"]["epochs"] + 1))
        and all(type(value) is float for value in (*fractions, *logged, *run.distances))
        and all(0 <= value <= 1 for value in fractions)
    )
