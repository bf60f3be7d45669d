"""The command `drsl train`: options become settings, progress becomes bars. The work is done in `engine`.

`commands` registers it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .balls import NORMS
from .command_parts import check_device, fix_cublas, keep_freed_memory, refuse_file
from .distributed import joined_world
from .engine import BEST, Outcome, read_settings, run
from .loss_names import (
    ALL_LOSSES,
    BASELINE,
    GAUSSIAN,
    GAUSSIAN_IN_WORDS,
    MEMBERS_IN_WORDS,
    NAMES_IN_WORDS,
    SMOOTHED,
)
from .losses import TrainingLoss
from .options import Distance, Folder, Loss, check_radius
from .recipe import AUGMENTATIONS, CRAFT_MODES, INNER_LOSSES, OPTIMIZERS, SCHEDULES
from .settings import TrainingSettings, default_tau
from .training_folder import LOCK
from .training_logs import EpochRow
from .training_options import (
    absum_option,
    adversarial_option,
    amp_option,
    batch_size_option,
    changed_recipe,
    data_dir_option,
    dataset_option,
    device_option,
    epochs_option,
    l1_option,
    label_noise_option,
    lr_option,
    model_option,
    suited_to,
    threads_option,
    weight_decay_option,
)

__all__ = ["train_command"]

# Options that do something only together with another one, and whether they do.
_NEEDS: Final[dict[str, tuple[str, Callable[[TrainingSettings], bool]]]] = {
    "momentum": ("--optimizer sgd", lambda settings: settings.recipe.optimizer == "sgd"),
    "data_dir": ("a --dataset with files, which digits has not", lambda settings: settings.dataset != "digits"),
    "robust_images": ("--adversarial madry or trades", lambda settings: _method(settings) is not None),
    "inner_loss": ("--adversarial madry", lambda settings: _method(settings) == "madry"),
    "beta": ("--adversarial trades", lambda settings: _method(settings) == "trades"),
}

_OF_RUN: Final = ("model", "seed", "device", "threads", "samples", "robust_images", "data_dir")


class _Milestones(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Epochs with commas between, as a tuple."""

    name = "epochs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(epoch) for epoch in value.split(","))
        except ValueError:
            self.fail(f"{value!r} must be epochs such as 75,90", param, ctx)


