"""The command `drsl compare`: options become settings, progress becomes bars. The work is done in `experiment`.

`commands` registers it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

import click
from rich.table import Table

from drsl_kernels.spec import DISTANCES

from .attack_names import KINDS, least_classes
from .attack_options import (
    attack_parameters,
    attacks_option,
    check_package,
    iterations_option,
    queries_option,
    refuse_unused,
    restarts_option,
    steps_option,
    targets_option,
)
from .command_parts import (
    ProgressBars,
    check_device,
    earlier_results,
    fix_cublas,
    keep_freed_memory,
    one_process,
    plain_console,
    prepare_folder,
    reproducible,
)
from .data import PARTS, Part, dataset_info
from .detection_report import detection_rows, detection_words
from .detection_run import DETECTED
from .engine import BEST, FILES
from .experiment import Comparison, Settings, compare, run_folder
from .judging import JUDGED, Judging
from .loss_names import (
    ALL_LOSSES,
    BASELINE,
    DEFAULT_TAUS,
    GAUSSIAN_IN_WORDS,
    MEMBERS_IN_WORDS,
    NAMES_IN_WORDS,
    SMOOTHED,
    default_taus,
)
from .losses import TrainingLoss
from .options import Distance, Folder, Losses, Radii, Tau
from .page import PAGES, write_pages
from .pictures import PICTURES, draw_pictures
from .report import RESULTS, explanation, finding_lines, results_tables, write_results
from .run_checks import CHECKS
from .settings import TrainingSettings
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

__all__ = ["compare_command"]

_DEFAULTS: Final = Judging()

# Of this command's options those that `drsl train` has, by the same names.
_OF_RUN: Final = ("model", "device", "threads", "data_dir")

_REGULARIZERS: Final = ("weight_decay", "absum", "l1")

# Bounds that keep seeds where torch takes them, in 64 bits.
_MOST_SEEDS: Final = 10_000
_LARGEST_SEED: Final = 2**63 - _MOST_SEEDS

_DEFAULT_TAUS: Final = "; ".join(
    f"{name}={','.join(f'{tau:g}' for tau in taus)}" for name, taus in DEFAULT_TAUS.items() if any(taus)
)


@click.command("compare")
@click.option(
    "--losses",
    type=Losses(),
    default="ce,uniform,non_target_logits",
    show_default=True,
    help=f"What to train with, of {', '.join(ALL_LOSSES)}, with commas between. {BASELINE} is cross-entropy "
    f"alone, {SMOOTHED} the same with labels smoothed by tau, {MEMBERS_IN_WORDS}, {GAUSSIAN_IN_WORDS}; each of "
    f"{', '.join(DISTANCES)} is cross-entropy plus tau times the distance of that name; {NAMES_IN_WORDS}; drsl is "
    "short for uniform.",
)
@click.option(
    "--tau",
    "taus",
    type=Tau(),
    multiple=True,
    help="Weight of a loss's distance, as in non_target_logits=0.3; once for each loss that shall not have "
    "its default. Several values, as in uniform=1,10, train with each of them. Defaults: " + _DEFAULT_TAUS,
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1, max=_MOST_SEEDS),
    default=3,
    show_default=True,
    help="Models to train per loss.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=_LARGEST_SEED),
    default=0,
    show_default=True,
    help="First seed; the others follow. The same seed gives the same numbers on the same machine, except for times.",
)
@dataset_option
@data_dir_option
@model_option
@epochs_option
@batch_size_option
@lr_option
@weight_decay_option
@absum_option
@l1_option
@label_noise_option
@amp_option
@adversarial_option
@click.option(
    "--train-eps",
    type=Distance(),
    help="Radius of the attack in training, as --eps of drsl train. Its steps become longer or shorter with it.",
)
@click.option("--train-steps", type=click.IntRange(min=1), help="Steps of the attack in training.")
@click.option(
    "--train-images",
    type=click.IntRange(min=1),
    help="Train with only the first so many images, and choose the epoch with at most as many.",
)
@click.option(
    "--eps",
    type=Radii(),
    default=",".join(f"{eps:g}" for eps in _DEFAULTS.epsilons),
    show_default=True,
    help="How far an attack may change each pixel, pixels being from 0 to 1. Several with commas between; "
    "fractions such as 8/255 will do.",
)
@attacks_option(_DEFAULTS.attacks, kinds=tuple(kind for kind in KINDS if kind != "transfer"))
@steps_option
@restarts_option
@targets_option
@iterations_option
@queries_option
@click.option(
    "--held-out",
    type=click.Choice(PARTS),
    default=_DEFAULTS.held_out,
    show_default=True,
    help="Images to judge with. validation is what training sets aside to choose the epoch with: choose options with "
    "it, and do not look at the test images.",
)
@click.option("--test-images", type=click.IntRange(min=1), help="Judge with only the first so many images.")
@click.option(
    "--check-images",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="Images that the masking checks look at; 0 for no checks.",
)
@click.option(
    "--detect",
    is_flag=True,
    help="Try, too, how well a score of each network (the log-likelihood for gm) tells attacked images and images of "
    "another kind from normal ones; with an attack on the classifier alone, and with one that goes for the score, too.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Both --train-images and --test-images, where they are not given. For a quick try.",
)
@click.option(
    "--out",
    type=Folder(),
    default=Path("drsl-results"),
    show_default=True,
    help="Folder for the results. Runs found in it are used again, finished or not, if made with the same options. "
    "Several commands may fill it at the same time, with seeds or losses of their own.",
)
@click.option("--fresh", is_flag=True, help="Train and attack again even where a run is found.")
@threads_option
@device_option
def compare_command(
    losses: tuple[str, ...],
    taus: tuple[tuple[TrainingLoss, ...], ...],
    seeds: int,
    seed: int,
    out: Path,
    fresh: bool,
    **options: Any,
) -> None:
    """Train with several losses, attack the outcome, compare.

    Without options, small networks are trained on scikit-learn's handwritten digits (8x8 pixels, nothing is
    downloaded) and judged with the 500 test images: as they are, and after attacks that change every pixel by at
    most eps to make the network fail. What remains correct is the robust accuracy; masking checks look for signs
    that it is too high. Prints a table and writes a report (report.html and report.md, with pictures) and the
    numbers (results.json and results.csv) to the folder --out.

    Each run is one of drsl train, in a folder of its own in runs/ with its checkpoints; the best epoch is chosen on
    images held out of the training set. If it is interrupted, even by kill -9, the same command goes on.

    Other data sets, networks and their defaults are those of drsl train; see drsl train --help.

    \b
    Examples:
      drsl compare
      drsl compare --losses ce,kl --seeds 5 --eps 8/255,0.1
      drsl compare --dataset fashion_mnist --adversarial trades --attacks pgd,square --test-images 1000
    Is a gain real? Attack harder, and so far that nothing should survive:
      drsl compare --steps 100 --restarts 10 --eps 0.1,0.4 --out harder
    Are attacked images at least noticed?
      drsl compare --losses ce,gm --detect
    Choose tau without a look at the test images:
      drsl compare --held-out validation --seed 100 --seeds 5 --eps 0.1 --restarts 2 --out sweep \\
        --tau uniform=0.1,0.3,1,3,10,30,100 --tau non_target_logits=0.03,0.05,0.1,0.3,1,3

    The last is how the default taus were chosen. Robust accuracy at eps 0.1 went from 52 % (ce) to 70 % with
    non_target_logits at any tau from 0.1 to 1, and to 67 % with uniform at any tau from 10 to 100, while
    uniform with tau up to 0.3 changed nothing. Clean accuracy did not suffer. Hence non_target_logits=0.3,
    and uniform=0.3,30: once at the tau of the other and once at its own best, where its softmax is so flat
    that it tells little about how sure the network is.
    """
    one_process("drsl compare")
    keep_freed_memory()
    contestants = _contestants(losses, taus)
    settings = _settings(options)
    fix_cublas(settings.training.device)
    check_device(settings.training.device)
    all_seeds = range(seed, seed + seeds)
    _prepare(out, [run_folder(out, loss, seed) for loss in contestants for seed in all_seeds])
    console = plain_console()
    with reproducible(settings.training.threads), ProgressBars(console, len(contestants) * seeds) as bars:
        try:
            comparison = compare(settings, contestants, all_seeds, out, bars, fresh=fresh)
        except (FloatingPointError, OSError, ValueError) as error:
            raise click.ClickException(str(error)) from error
    write_results(comparison, out)
    draw_pictures(comparison, out)
    write_pages(comparison, out)
    if comparison.reused:
        reused = f"{comparison.reused} of {len(comparison.runs)} runs"
        console.print(f"Found finished in {out} and used again: {reused}.", soft_wrap=True)
    for table in results_tables(comparison):
        console.print(table)
    for line in finding_lines(comparison):
        console.print(line, highlight=False)
    for found in _detection(comparison):
        console.print(found, highlight=False)
    for what, meaning in explanation(comparison).items():
        console.print(f"{what}: {meaning}", highlight=False)
    console.print(f"Written to {out}: {', '.join(RESULTS)}, {', '.join(PICTURES)}, {', '.join(PAGES)}", soft_wrap=True)


def _detection(comparison: Comparison) -> list[Table | str]:
    """What `--detect` found: a table, and how to read it."""
    rows = detection_rows(comparison)
    if not rows:
        return []
    table = Table(title="Are abnormal images found? ROC-AUC")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i > 1 else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return [table, *detection_words(comparison)]


def _contestants(names: tuple[str, ...], taus: tuple[tuple[TrainingLoss, ...], ...]) -> list[TrainingLoss]:
    """The losses in the order of their names, each with the taus given for it or else its own."""
    chosen = {name: [TrainingLoss(name, tau) for tau in default_taus(name)] for name in names}
    given: set[str] = set()
    for losses in taus:
        name = losses[0].name
        if name in given:
            message = f"{name} is given twice; several values look like {name}=0.1,1"
            raise click.BadParameter(message, param_hint="--tau")
        given.add(name)
        if name not in names:
            raise click.BadParameter(f"{name!r} is not among --losses {','.join(names)}", param_hint="--tau")
        chosen[name] = list(losses)
    return [loss for name in names for loss in chosen[name]]


def _settings(options: dict[str, Any]) -> Settings:
    attacks: tuple[str, ...] = options["attacks"]
    if any(name.startswith("transfer") for name in attacks):
        raise click.BadParameter("transfer is an attack of drsl attack, for two checkpoints", param_hint="--attacks")
    refuse_unused(attacks)
    check_package(attacks)
    given = {name: value for name, value in options.items() if value is not None}
    try:
        training = _training(given)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    classes = dataset_info(training.dataset).classes
    for name in attacks:
        if classes < least_classes(name):
            needs = f"{name} needs {least_classes(name)} classes or more, {training.dataset} has {classes}"
            raise click.BadParameter(needs, param_hint="--attacks")
    if "data_dir" in given and training.dataset == "digits" and not options["detect"]:
        raise click.UsageError("--data-dir needs a --dataset with files, which digits has not, or --detect")
    judging = Judging(
        epsilons=options["eps"],
        attacks=attacks,
        parameters=attack_parameters(options),
        held_out=cast(Part, options["held_out"]),
        images=options["test_images"] or options["samples"],
    )
    return Settings(training, judging, options["check_images"], options["detect"])


def _training(given: dict[str, Any]) -> TrainingSettings:
    begun = suited_to(given.get("dataset", "digits"))
    names = ("epochs", "batch_size", "lr", "label_noise", "amp", "adversarial", "dataset", *_REGULARIZERS)
    changes = {name: given[name] for name in names if name in given}
    attack = {name: given[f"train_{name}"] for name in ("eps", "steps") if f"train_{name}" in given}
    usual = changed_recipe(begun, changes).adversarial
    if usual is not None:  # all steps together go as far, in units of eps, as is usual
        eps, steps = attack.get("eps", usual.eps), attack.get("steps", usual.steps)
        attack["alpha"] = usual.alpha * (eps / usual.eps) * (usual.steps / steps)
    return dataclasses.replace(
        begun,
        recipe=changed_recipe(begun, changes | attack, prefix="train-"),
        samples=given.get("train_images", given.get("samples")),
        **{name: given[name] for name in _OF_RUN if name in given},
    )


def _prepare(out: Path, runs: Sequence[Path]) -> None:
    """What is in the way is found before the work; folders of runs come with the runs."""
    earlier_results(out / RESULTS[0], ("summary", "runs"), "drsl compare")
    kept = [run / name for run in runs if run.exists() for name in (*FILES, BEST, JUDGED, CHECKS, DETECTED)]
    prepare_folder(out, [out / "runs" / "any", *kept, *(out / name for name in (*RESULTS, *PICTURES, *PAGES))])
