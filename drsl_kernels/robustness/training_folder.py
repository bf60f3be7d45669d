"""The folder of a training run: its files, its settings, who may use it, and whether a run can go on in it.

Relies on `checkpoint`, `settings` and `storage`; `engine` and `experiment` rely on it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import torch

from drsl_kernels import __version__

from .checkpoint import FORMAT, load_checkpoint
from .distributed import World
from .losses import TrainingLoss
from .recipe import Recipe
from .settings import TrainingSettings, differences
from .storage import read_json

__all__ = [
    "ANEW",
    "BEST",
    "CURVES",
    "FILES",
    "LAST",
    "LOCK",
    "METRICS",
    "SETTINGS",
    "check_folder",
    "check_images",
    "has_lost_best",
    "read_last",
    "read_settings",
    "settings_json",
    "sole_use",
    "strange_best",
]

SETTINGS: Final = "settings.json"
LAST: Final = "last.pt"
BEST: Final = "best.pt"
METRICS: Final = "metrics.csv"
CURVES: Final = "tensorboard"
FILES: Final = (SETTINGS, LAST, BEST, METRICS)
ANEW: Final = "train anew in another folder (drsl compare: or with --fresh)"

LOCK: Final = ".lock"  # left by a process that was killed
_KEYS: Final = ("settings", "processes", "software")  # of settings.json


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder. A process that dies, however it does, leaves the folder free.

    The folder is made if it is not there, and removed again if nothing is put into it. Where the file system has no
    locks, nothing is kept from anyone.

    Raises:
        BlockingIOError: another process has the folder.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = _locked(folder / LOCK)
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        with suppress(OSError):  # of the first that is not empty
            for place in made:
                place.rmdir()


def _locked(path: Path) -> int:
    """An open file that is locked, and that others find under this name."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            message = f"another process trains in {path.parent}: wait until it ends, or choose another folder"
            raise BlockingIOError(message) from None
        except OSError:
            return descriptor
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # between open and lock the one who had it has removed it


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def read_settings(folder: Path) -> TrainingSettings | None:
    """The settings of the run in a folder, None if there is none.

    Raises:
        ValueError: settings.json is not what a run writes.
    """
    return TrainingSettings.from_json(_content(folder)["settings"]) if (folder / SETTINGS).exists() else None


def settings_json(settings: TrainingSettings, world: World, images: str) -> dict[str, Any]:
    """What settings.json holds; `images` is the digest of images and labels."""
    return {
        "format": FORMAT,
        "settings": settings.as_json(),
        "processes": world.size,
        "software": _software(),
        "images": images,
    }


def check_folder(settings: TrainingSettings, folder: Path, resume: bool, world: World) -> str | None:
    """Whether a run with these settings can begin or go on in the folder. Returns what is worth a line, if anything.

    Raises:
        FileExistsError, ValueError: it cannot.
    """
    if not (folder / SETTINGS).exists():
        if any((folder / name).exists() for name in FILES):
            raise FileExistsError(f"{folder} holds files of a training run, but no {SETTINGS}: choose another folder")
        return None
    content = _content(folder)
    if not resume:
        raise FileExistsError(f"{folder} holds a training run: resume it, or choose another folder")
    before = content["settings"] | {"processes": content["processes"]}
    different = differences(before, settings.as_json() | {"processes": world.size})
    if different:
        raise ValueError(f"cannot resume {folder} with other settings: {'; '.join(different)}")
    if content["software"] == _software():
        return None
    return (
        f"Begun with {content['software']}, goes on with {_software()}: the last digits may differ from those of an "
        "undisturbed run."
    )


def check_images(folder: Path, images: str) -> None:
    """Raises ValueError if the run in the folder began with other images or labels; older runs do not tell theirs."""
    if (folder / SETTINGS).exists() and _content(folder).get("images", images) != images:
        raise ValueError(f"cannot resume {folder}: the images or labels of the data set are not those it began with")


def read_last(folder: Path, settings: TrainingSettings) -> dict[str, Any]:
    """The checkpoint that the run in the folder goes on from.

    Raises:
        FileNotFoundError: epochs are done, but the model of the best is not there.
        ValueError: last.pt is damaged, or is not of this run.
    """
    content = _last(folder)
    different = differences(_told(content["about"], folder / LAST), _told(settings.as_json(), folder / SETTINGS))
    if different:
        raise ValueError(f"{folder / LAST} is of another run than {SETTINGS}: {'; '.join(different)}")
    if _lost_best(folder, content):
        raise FileNotFoundError(f"{folder / BEST} is gone, the model of the best epoch: train anew in another folder")
    return content


def has_lost_best(folder: Path) -> bool:
    """Whether an epoch is done, but the model of the best is not there."""
    return (folder / LAST).exists() and not (folder / BEST).exists() and _lost_best(folder, _last(folder))


def strange_best(folder: Path, settings: TrainingSettings) -> str | None:
    """What is wrong with the model of the best epoch, in words; None where it is that of the run, or not there."""
    if not (folder / BEST).exists():
        return None
    try:
        about = _told(load_checkpoint(folder / BEST)["about"], folder / BEST)
    except ValueError:
        return f"a damaged {BEST}"
    different = differences(about, _told(settings.as_json(), folder / SETTINGS))
    return f"the {BEST} of another run ({'; '.join(different)})" if different else None


def _lost_best(folder: Path, last: dict[str, Any]) -> bool:
    return bool(last["state"]["rows"]) and not (folder / BEST).exists()


def _last(folder: Path) -> dict[str, Any]:
    try:
        content = load_checkpoint(folder / LAST)
    except ValueError as error:
        raise ValueError(f"{error}: {ANEW}") from error
    state = content.get("state")
    if not isinstance(state, dict) or not isinstance(state.get("rows"), list):
        raise ValueError(f"{folder / LAST} holds a model but no state that training could go on from: {ANEW}")
    return content


def _told(content: dict[str, Any], source: Path) -> dict[str, Any]:
    """What settings and a checkpoint both tell of a run, in the form of today."""
    try:
        told = {name: content[name] for name in ("dataset", "model", "seed")}
        loss, recipe = TrainingLoss(**content["loss"]), Recipe.from_json(content["recipe"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} does not tell which run it is of: {error}") from error
    return told | {"loss": {"name": loss.name, "tau": loss.tau}, "recipe": recipe.as_json()}


def _content(folder: Path) -> dict[str, Any]:
    """The content of settings.json, checked."""
    path, what = folder / SETTINGS, "does not hold the settings of a training run"
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} {what}: it is empty, or no dictionary in JSON")
    missing = [name for name in _KEYS if name not in content]
    if missing:
        raise ValueError(f"{path} {what}: it has no {', '.join(map(repr, missing))}")
    try:
        TrainingSettings.from_json(content["settings"])
    except KeyError as error:
        raise ValueError(f"{path} {what}: they have no {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} {what}: {error}") from error
    return content


def _software() -> dict[str, str]:
    return {"drsl_kernels": __version__, "torch": str(torch.__version__)}
