"""Checkpoints: files that hold a model and what it is, whole or absent, read without running any code in them.

A checkpoint is a dict: "format" (1), "about" (dataset, model, shape, classes, mean, std, head, seed, loss, recipe,
data_dir, epoch, versions), "model" (its state_dict) and, in one that training can go on from, "state". Relies on
`storage`, `data`, `losses` and `models`; `engine` and the attacks rely on it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from drsl_kernels.spec import number

from .data import dataset_info
from .losses import TrainingLoss
from .models import make_model
from .storage import write_atomically

__all__ = ["FORMAT", "LoadedModel", "load_checkpoint", "load_model", "reading_state", "save_checkpoint"]

FORMAT: Final = 1
_KEYS: Final = {"format", "about", "model"}
_FOLDER: Final = 0x10  # among the attributes of a member of a zip file

# Of "about" what a model is made from and what attacks need to know, and their types.
_ABOUT: Final[dict[str, tuple[type, ...]]] = {
    **dict.fromkeys(("dataset", "model"), (str,)),
    **dict.fromkeys(("classes", "seed"), (int,)),
    **dict.fromkeys(("shape", "mean", "std"), (list, tuple)),
    "head": (str, type(None)),  # None in those of a time when all were linear
    "loss": (dict,),
    "recipe": (dict, type(None)),
    "data_dir": (str, type(None)),
}


@dataclass(frozen=True)
class LoadedModel:
    """A trained model in evaluation mode, inputs in [0, 1], and what it is: see "about" in `checkpoint`."""

    model: nn.Module
    about: dict[str, Any]


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint; once this returns it is on the disk. Killed before that, the old file stays.

    Args:
        path: of the file; its folder exists.
        content: see above; tensors, numbers, strings, None, and lists, tuples and dicts of them.

    Raises:
        OSError: the file cannot be written, the disk being full, for one.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch's zip writer hides the reason why a write failed
                raise OSError(f"cannot write {path}: is the disk full? {str(error).partition(chr(10))[0]}") from error

    write_atomically(path, write)


@contextmanager
def reading_state(path: Path, remedy: str) -> Iterator[None]:
    """What goes wrong while the state in a checkpoint is taken over becomes a ValueError that names file and remedy."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        what = f"{path} holds no state that this training could go on from"
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{what}, {type(error).__name__}: {reason}: {remedy}") from error


def load_checkpoint(path: Path | str, *, command: str = "drsl train") -> dict[str, Any]:
    """The content of a checkpoint, its tensors on the CPU. Nothing in the file is executed.

    Args:
        path: of the file.
        command: what writes such checkpoints, for the messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, no checkpoint of that command, or of a later format.
    """
    path = Path(path)
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no checkpoint {path}") from None
    not_one = f"{path} is no checkpoint of {command}"
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what readers of zip files and pickles raise on other files is anything
        # torch's own text begins with advice on how to trust the file nonetheless.
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{not_one}: {reason or 'it is damaged, or a file of another kind'}") from error
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        raise ValueError(f"{not_one}: it must be a dict with {', '.join(sorted(_KEYS))}")
    version, model = content["format"], content["model"]
    if not isinstance(version, int) or version != FORMAT:
        raise ValueError(f"{path} has format {version!r}, and this version of drsl_kernels reads {FORMAT}")
    if not isinstance(model, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in model.items()):
        raise ValueError(f"{not_one}: 'model' must be a dict of tensors by their names")
    return content


def load_model(path: Path | str, *, device: torch.device | str = "cpu") -> LoadedModel:
    """The model of a checkpoint, in evaluation mode on `device`.

    Raises:
        FileNotFoundError, ValueError: see `load_checkpoint`; ValueError also where it does not tell what model it is.
        RuntimeError: the weights are not those of the model that the checkpoint names.
    """
    content = load_checkpoint(path)
    about = content["about"]
    try:
        _check_about(about)
        model = make_model(
            about["model"],
            shape=tuple(about["shape"]),
            classes=about["classes"],
            seed=about["seed"],
            mean=about["mean"],
            std=about["std"],
            head=about.get("head") or "linear",
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not tell what model it holds: {error}") from error
    model.load_state_dict(content["model"])
    return LoadedModel(model.to(device).eval(), about)


def _check_sums(path: Path) -> None:
    """Raises an error where a file is no zip file that is whole, which `torch.load` does not look at."""
    with zipfile.ZipFile(path) as file:
        # Of a member that is marked as a folder torch reads nothing: its tensor holds whatever the memory did.
        damaged = next((i.filename for i in file.infolist() if i.external_attr & _FOLDER), file.testzip())
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} is damaged")


def _check_about(about: Any) -> None:
    """What a model is, and what attacks ask about it; raises TypeError or ValueError."""
    if not isinstance(about, dict):
        raise TypeError(f"'about' must be a dict, got {about!r}")
    for name, kinds in _ABOUT.items():
        if name not in about and type(None) not in kinds:
            raise ValueError(f"'about' has no {name!r}")
        if not isinstance(about.get(name), kinds):
            raise TypeError(f"{name!r} is {about[name]!r}")
    loss, shape = about["loss"], dataset_info(about["dataset"]).shape
    if loss.keys() != {"name", "tau"}:
        raise ValueError(f"'loss' must have name and tau, got {loss!r}")
    smoothing = (about.get("recipe") or {}).get("label_smoothing", 0.0)
    TrainingLoss(**loss).smoothing(number("label_smoothing", smoothing))
    if tuple(about["shape"]) != shape:
        raise ValueError(f"'shape' must be {list(shape)} for {about['dataset']}, got {about['shape']!r}")
