"""The comparison: train with each loss and seed, attack the result, keep what was found.

`Settings` says all that decides the numbers, `compare` does the work, `Comparison` holds the outcome. Each run has a
folder, as `drsl train` fills it, with what judging and the masking checks found beside the weights; whatever is
finished there is used again when all that decides it is the same. Relies on `engine`, `judging`, `run_checks`, `timing`
and `data`; the reports, the pictures and `compare_command` rely on it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from . import engine
from .checkpoint import load_model
from .data import dataset_info, load
from .detection import ATTACKS, Detection
from .detection_run import DETECTED, Detector
from .identity import digest_of_file, digest_of_tensors, environment, plain
from .judging import JUDGED, Judging, RunResult, judge, load_result, save_result
from .loss_names import BASELINE
from .losses import TrainingLoss
from .masking import Check
from .models import make_model
from .progress import Epochs, Progress
from .run_checks import (
    CHECKS,
    Finding,
    check_model,
    checks_of_cascade,
    count_checks,
    findings,
    load_checks,
    save_checks,
)
from .settings import TrainingSettings, default_settings, differences
from .storage import set_aside
from .timing import EpochTime, Timed, plan_timing, time_epochs
from .training_folder import strange_best

__all__ = ["Comparison", "Progress", "Settings", "compare", "run_folder"]

# Part of every judged run's identity. Raise it when a change to attacks or data changes the numbers.
_REVISION: Final = 3

# The same for the masking checks, whose numbers are kept apart.
_CHECKS_REVISION: Final = 2

# Of training that is killed, no more is lost than this.
_CHECKPOINT_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run, besides its loss and its seed.

    Attributes:
        training: how every run is trained, and where it is computed; its loss and its seed are replaced.
        judging: the images to judge with, and the attacks.
        check_images: how many of these the masking checks look at; 0 for no checks.
        detect: whether to try how well scores of the models find abnormal images, see `detection`.

    Raises:
        ValueError: check_images below 0.
    """

    training: TrainingSettings = field(default_factory=lambda: default_settings("digits"))
    judging: Judging = field(default_factory=Judging)
    check_images: int = 256
    detect: bool = False

    def __post_init__(self) -> None:
        if self.check_images < 0:
            raise ValueError(f"check_images must be 0 or more, got {self.check_images!r}")

    def of_run(self, loss: TrainingLoss, seed: int) -> TrainingSettings:
        return replace(self.training, loss=loss, seed=seed)

    def as_json(self) -> dict[str, Any]:
        training = _training_json(self.training, without=("loss", "seed"))
        looked = {"check_images": self.check_images, "detect": self.detect}
        return {"training": training, **self.judging.as_json(), **looked}


@dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`: runs by loss, then seed, and of each the masking checks and the detection of strangers.

    `reused` counts the runs that were found judged, `threads` are those that each run was made with. `timed` is None,
    and `times` empty, where timing went wrong. `detections` is empty where it was not asked for.
    """

    settings: Settings
    losses: tuple[TrainingLoss, ...]
    seeds: tuple[int, ...]
    runs: tuple[RunResult, ...]
    checks: tuple[tuple[Check, ...], ...]
    times: dict[TrainingLoss, EpochTime]
    timed: Timed | None
    reused: int
    threads: tuple[int, ...]
    detections: tuple[tuple[Detection, ...], ...] = ()

    def of(self, loss: TrainingLoss) -> list[RunResult]:
        return [run for run in self.runs if run.loss == loss]

    def findings(self) -> list[Finding]:
        """What the masking checks come to, loss by loss."""
        found = []
        for loss in self.losses:
            pairs = zip(self.runs, self.checks, strict=True)
            found += findings(loss, [checks for run, checks in pairs if run.loss == loss])
        return found

    def accuracy_by_eps(self, run: RunResult) -> dict[float, float]:
        """A run's accuracies, ascending in eps; eps 0 is the clean one."""
        radii = self.settings.judging.epsilons
        return {0.0: run.clean_accuracy} | dict(zip(radii, run.robust_accuracy, strict=True))


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

    Each run has a folder of its own below folder/runs: see `engine` for what training keeps there, and how it goes on
    after a kill. A trained model is used again if its settings are the same, what judging found if moreover weights,
    images, attacks, software and machine type are; `fresh` begins every run anew. A folder of other settings is
    set aside in replaced-N. Within a seed all losses start from the same weights and see the images in the same order.

    Raises:
        FloatingPointError: training or a model gives NaN.
        FileNotFoundError: the data are missing.
        FileExistsError, ValueError: a run's folder holds something that training cannot go on from.
        BlockingIOError: another process makes the same run.
    """
    training = settings.training
    x, y = _images_to_judge_with(settings)
    images = digest_of_tensors(x, y)
    detector = Detector.of(training, settings.judging, x) if settings.detect else None
    x, y = x.to(training.device), y.to(training.device)
    runs, checks, detections, threads = [], [], [], []
    reused = 0
    for loss in losses:
        for seed in seeds:
            place = run_folder(folder, loss, seed)
            run = _Run(settings, loss, seed, place, images, detector, progress)
            progress.begin_run(f"{loss}, seed {seed}", run.steps())
            result, found, detected, was_judged = run.outcome(x, y, fresh)
            reused += was_judged
            runs.append(result)
            checks.append(found)
            detections.append(detected)
            threads.append(run.training.threads)
            progress.end_run()
    progress.begin_timing()
    times, timed = _time(settings, losses, seeds[0], progress)
    return Comparison(
        settings,
        tuple(losses),
        tuple(seeds),
        tuple(runs),
        tuple(checks),
        times,
        timed,
        reused,
        tuple(threads),
        tuple(detections) if settings.detect else (),
    )


def run_folder(folder: Path, loss: TrainingLoss, seed: int) -> Path:
    """The folder of a run."""
    name = loss.name.replace(":", "-q")
    return folder / "runs" / f"{name}-tau{loss.tau_text()}-seed{seed}"


@dataclass
class _Run:
    """One loss and seed, in its folder."""

    settings: Settings
    loss: TrainingLoss
    seed: int
    folder: Path
    images: str  # their digest
    detector: Detector | None
    progress: Progress

    def __post_init__(self) -> None:
        self.training = self.settings.of_run(self.loss, self.seed)

    def steps(self) -> int:
        checks = count_checks(self.settings.judging) if self.settings.check_images else 0
        attacks = ATTACKS if self.settings.detect else 0
        return self.training.recipe.epochs + self.settings.judging.starts() + checks + attacks

    def outcome(
        self, x: Tensor, y: Tensor, fresh: bool
    ) -> tuple[RunResult, tuple[Check, ...], tuple[Detection, ...], bool]:
        """What judging, the checks and detection find, and whether judging had found it before.

        While there is something to do the folder is this process's own; what is finished any number may read.
        """
        if not fresh and self.obstacle() is None:
            result = self.judged()
            checks = None if result is None else self.checked(result)
            detected = None if result is None else self.detected()
            if result is not None and checks is not None and detected is not None:
                return result, checks, detected, True
        with engine.sole_use(self.folder):
            self.make_way(fresh)
            with _on_threads(self.training.threads):
                judged = self.judged()
                result = judged or self.judge(x, y)
                return result, self.check(result, x, y), self.detect(x, y), judged is not None

    def obstacle(self) -> str | None:
        """Why the run in the folder cannot be used, in words.

        A number of CPU threads is no such reason: where it is not given it follows the machine, and it changes last
        digits alone. A run goes on, and is judged, with the number that it began with.
        """
        before = engine.read_settings(self.folder)
        if before is None:
            return None
        self.training = replace(self.training, threads=before.threads)
        different = differences(before.as_json(), self.training.as_json())
        if different:
            return f"was made with other settings and is made anew: {'; '.join(different)}"
        if engine.has_lost_best(self.folder):
            return f"has lost {engine.BEST} and is made anew"
        strange = strange_best(self.folder, self.training)
        return None if strange is None else f"has {strange} and is made anew"

    def make_way(self, fresh: bool) -> None:
        """Set aside a run that cannot be used; remove any where another is wanted afresh."""
        # The settings go last: if this is interrupted, the next attempt finds that they are others.
        files = (DETECTED, CHECKS, JUDGED, engine.LAST, engine.BEST, engine.METRICS, engine.SETTINGS)
        if fresh:
            shutil.rmtree(self.folder / engine.CURVES, ignore_errors=True)
            for name in files:
                (self.folder / name).unlink(missing_ok=True)
            return
        obstacle = self.obstacle()
        if obstacle is not None:
            kept = set_aside(self.folder, (engine.CURVES, *files))
            self.progress.note(f"{self.folder} {obstacle}. What was there is kept in {kept}")

    def judged(self) -> RunResult | None:
        """What judging found, if it has been done; training is finished then."""
        if engine.read_settings(self.folder) is None or not (self.folder / engine.BEST).exists():
            return None
        return load_result(self.folder / JUDGED, self._identity())

    def judge(self, x: Tensor, y: Tensor) -> RunResult:
        """Train, or go on with it, then attack."""
        outcome = engine.run(
            self.training,
            self.folder,
            resume=True,
            tensorboard=False,
            checkpoint_seconds=_CHECKPOINT_SECONDS,
            progress=Epochs(self.progress),
            holds_folder=True,
        )
        result = judge(
            self._model(),
            x,
            y,
            self.settings.judging,
            loss=self.loss,
            label_smoothing=self.training.recipe.label_smoothing,
            seed=self.seed,
            epochs=outcome.rows,
            best_epoch=outcome.best.epoch,
            on_start=lambda eps, attack: self.progress.step(f"{attack.name}, eps {eps:.4g}"),
        )
        save_result(self.folder / JUDGED, self._identity(), result)
        return result

    def checked(self, result: RunResult) -> tuple[Check, ...] | None:
        """The masking checks, if those that look at the model have been made."""
        if not self.settings.check_images:
            return ()
        found = load_checks(self.folder / CHECKS, self._checks_identity())
        return None if found is None else (*found, *checks_of_cascade(result, self.settings.judging))

    def check(self, result: RunResult, x: Tensor, y: Tensor) -> tuple[Check, ...]:
        """The masking checks, of the first images; of those that look at the model what was found before is used."""
        found = self.checked(result)
        if found is not None:
            return found
        judging, few = self.settings.judging, self.settings.check_images
        made = []
        for check in check_model(self._model(), x[:few], y[:few], judging, seed=self.seed):
            made.append(check)
            self.progress.step(f"checking {check.name}")
        save_checks(self.folder / CHECKS, self._checks_identity(), made)
        return (*made, *checks_of_cascade(result, judging))

    def detected(self) -> tuple[Detection, ...] | None:
        """How well scores find abnormal images, if that has been tried."""
        return () if self.detector is None else self.detector.made(self.folder, self._identity())

    def detect(self, x: Tensor, y: Tensor) -> tuple[Detection, ...]:
        """How well scores find abnormal images; what was found before is used."""
        found = self.detected()
        if found is not None:
            return found
        assert self.detector is not None  # else nothing was asked for, and found
        return self.detector.make(
            self.folder, self._identity(), self._model(), x, y, seed=self.seed, progress=self.progress
        )

    def _checks_identity(self) -> dict[str, Any]:
        checks = {"checks_revision": _CHECKS_REVISION, "check_images": self.settings.check_images}
        return self._identity() | checks

    def _model(self) -> nn.Module:
        return load_model(self.folder / engine.BEST, device=self.training.device).model

    def _identity(self) -> dict[str, Any]:
        """All that decides what judging finds, as JSON gives it back."""
        identity: dict[str, Any] = plain(
            {
                "revision": _REVISION,
                "environment": environment(),
                "weights": digest_of_file(self.folder / engine.BEST),
                "training": _training_json(self.training),
                "judging": self.settings.judging.identity(),
                "images": self.images,
            }
        )
        return identity


@contextmanager
def _on_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _images_to_judge_with(settings: Settings) -> tuple[Tensor, Tensor]:
    training, judging = settings.training, settings.judging
    split = load(training.dataset, data_dir=training.data_dir, held_out=judging.held_out)
    return split.held_out_x[: judging.images], split.held_out_y[: judging.images]


def _training_json(training: TrainingSettings, without: Sequence[str] = ()) -> dict[str, Any]:
    """What decides the weights: where the data lie does not."""
    return {name: value for name, value in training.as_json().items() if name not in ("data_dir", *without)}


def _time(
    settings: Settings, losses: Sequence[TrainingLoss], seed: int, progress: Progress
) -> tuple[dict[TrainingLoss, EpochTime], Timed | None]:
    """Seconds per epoch over the images that training uses; of a large data set a part is timed, and scaled.

    At the highest rate of a schedule, all the time, training may diverge: then there are no times.
    """
    training, info = settings.training, dataset_info(settings.training.dataset)
    # A schedule would end before the rounds do.
    recipe = replace(training.recipe, schedule="constant", milestones=(), warmup_epochs=0.0)

    def make(loss: TrainingLoss) -> nn.Module:
        return make_model(
            training.model,
            shape=info.shape,
            classes=info.classes,
            seed=seed,
            mean=info.mean,
            std=info.std,
            head=loss.head,
        )

    split = load(training.dataset, data_dir=training.data_dir, held_out="validation")
    x, y = split.train_x[: training.samples], split.train_y[: training.samples]
    try:
        plan = plan_timing(len(losses), partial(make, TrainingLoss(BASELINE)), x, y, recipe, training.device)
        x, y = (part[: plan.images].to(training.device) for part in (x, y))
        times = time_epochs(losses, make, x, y, recipe, rounds=plan.rounds)
    except FloatingPointError as error:
        progress.note(f"The losses are not timed: {error}")
        return {}, None
    scale = plan.all_images / plan.images
    return {loss: replace(time, seconds=time.seconds * scale) for loss, time in times.items()}, plan
