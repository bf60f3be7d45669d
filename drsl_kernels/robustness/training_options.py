"""Options of training that several commands have, and how they change settings.

Options that are not given are None, and leave what suits the data set. Relies on `options`, `settings` and `recipe`;
`train_command` and `compare_command` rely on it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

import click
import torch

from .data import DATASETS
from .models import MODELS
from .recipe import AMP, METHODS, Recipe
from .settings import TrainingSettings, default_attack, default_settings

__all__ = [
    "absum_option",
    "adversarial_option",
    "amp_option",
    "batch_size_option",
    "changed_recipe",
    "data_dir_option",
    "dataset_option",
    "device_option",
    "epochs_option",
    "l1_option",
    "label_noise_option",
    "lr_option",
    "model_option",
    "suited_to",
    "threads_option",
    "weight_decay_option",
]

_NONE: Final = "none"
_MOST_THREADS: Final = 1024

# Options by the part of the settings that they change, and the name of the field where it is another.
_OF_RECIPE: Final = {
    **{name: name for name in ("epochs", "batch_size", "optimizer", "weight_decay", "momentum", "schedule")},
    **{name: name for name in ("milestones", "clip_norm", "label_smoothing", "label_noise", "augmentation", "amp")},
    **{name: name for name in ("absum", "l1")},
    "lr": "learning_rate",
    "warmup": "warmup_epochs",
}
_OF_ATTACK: Final = {
    **{name: name for name in ("eps", "alpha", "steps", "norm", "random_start", "beta")},
    "inner_loss": "loss",
    "craft_mode": "mode",
}

dataset_option = click.option("--dataset", type=click.Choice(DATASETS), help="Images to train on.  [default: digits]")
data_dir_option = click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Folder with the files of the data set."
)
model_option = click.option(
    "--model", type=click.Choice(MODELS), help="Network, by default the one that suits the data set."
)
epochs_option = click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training images.")
batch_size_option = click.option(
    "--batch-size", type=click.IntRange(min=1), help="Images per step, of all processes together.  [default: 128]"
)
lr_option = click.option("--lr", type=float, help="Learning rate: the highest of the schedule.")
weight_decay_option = click.option("--weight-decay", type=float, help="Of all parameters.")
absum_option = click.option(
    "--absum",
    type=float,
    help="Weight of the sums of convolution kernels (arXiv 1909.08830), by a proximal step.  [default: 0]",
)
l1_option = click.option(
    "--l1", type=float, help="Weight of the L1 norm of convolution kernels, in place of --absum.  [default: 0]"
)
label_noise_option = click.option(
    "--label-noise",
    type=float,
    help="Share of the training labels made wrong first. The labels that choose the best epoch stay right, which data "
    "that are noisy themselves do not offer.  [default: 0]",
)
amp_option = click.option(
    "--amp", type=click.Choice(AMP), help="Mixed precision; float16 needs a GPU.  [default: none]"
)
adversarial_option = click.option(
    "--adversarial",
    type=click.Choice((_NONE, *METHODS)),
    help="Train on attacked images: madry (arXiv 1706.06083) or trades (arXiv 1901.08573).  [default: none]",
)
device_option = click.option("--device", help="cpu, or cuda for a GPU.  [default: cpu]")
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1, max=_MOST_THREADS),
    help="CPU threads; they change the last digits.  [default: 1 for digits, else what torch chooses]",
)


def suited_to(dataset: str) -> TrainingSettings:
    """What suits a data set: on larger images than the digits' more threads than one are worth it."""
    settings = default_settings(dataset)
    return settings if dataset == "digits" else dataclasses.replace(settings, threads=torch.get_num_threads())


def changed_recipe(begun: TrainingSettings, given: dict[str, Any], *, prefix: str = "") -> Recipe:
    """The recipe of `begun` with the options that are given; `prefix` is what the names of those of the attack have."""
    changes = {field: given[option] for option, field in _OF_RECIPE.items() if option in given}
    if changes.get("schedule", "multistep") != "multistep":
        changes.setdefault("milestones", ())
    adversarial = begun.recipe.adversarial
    method = given.get("adversarial", adversarial.method if adversarial else _NONE)
    norm = given.get("norm", adversarial.norm if adversarial else "linf")
    attack = {field: given[option] for option, field in _OF_ATTACK.items() if option in given}
    if method == _NONE:
        if attack:
            option = next(option for option in _OF_ATTACK if option in given).replace("_", "-")
            raise click.UsageError(f"--{prefix}{option} needs --adversarial madry or trades")
        adversarial = None
    elif adversarial is None or (adversarial.method, adversarial.norm) != (method, norm):
        adversarial = default_attack(given.get("dataset", begun.dataset), method, norm)
        if norm == "l2" and "alpha" not in attack:
            usual = attack.get("eps", adversarial.eps) / adversarial.eps * adversarial.steps
            attack["alpha"] = adversarial.alpha * usual / attack.get("steps", adversarial.steps)
    if adversarial is not None:
        adversarial = dataclasses.replace(adversarial, **attack)
    return dataclasses.replace(begun.recipe, **changes, adversarial=adversarial)
