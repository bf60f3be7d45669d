"""What a training run writes down for people: one line per epoch in a CSV file, and curves for TensorBoard.

Relies on `storage`, and on the package tensorboard where it is installed; `engine` and `lm` rely on it.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .storage import write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Curves", "EpochRow", "write_metrics"]


@dataclass(frozen=True)
class EpochRow:
    """One line of metrics.csv. Accuracies are in [0, 1], `seconds` is wall time of training without validation.

    `learning_rate` is that of the epoch's last step; the other columns are those of `EpochLog` and `Validation`.
    """

    epoch: int
    learning_rate: float
    train_loss: float
    train_cross_entropy: float
    train_distance: float | None
    train_accuracy: float
    validation_cross_entropy: float
    validation_accuracy: float
    validation_robust_accuracy: float | None
    seconds: float


def write_metrics(path: Path, rows: Sequence[DataclassInstance]) -> None:
    """Write the file anew: whoever reads it, and whenever the run is killed, sees whole lines, and each epoch once.

    Its columns are the fields of the rows, of which there is one at least, all of one class.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(rows[0])], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)

    write_atomically(path, write)


class Curves:
    """TensorBoard's event files, or nothing where the package tensorboard is missing or not wanted.

    `first_epoch` is the first that is still to come: what an interrupted run wrote from there on is left out by
    TensorBoard.
    """

    def __init__(self, folder: Path | None, first_epoch: int) -> None:
        self.missing = False
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.missing = True
            return
        self._writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def add(self, row: EpochRow) -> None:
        if self._writer is None:
            return
        for name, value in asdict(row).items():
            if name != "epoch" and value is not None:
                # train_loss becomes train/loss: TensorBoard shows what stands before the slash as one group.
                group, _, rest = name.partition("_")
                title = f"{group}/{rest}" if group in ("train", "validation") else f"run/{name}"
                self._writer.add_scalar(title, value, row.epoch)
        self._writer.flush()

    def __enter__(self) -> Curves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
