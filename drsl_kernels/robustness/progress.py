"""Who wants to know how far a comparison is, and how training tells it. `experiment` relies on it."""

from __future__ import annotations

from typing import Protocol

from . import engine
from .settings import TrainingSettings
from .training_logs import EpochRow

__all__ = ["Epochs", "Progress"]


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

    def note(self, text: str) -> None:
        """Something worth a line."""


class Epochs(engine.Silent):
    """Hands the progress of training on, epoch by epoch."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done = 0

    def begin(self, settings: TrainingSettings, epoch: int, batches: int, batch: int) -> None:
        while self._done < epoch - 1:  # those of an earlier process
            self._step()

    def epoch(self, row: EpochRow, best: bool) -> None:
        self._step()

    def note(self, text: str) -> None:
        self._progress.note(text)

    def _step(self) -> None:
        self._done += 1
        self._progress.step("training")
