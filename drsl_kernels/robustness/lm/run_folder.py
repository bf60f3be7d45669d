"""The folder of a language model's training run: which run it holds, and whether that can go on.

Relies on `..training_folder` for the names of its files and for who may use it, on `..checkpoint` and `settings`;
`engine` and `experiment` rely on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from drsl_kernels import __version__

from ..checkpoint import FORMAT, LoadedModel, load_checkpoint
from ..distributed import World
from ..settings import differences
from ..storage import read_json, write_json
from ..training_folder import BEST, LAST, METRICS, SETTINGS
from .corpus import Corpus
from .model import GPT, Shape
from .settings import LanguageSettings

__all__ = [
    "BEST",
    "COMMAND",
    "LAST",
    "METRICS",
    "REMEDY",
    "SETTINGS",
    "begin",
    "load_language_model",
    "obstacle",
    "read_last",
    "read_run",
]

COMMAND: Final = "drsl lm"
_KEYS: Final = ("settings", "processes", "text", "tokens")
REMEDY: Final = "train anew (--fresh), or choose another folder"


def begin(folder: Path, settings: LanguageSettings, corpus: Corpus, world: World) -> None:
    """Write down which run the folder is for."""
    write_json(
        folder / SETTINGS,
        {
            "format": FORMAT,
            "settings": settings.as_json(),
            **_surroundings(corpus, world),
            "software": {"drsl_kernels": __version__, "torch": str(torch.__version__)},
        },
    )


def read_run(folder: Path) -> LanguageSettings | None:
    """The settings of the run in a folder, None if there is none. ValueError if they are not those of such a run."""
    return _content(folder)[1] if (folder / SETTINGS).exists() else None


def obstacle(folder: Path, settings: LanguageSettings, corpus: Corpus, world: World) -> str | None:
    """Why the run in the folder cannot go on as this one, in words; None where it can, or where there is none."""
    if not (folder / SETTINGS).exists():
        return None
    content, before = _content(folder)
    around = {name: content[name] for name in ("processes", "text", "tokens")}
    different = differences(before.identity() | around, settings.identity() | _surroundings(corpus, world))
    if different:
        return f"was made with other settings and is made anew: {'; '.join(different)}"
    if (folder / LAST).exists() and not (folder / BEST).exists() and read_last(folder)["state"]["rows"]:
        return f"has lost {BEST} and is made anew"
    return None


def read_last(folder: Path) -> dict[str, Any]:
    """The checkpoint that the run goes on from. ValueError where it is damaged, or none to go on from."""
    try:
        content = load_checkpoint(folder / LAST, command=COMMAND)
    except ValueError as error:
        raise ValueError(f"{error}: {REMEDY}") from error
    state = content.get("state")
    if not isinstance(state, dict) or not isinstance(state.get("rows"), list):
        raise ValueError(f"{folder / LAST} holds a model but no state that training could go on from: {REMEDY}")
    return content


def load_language_model(path: Path | str, *, device: torch.device | str = "cpu") -> LoadedModel:
    """The model of a checkpoint of `drsl lm`, in evaluation mode on `device`, and what it is.

    `about` has "shape" (see `Shape`), "loss", "seed", "step", "text" and "tokens" (digests), and versions. Nothing in
    the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint of `drsl lm`.
        RuntimeError: the weights are not those of the model that the checkpoint tells of.
    """
    content = load_checkpoint(path, command=COMMAND)
    try:
        model: nn.Module = GPT(Shape(**content["about"]["shape"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint of {COMMAND}: it does not tell what model it holds") from error
    model.load_state_dict(content["model"])
    return LoadedModel(model.to(device).eval(), content["about"])


def _surroundings(corpus: Corpus, world: World) -> dict[str, Any]:
    return {"processes": world.size, "text": corpus.text.digest, "tokens": corpus.tokens.digest}


def _content(folder: Path) -> tuple[dict[str, Any], LanguageSettings]:
    path = folder / SETTINGS
    content = read_json(path)
    try:
        if any(name not in content for name in _KEYS):
            raise KeyError
        return content, LanguageSettings.from_json(content["settings"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{path} does not hold the settings of a run of {COMMAND}"
        raise ValueError(f"{what}: {REMEDY}") from error
