"""What commands share: checks of a device and a folder, memory, what makes runs repeatable, progress bars.

The commands rely on it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .storage import clear_unfinished, read_json

__all__ = [
    "ProgressBars",
    "check_device",
    "earlier_results",
    "fix_cublas",
    "keep_freed_memory",
    "one_process",
    "plain_console",
    "prepare_folder",
    "refuse_file",
    "reproducible",
]

# Of glibc's malloc.h, with the largest values that its releases take.
_TRIM_THRESHOLD: Final = (-1, (2**31 - 1,))
_MMAP_THRESHOLD: Final = (-3, (2**30, 2**25))


def keep_freed_memory() -> None:
    """Let the process keep the memory that tensors free, for the tensors that come next.

    glibc gives large blocks back to the system as soon as they are freed, and the system fills every page with zeros
    when it hands it out again. A training or attack step on images of 28x28 pixels frees and takes many such blocks,
    and spends a third to a half of its time on that: PGD on 1000 images took 766 ms a step, and 379 ms without. The
    process needs no more memory at its peak, but does not shrink between peaks. Where the C library has no `mallopt`
    (musl, macOS) nothing is done. The environment variables MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ do the
    same for a program of your own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return
    for parameter, values in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        any(mallopt(parameter, value) == 1 for value in values)  # the first that is taken


def one_process(command: str) -> None:
    """Refuse to be one of several processes of torchrun, which would all do the same work in the same files."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and processes != "1":
        raise click.UsageError(f"{command} is one process, and torchrun started {processes}; it is for drsl train")


def plain_console() -> Console:
    """A console that prints what it is given: brackets and colons in a path mean nothing else."""
    return Console(markup=False, emoji=False)


def check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise click.BadParameter(f"cannot use {device!r} here: {reason}", param_hint="--device") from error


def fix_cublas(device: str) -> None:
    """On a GPU let products be summed in one order; this is read when a GPU is first used."""
    if device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def refuse_file(folder: Path) -> None:
    """Find out that a folder cannot be made, a file being in its place, without making it."""
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                reason = f"{'it' if place == folder else place} is a file, not a folder"
                raise click.BadParameter(f"cannot write to {folder}: {reason}", param_hint="--out")
            return


def earlier_results(file: Path, keys: Collection[str], command: str) -> dict[str, Any] | None:
    """The results.json that `command` left, or None; any other, which does not have these keys, is refused.

    Found out before the work: the new results replace it.
    """
    if not file.is_file():
        return None
    content = read_json(file)
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        reason = f"{file} is not of {command}, which would replace it: choose another folder"
        raise click.BadParameter(reason, param_hint="--out")
    return content


def prepare_folder(folder: Path, files: Sequence[Path]) -> None:
    """Find out before the work, not after it, that results cannot be written; clear what killed commands left."""
    for place in dict.fromkeys([folder, *(file.parent for file in files)]):
        probe = place / f".writable-{os.getpid()}"
        try:
            place.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
            clear_unfinished(place)
        except OSError as error:
            reason = "it is a file, not a folder" if place.is_file() else error.strerror
            raise click.BadParameter(f"cannot write to {place}: {reason}", param_hint="--out") from error
    for file in files:
        if file.exists() and not file.is_file():
            raise click.BadParameter(f"cannot write {file}: it is a folder, not a file", param_hint="--out")


@contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Fix what else would change the last digits; afterwards put back what was set."""
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.deterministic = before[1]


class ProgressBars:
    """One bar for all runs and one for the run at work."""

    def __init__(self, console: Console, runs: int) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._all = self._bars.add_task("all runs", total=runs)
        self._current = self._bars.add_task("", total=None)
        self._label = ""

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.update(self._current, visible=False)
        self._bars.stop()

    def begin_run(self, label: str, steps: int) -> None:
        self._label = label
        self._bars.reset(self._current, total=steps, description=label)

    def step(self, doing: str) -> None:
        self._bars.update(self._current, advance=1, description=f"{self._label}: {doing}")

    def end_run(self) -> None:
        self._bars.advance(self._all)

    def note(self, text: str) -> None:
        self._bars.console.print(text, highlight=False, soft_wrap=True)

    def begin_timing(self) -> None:
        self._bars.reset(self._current, total=None, description="timing the losses side by side")
