"""The commands of `drsl`: read options, show progress, print. The work is done in `experiment`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, cast

import click
from rich.console import Console

from drsl_kernels import __version__

from .attack_command import attack_command
from .attacks import ATTACK_LOSSES, AttackLossName
from .command_parts import ProgressBars, check_device, prepare_folder, reproducible
from .data import PARTS, Part
from .experiment import Settings, compare, run_path
from .losses import BASELINE, DEFAULT_TAUS, LOSS_NAMES, TrainingLoss
from .options import Folder, Names, Radii, Tau
from .page import PAGES, write_pages
from .pictures import PICTURES, draw_pictures
from .report import RESULTS, explanation, results_tables, write_results
from .train import Recipe
from .train_command import train_command

__all__ = ["drsl"]

_DEFAULTS: Final = Settings()

# Bounds that keep numbers where torch takes them: seeds in 64 bits, threads within what a machine can start.
_MOST_SEEDS: Final = 10_000
_LARGEST_SEED: Final = 2**63 - _MOST_SEEDS
_MOST_THREADS: Final = 1024

_DEFAULT_TAUS: Final = "; ".join(
    f"{name}={','.join(f'{tau:g}' for tau in taus)}" for name, taus in DEFAULT_TAUS.items() if any(taus)
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="drsl")
def drsl() -> None:
    """Train image classifiers with robust losses, and attack them.

    To begin, run `drsl compare`: it needs no options and no data of yours.
    """


drsl.add_command(train_command)
drsl.add_command(attack_command)


@drsl.command("compare")
@click.option(
    "--losses",
    type=Names("loss", LOSS_NAMES),
    default="ce,uniform,non_target_logits",
    show_default=True,
    help=f"What to train with, names with commas between. {BASELINE} is cross-entropy alone; each of "
    f"{', '.join(name for name in LOSS_NAMES if name != BASELINE)} is cross-entropy plus tau times the "
    "distance of that name.",
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
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=_DEFAULTS.recipe.epochs,
    show_default=True,
    help="How often training passes over its images.",
)
@click.option(
    "--eps",
    type=Radii(),
    default=",".join(f"{eps:g}" for eps in _DEFAULTS.epsilons),
    show_default=True,
    help="How far an attack may change each pixel, pixels being from 0 to 1. Several with commas between; "
    "fractions such as 8/255 will do.",
)
@click.option(
    "--attacks",
    type=Names("attack", ATTACK_LOSSES),
    default=",".join(_DEFAULTS.attack_losses),
    show_default=True,
    help="What attacks make large, names with commas between. An image counts only if it survives them all.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=_DEFAULTS.steps,
    show_default=True,
    help="Gradient steps of each attack.",
)
@click.option(
    "--restarts",
    type=click.IntRange(min=1),
    default=_DEFAULTS.restarts,
    show_default=True,
    help="Random starts of each attack.",
)
@click.option(
    "--held-out",
    type=click.Choice(PARTS),
    default=_DEFAULTS.held_out,
    show_default=True,
    help="Images to judge with. validation sets aside some of the training images: choose options with it.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Use only so many training images, and as many to judge with. For a quick try.",
)
@click.option(
    "--out",
    type=Folder(),
    default=Path("drsl-results"),
    show_default=True,
    help="Folder for the results. Finished runs found in it are used again if made with the same options.",
)
@click.option("--fresh", is_flag=True, help="Train and attack again even where a finished run is found.")
@click.option(
    "--threads",
    type=click.IntRange(min=1, max=_MOST_THREADS),
    default=_DEFAULTS.threads,
    show_default=True,
    help="CPU threads. The network is so small that more of them gain little; they change the last digits.",
)
@click.option(
    "--device",
    default=_DEFAULTS.device,
    show_default=True,
    help="Where to compute: cpu, or cuda for a GPU.",
)
def compare_command(
    losses: tuple[str, ...],
    taus: tuple[tuple[TrainingLoss, ...], ...],
    seeds: int,
    seed: int,
    out: Path,
    fresh: bool,
    epochs: int,
    **options: Any,
) -> None:
    """Train with several losses, attack the outcome, compare.

    Small networks are trained on the 1297 training images of scikit-learn's handwritten digits (8x8 pixels,
    nothing is downloaded) and judged with the 500 test images: as they are, and after attacks that change
    every pixel by at most eps to make the network fail. What remains correct is the robust accuracy. Prints a
    table and writes a report (report.html and report.md, with pictures) and the numbers (results.json and
    results.csv) to the folder --out.

    \b
    Examples:
      drsl compare
      drsl compare --losses ce,kl --seeds 5 --eps 8/255,0.1
    Is a gain real? Attack harder, and so far that nothing should survive:
      drsl compare --steps 100 --restarts 10 --eps 0.1,0.4 --out harder
    Choose tau without a look at the test images:
      drsl compare --held-out validation --seed 100 --seeds 5 --eps 0.1 --restarts 2 --out sweep \\
        --tau uniform=0.1,0.3,1,3,10,30,100 --tau non_target_logits=0.03,0.05,0.1,0.3,1,3

    The last is how the default taus were chosen. Robust accuracy at eps 0.1 went from 52 % (ce) to 70 % with
    non_target_logits at any tau from 0.1 to 1, and to 67 % with uniform at any tau from 10 to 100, while
    uniform with tau up to 0.3 changed nothing. Clean accuracy did not suffer. Hence non_target_logits=0.3,
    and uniform=0.3,30: once at the tau of the other and once at its own best, where its softmax is so flat
    that it tells little about how sure the network is.
    """
    contestants = _contestants(losses, taus)
    check_device(options["device"])
    all_seeds = range(seed, seed + seeds)
    runs = [run_path(out, loss, seed) for loss in contestants for seed in all_seeds]
    prepare_folder(out, [*runs, *(out / name for name in (*RESULTS, *PICTURES, *PAGES))])
    settings = Settings(
        recipe=Recipe(epochs=epochs),
        epsilons=options["eps"],
        attack_losses=cast("tuple[AttackLossName, ...]", options["attacks"]),
        steps=options["steps"],
        restarts=options["restarts"],
        held_out=cast(Part, options["held_out"]),
        samples=options["samples"],
        device=options["device"],
        threads=options["threads"],
    )
    console = Console()
    with reproducible(settings.threads), ProgressBars(console, len(contestants) * seeds) as bars:
        try:
            comparison = compare(settings, contestants, all_seeds, out, bars, fresh=fresh)
        except FloatingPointError as error:
            raise click.ClickException(str(error)) from error
    write_results(comparison, out)
    draw_pictures(comparison, out)
    write_pages(comparison, out)
    if comparison.reused:
        console.print(f"Found finished in {out} and used again: {comparison.reused} of {len(comparison.runs)} runs.")
    for table in results_tables(comparison):
        console.print(table)
    for what, meaning in explanation(comparison).items():
        console.print(f"{what}: {meaning}", highlight=False)
    console.print(f"Written to {out}: {', '.join(RESULTS)}, {', '.join(PICTURES)}, {', '.join(PAGES)}", soft_wrap=True)


def _contestants(names: tuple[str, ...], taus: tuple[tuple[TrainingLoss, ...], ...]) -> list[TrainingLoss]:
    """The losses in the order of their names, each with the taus given for it or else its own."""
    chosen = {name: [TrainingLoss(name, tau) for tau in DEFAULT_TAUS[name]] for name in names}
    for losses in taus:
        name = losses[0].name
        if name not in names:
            raise click.BadParameter(f"{name!r} is not among --losses {','.join(names)}", param_hint="--tau")
        chosen[name] = list(losses)
    return [loss for name in names for loss in chosen[name]]