@click.command("train")
@dataset_option
@data_dir_option
@model_option
@click.option(
    "--loss",
    "loss_name",
    type=Loss(),
    help=f"One of {', '.join(ALL_LOSSES)}. {BASELINE} is cross-entropy alone, {SMOOTHED} the same with labels smoothed "
    f"by tau, {MEMBERS_IN_WORDS}, {GAUSSIAN_IN_WORDS}; any other is cross-entropy plus tau times the distance of that "
    f"name; {NAMES_IN_WORDS}; drsl is short for uniform.  "
    f"[default: {BASELINE}]",
)
@click.option(
    "--tau",
    type=float,
    help=f"Weight of the distance, in {GAUSSIAN} of the likelihood, in {SMOOTHED} how much. By default what suits the "
    "loss on the digits.",
)
@epochs_option
@batch_size_option
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="sgd has Nesterov momentum.")
@lr_option
@weight_decay_option
@absum_option
@l1_option
@click.option("--momentum", type=float, help="Of sgd.  [default: 0.9]")
@click.option("--schedule", type=click.Choice(SCHEDULES), help="How the learning rate changes; multistep: times 0.1.")
@click.option("--milestones", type=_Milestones(), help="Epochs after which multistep lowers the rate, as in 75,90.")
@click.option("--warmup", type=float, help="So many epochs the rate rises linearly first.  [default: 0]")
@click.option("--clip-norm", type=float, help="Shorten the gradient to this length.")
@click.option("--label-smoothing", type=float, help="In [0, 1).  [default: 0]")
@label_noise_option
@click.option("--augmentation", type=click.Choice(AUGMENTATIONS), help="Random crops (4 pixels) and mirror images.")
@amp_option
@adversarial_option
@click.option(
    "--eps",
    type=Distance(math.inf),
    help="Radius of the attack, pixels being from 0 to 1, in --norm; 8/255 will do.",
)
@click.option(
    "--alpha", type=Distance(math.inf), help="Step size of the attack.  [default in l2: 2.5 eps over all steps]"
)
@click.option("--steps", type=click.IntRange(min=1), help="Steps of the attack.")
@click.option("--norm", type=click.Choice(NORMS), help="Of the attack.  [default: linf]")
@click.option("--random-start/--no-random-start", default=None, help="Where attacks begin.  [default: random]")
@click.option(
    "--inner-loss",
    type=click.Choice(INNER_LOSSES),
    help="What madry's attack ascends; training is the training loss with its distance.  [default: ce]",
)
@click.option("--beta", type=float, help="Weight of the divergence in trades.  [default: 6]")
@click.option(
    "--craft-mode",
    type=click.Choice(CRAFT_MODES),
    help="The network's mode while attacks are made.  [default: as in the papers' code: madry train, trades eval]",
)
@click.option(
    "--robust-images",
    type=click.IntRange(min=1),
    help="Validation images attacked after each epoch of adversarial training.  [default: 512]",
)
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), help="Of all randomness.  [default: 0]")
@click.option("--samples", type=click.IntRange(min=1), help="Use only so many images. For a quick try.")
@device_option
@threads_option
@click.option("--out", type=Folder(), required=True, help="Folder for the run.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run in --out, with its options; begin it if none is there and some are given.",
)
@click.option(
    "--checkpoint-batches",
    type=click.IntRange(min=1),
    help="Write a checkpoint after so many batches, too, not only after each epoch.",
)
@click.option("--tensorboard/--no-tensorboard", default=True, help="Write curves for TensorBoard, if installed.")
def train_command(out: Path, resume: bool, checkpoint_batches: int | None, tensorboard: bool, **options: Any) -> None:
    """Train a model and keep the best epoch.

    The best is chosen by accuracy on images held out of the training images (robust accuracy under a quick PGD, with
    --adversarial); the test images are never loaded. The folder --out gets best.pt, last.pt, settings.json, metrics.csv
    and curves for TensorBoard. A run that was interrupted, even by kill -9, goes on with --resume and ends with the
    weights that it would have had. The same seed gives the same weights on the same machine.

    \b
    Defaults:
      digits                   small_cnn  adam 0.002, constant, 40 epochs            eps 0.1, 10 steps
      mnist                    small_cnn  adam 0.001, cosine, 20 epochs              eps 0.3, 40 steps
      fashion_mnist            small_cnn  adam 0.001, cosine, 20 epochs              eps 0.1, 10 steps
      cifar10, cifar100        resnet18   sgd 0.1, weight decay 5e-4, cosine,        eps 8/255, 10 steps
                                          100 epochs, crop_flip
      all of them              --norm l2                                             eps 0.5, 10 steps

    \b
    Examples:
      drsl train --loss non_target_logits --out runs/drsl
      drsl train --dataset cifar10 --data-dir data --adversarial trades --amp bfloat16 --device cuda --out runs/trades
      drsl train --resume --out runs/trades
      torchrun --nproc-per-node 4 -m drsl_kernels.robustness train --dataset cifar10 --device cuda --out runs/four
    """
    keep_freed_memory()
    given = {name: value for name, value in options.items() if value is not None}
    try:
        refuse_file(out)
        settings = _settings(out, resume, given)
        fix_cublas(settings.device)
        with joined_world(settings.device) as world:
            check_device(settings.device)
            console = Console(quiet=world.rank > 0, markup=False)
            with _Bars(console) as bars:
                outcome = run(
                    settings,
                    out,
                    resume=resume,
                    world=world,
                    checkpoint_batches=checkpoint_batches or 0,
                    tensorboard=tensorboard,
                    progress=bars,
                )
            _report(outcome, out, console)
    except (ValueError, FloatingPointError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _settings(out: Path, resume: bool, given: dict[str, Any]) -> TrainingSettings:
    """What is given over what the run began with, or else over what suits the data set."""
    begun = read_settings(out) if resume else None
    if begun is None and resume and not given and not (out / LOCK).exists():  # a mistyped --out, most likely
        raise click.UsageError(
            f"{out} holds no training run to resume; to begin one there, leave out --resume or give other options, too"
        )
    if begun is None:
        begun = suited_to(given.get("dataset", "digits"))
    _check_radii(begun, given)
    settings = dataclasses.replace(
        begun,
        dataset=given.get("dataset", begun.dataset),
        loss=_loss(begun.loss, given),
        recipe=changed_recipe(begun, given),
        **{name: given[name] for name in _OF_RUN if name in given},
    )
    _refuse_unused(settings, given)
    return settings


def _check_radii(begun: TrainingSettings, given: dict[str, Any]) -> None:
    adversarial = begun.recipe.adversarial
    norm = given.get("norm", adversarial.norm if adversarial else NORMS[0])
    for option in ("eps", "alpha"):
        check_radius(given.get(option, 0.0), norm, f"--{option}")


def _refuse_unused(settings: TrainingSettings, given: dict[str, Any]) -> None:
    """Refuse what would do nothing: whoever gives it believes that it does something."""
    for option, (needed, is_used) in _NEEDS.items():
        if option in given and not is_used(settings):
            raise click.UsageError(f"--{option.replace('_', '-')} needs {needed}")
    if given.get("milestones", (0,))[-1] >= settings.recipe.epochs:
        raise click.BadParameter(
            f"{given['milestones'][-1]} is not before the last of {settings.recipe.epochs} epochs",
            param_hint="--milestones",
        )


def _method(settings: TrainingSettings) -> str | None:
    adversarial = settings.recipe.adversarial
    return None if adversarial is None else adversarial.method


def _loss(begun: TrainingLoss, given: dict[str, Any]) -> TrainingLoss:
    name = given.get("loss_name", begun.name)
    return TrainingLoss(name, given.get("tau", begun.tau if name == begun.name else default_tau(name)))


def _report(outcome: Outcome, out: Path, console: Console) -> None:
    if outcome.was_finished:
        console.print(f"{out} is finished: {len(outcome.rows)} epochs; nothing is left to do.", soft_wrap=True)
    console.print(f"Best: {_in_words(outcome.best)}; written to {out / BEST}", highlight=False, soft_wrap=True)


def _in_words(row: EpochRow) -> str:
    accuracy = f"validation accuracy {100 * row.validation_accuracy:.1f} %"
    text = f"epoch {row.epoch}, training loss {row.train_loss:.4f}, {accuracy}"
    if row.validation_robust_accuracy is not None:
        text += f", robust (quick PGD) {100 * row.validation_robust_accuracy:.1f} %"
    return text


class _Bars:
    """One bar for the epochs and one for the batches of the epoch at work, and a line for each epoch."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._epochs = self._bars.add_task("epochs", total=None)
        self._batches = self._bars.add_task("", total=None)

    def __enter__(self) -> _Bars:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def begin(self, settings: TrainingSettings, epoch: int, batches: int, batch: int) -> None:
        self._bars.update(self._epochs, total=settings.recipe.epochs, completed=epoch - 1)
        self._bars.reset(self._batches, total=batches, completed=batch, description=f"epoch {epoch}")

    def batch(self) -> None:
        self._bars.advance(self._batches)

    def epoch(self, row: EpochRow, best: bool) -> None:
        self._bars.update(self._epochs, completed=row.epoch)
        mark = " (best so far)" if best else ""
        self._console.print(f"{_in_words(row)}, {row.seconds:.1f} s{mark}", highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)
