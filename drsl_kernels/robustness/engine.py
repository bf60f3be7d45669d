"""A training run in a folder: epochs, validation, the best checkpoint, and going on after any interruption.

A folder holds settings.json, last.pt (everything that going on needs), best.pt (the model of the best epoch on held-out
training images; the test images are never loaded), metrics.csv and tensorboard/. Each file is whole or absent at every
moment, and last.pt is written last: whatever comes after it in a run that was killed is done again, with the same
result. Relies on `training_folder`, `train`, `validation`, `checkpoint`, `training_logs`, `data` and `models`;
`train_command` and `experiment` rely on it.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from drsl_kernels import __version__

from .checkpoint import FORMAT, reading_state, save_checkpoint
from .data import DatasetInfo, Split, dataset_info, load, noisy_labels
from .distributed import World
from .identity import digest_of_tensors
from .models import make_model
from .optimisation import learning_rate_at
from .random_streams import deterministic, own_random_state, seed_for
from .settings import TrainingSettings
from .storage import clear_unfinished, write_json
from .train import EpochLog, EpochSums, make_optimizer, make_scaler, train_epoch
from .training_folder import (
    ANEW,
    BEST,
    CURVES,
    FILES,
    LAST,
    METRICS,
    SETTINGS,
    check_folder,
    check_images,
    has_lost_best,
    read_last,
    read_settings,
    settings_json,
    sole_use,
)
from .training_logs import Curves, EpochRow, write_metrics
from .validation import Validation, validate

__all__ = [
    "BEST",
    "CURVES",
    "FILES",
    "LAST",
    "METRICS",
    "SETTINGS",
    "Outcome",
    "Progress",
    "Silent",
    "has_lost_best",
    "read_settings",
    "run",
    "sole_use",
]


class Progress(Protocol):
    """Who wants to know how far a run is."""

    def begin(self, settings: TrainingSettings, epoch: int, batches: int, batch: int) -> None:
        """Epoch `epoch` of `batches` batches comes next, or goes on after so many of them."""

    def batch(self) -> None:
        """One step is done."""

    def epoch(self, row: EpochRow, best: bool) -> None:
        """An epoch is done, and whether it is the best so far."""

    def note(self, text: str) -> None:
        """Something worth a line."""


class Silent:
    """A `Progress` that tells nobody."""

    def begin(self, settings: TrainingSettings, epoch: int, batches: int, batch: int) -> None: ...

    def batch(self) -> None: ...

    def epoch(self, row: EpochRow, best: bool) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """A finished run: its epochs, the best of them, and whether it had been finished before."""

    rows: tuple[EpochRow, ...]
    best: EpochRow
    was_finished: bool


def run(
    settings: TrainingSettings,
    folder: Path,
    *,
    resume: bool = False,
    world: World | None = None,
    checkpoint_batches: int = 0,
    checkpoint_seconds: float = 0.0,
    tensorboard: bool = True,
    progress: Progress | None = None,
    holds_folder: bool = False,
) -> Outcome:
    """Train, or go on with training, until the last epoch is done.

    Args:
        settings: of the run; on resuming the same as those it began with.
        folder: for its files; processes on several machines need to share it.
        resume: go on with the run in the folder; begin one where there is none.
        world: the processes that train together; rank 0 alone writes.
        checkpoint_batches: write last.pt after so many batches, too, not only after each epoch; 0 for not.
        checkpoint_seconds: write last.pt not after each epoch, but whenever so many seconds have passed since it was
            written, in the middle of an epoch, too, and at the end; for one process alone. 0 for not. Short epochs are
            not held up by writing, and of long ones little is lost.
        tensorboard: write event files, where the package tensorboard is installed.
        holds_folder: the caller has the `sole_use` of the folder already.

    All images are kept on the device. The weights depend on settings, number of processes, software and type of
    machine alone: not on how often the run was interrupted and resumed, nor on when checkpoints are written.

    Raises:
        BlockingIOError: another process trains in the folder.
        FileExistsError: the folder holds a run, and `resume` is False.
        ValueError: the run in the folder has other settings or images, the message names them; or its files are
            damaged or of several runs.
        FileNotFoundError: the data or the model of the best epoch are missing; the message names the files.
        OSError: a file cannot be written.
        FloatingPointError: the loss, a weight or a validation logit is not finite; the message names epoch and batch.
            last.pt and best.pt stay as they were.
    """
    world, progress = world or World(), progress or Silent()
    if checkpoint_seconds and world.size > 1:
        raise ValueError(f"checkpoint_seconds must be 0 with several processes, got {checkpoint_seconds!r}")
    with nullcontext() if holds_folder or world.rank else sole_use(folder):
        note = check_folder(settings, folder, resume, world)
        if note is not None:
            progress.note(note)
        with deterministic(settings.threads), own_random_state(torch.device(settings.device)):
            training = _Training(settings, folder, world, progress, checkpoint_batches, checkpoint_seconds)
            training.prepare()
            return training.go_on(tensorboard)


@dataclass
class _Training:
    """A run between two steps."""

    settings: TrainingSettings
    folder: Path
    world: World
    progress: Progress
    checkpoint_batches: int
    checkpoint_seconds: float
    rows: list[EpochRow] = field(default_factory=list)
    best_epoch: int = 0
    sums: EpochSums | None = None  # of an epoch that was interrupted

    def __post_init__(self) -> None:
        settings, device = self.settings, torch.device(self.settings.device)
        self.info = dataset_info(settings.dataset)
        self.split = _load(settings, self.info)
        self.model: nn.Module = make_model(
            settings.model,
            shape=self.info.shape,
            classes=self.info.classes,
            seed=settings.seed,
            mean=self.info.mean,
            std=self.info.std,
            head=settings.loss.head,
        ).to(device)
        self.optimizer = make_optimizer(self.model, settings.recipe)
        self.scaler = make_scaler(settings.recipe, device)
        self.order = torch.Generator().manual_seed(settings.seed)
        self.batches = -(-len(self.split.train_y) // settings.recipe.batch_size)
        _check_single_image(self.model, self.split.train_x, settings, self.world)
        self.written = monotonic()

    def prepare(self) -> None:
        """Stand where the run in the folder stands, or begin it."""
        images = digest_of_tensors(*(part.cpu() for part in self.split.tensors()))
        check_images(self.folder, images)
        if (self.folder / LAST).exists():
            self.load(read_last(self.folder, self.settings))
        self.world.wait()  # no process writes before all have looked
        if self.world.rank:
            return
        clear_unfinished(self.folder, sole_use=True)
        if not (self.folder / SETTINGS).exists():
            write_json(self.folder / SETTINGS, settings_json(self.settings, self.world, images))

    def go_on(self, tensorboard: bool) -> Outcome:
        """Train until the last epoch is done."""
        writes, was_finished = self.world.rank == 0, self.finished
        if writes and self.rows:
            write_metrics(self.folder / METRICS, self.rows)
        place = self.folder / CURVES if tensorboard and writes and not was_finished else None
        curves = Curves(place, len(self.rows) + 1)
        if curves.missing:
            self.progress.note("No TensorBoard curves: the package tensorboard is not installed.")
        with curves:
            while not self.finished:
                self.epoch(curves)
        rows = tuple(self.rows)
        return Outcome(rows, rows[self.best_epoch - 1], was_finished)

    @property
    def finished(self) -> bool:
        return len(self.rows) == self.settings.recipe.epochs

    def epoch(self, curves: Curves) -> None:
        """Train for the next epoch or the rest of it, validate, write."""
        epoch, order = len(self.rows) + 1, self.order.get_state()
        recipe = self.settings.recipe
        sums, self.sums = self.sums or EpochSums(), None

        def on_batch(sums: EpochSums) -> None:
            self.progress.batch()
            if sums.batches < self.batches and self._is_time(sums.batches):
                sums.look(self.world, self.settings.loss, recipe, epoch)
                self._save_last(order, sums, f"epoch {epoch}, batch {sums.batches}")

        self.progress.begin(self.settings, epoch, self.batches, sums.batches)
        log = train_epoch(
            self.model,
            self.split.train_x,
            self.split.train_y,
            self.settings.loss,
            recipe,
            self.optimizer,
            epoch=epoch,
            generator=self.order,
            scaler=self.scaler,
            world=self.world,
            sums=sums,
            on_batch=on_batch,
        )
        validation = self._validate(epoch)
        row = _row(log, validation, learning_rate_at(recipe, epoch * self.batches - 1, self.batches))
        is_best = self.best_epoch == 0 or validation.score > _score(self.rows[self.best_epoch - 1])
        self.rows.append(row)
        if is_best:
            self.best_epoch = epoch
            self._save(BEST, {})
        if self.world.rank == 0:
            curves.add(row)
            write_metrics(self.folder / METRICS, self.rows)
        place = f"epoch {epoch}, batch {self.batches}"
        if self.finished or not self.checkpoint_seconds or self._is_time(0):
            self._save_last(self.order.get_state(), EpochSums(), place)
        else:
            self._check_weights(place)
        self.progress.epoch(row, is_best)

    def load(self, content: dict[str, Any]) -> None:
        """Stand where the run stood when it wrote this checkpoint. ValueError where that does not tell."""
        with reading_state(self.folder / LAST, ANEW):
            self._take(content["model"], content["state"])

    def _take(self, model: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.order.set_state(state["order"])
        self.rows = [EpochRow(**row) for row in state["rows"]]
        self.best_epoch = state["best_epoch"]
        if not bool(self.rows) <= self.best_epoch <= len(self.rows):
            raise ValueError(f"best_epoch is {self.best_epoch!r} of {len(self.rows)}")
        self.sums = EpochSums(state["sums"], state["seconds"])

    def _validate(self, epoch: int) -> Validation:
        recipe = self.settings.recipe
        try:
            return validate(
                self.model,
                self.split.held_out_x,
                self.split.held_out_y,
                adversarial=recipe.adversarial,
                robust_images=self.settings.robust_images,
                seed=self.settings.seed,
                world=self.world,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"after epoch {epoch}, batch {self.batches}: {error}") from error

    def _save_last(self, order: Tensor, sums: EpochSums, place: str) -> None:
        """`order` is the state of the generator at the start of the epoch that comes next or goes on."""
        self._check_weights(place)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "order": order,
            "rows": [asdict(row) for row in self.rows],
            "best_epoch": self.best_epoch,
            "sums": sums.rows,
            "seconds": sums.elapsed(),
        }
        self._save(LAST, {"state": state})
        self.written = monotonic()

    def _is_time(self, batches: int) -> bool:
        """Whether a checkpoint is due after so many batches of an epoch that goes on."""
        if self.checkpoint_seconds and monotonic() - self.written >= self.checkpoint_seconds:
            return True
        return bool(self.checkpoint_batches) and batches % self.checkpoint_batches == 0

    def _check_weights(self, place: str) -> None:
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise FloatingPointError(f"the weights {name} are not finite after {place}")

    def _save(self, name: str, more: dict[str, Any]) -> None:
        if self.world.rank == 0:
            content = {"format": FORMAT, "about": self._about(), "model": self.model.state_dict()}
            save_checkpoint(self.folder / name, content | more)

    def _about(self) -> dict[str, Any]:
        settings = self.settings.as_json()
        return {name: settings[name] for name in ("dataset", "model", "seed", "loss", "recipe", "data_dir")} | {
            "shape": list(self.info.shape),
            "classes": self.info.classes,
            "mean": list(self.info.mean),
            "std": list(self.info.std),
            "head": self.settings.loss.head,
            "epoch": len(self.rows),
            "drsl_kernels": __version__,
            "torch": str(torch.__version__),
        }


def _load(settings: TrainingSettings, info: DatasetInfo) -> Split:
    """Images to train on and to validate with; noise is on the labels of the former alone."""
    split = load(settings.dataset, data_dir=settings.data_dir, held_out="validation")
    if settings.samples is not None:
        split = split.first(settings.samples)
    train_y, rate = split.train_y, settings.recipe.label_noise
    if rate:
        train_y = noisy_labels(train_y, rate, classes=info.classes, seed=seed_for(settings.seed, "label noise"))
    return Split(split.train_x, train_y, split.held_out_x, split.held_out_y).to(settings.device)


def _check_single_image(model: nn.Module, x: Tensor, settings: TrainingSettings, world: World) -> None:
    """Batch normalisation at a single pixel has no variance in a batch of one image: found before the work."""
    size = settings.recipe.batch_size
    batches = {min(size, len(x)), len(x) % size}
    if not any(len(world.part(torch.empty(images))) == 1 for images in batches):
        return
    try:
        with torch.no_grad():
            copy.deepcopy(model).to("meta").train()(x[:1].to("meta"))
    except ValueError as error:
        raise ValueError(
            f"batch_size must be such that no batch, nor a process's part of one, is of a single image, with which "
            f"{settings.model} cannot be trained; got {size} with {len(x)} images: {error}"
        ) from error


def _row(log: EpochLog, validation: Validation, learning_rate: float) -> EpochRow:
    return EpochRow(
        epoch=log.epoch,
        learning_rate=learning_rate,
        train_loss=log.loss,
        train_cross_entropy=log.cross_entropy,
        train_distance=log.distance,
        train_accuracy=log.accuracy,
        validation_cross_entropy=validation.cross_entropy,
        validation_accuracy=validation.accuracy,
        validation_robust_accuracy=validation.robust_accuracy,
        seconds=log.seconds,
    )


def _score(row: EpochRow) -> float:
    robust = row.validation_robust_accuracy
    return row.validation_accuracy if robust is None else robust
