"""The command `drsl lm`: options become settings, progress becomes bars. The work is done in `experiment`.

`..commands` registers it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
import torch
from rich.console import Console
from rich.table import Table

from ..balls import NORMS
from ..command_parts import (
    ProgressBars,
    check_device,
    earlier_results,
    fix_cublas,
    keep_freed_memory,
    plain_console,
    prepare_folder,
)
from ..distributed import joined_world
from ..loss_names import ALIASES
from ..losses import TrainingLoss
from ..options import Decorator, Folder, Names, Radii, Tau
from .corpus import PARTS
from .embedding_attack import EMBEDDING_LOSSES
from .experiment import LanguageComparison, LanguageSetup, judge_all, prepared_corpus, run_folder, train_all
from .judging import JUDGED, LanguageJudging
from .losses import DEFAULT_TAUS, LANGUAGE_LOSSES, LanguageLoss
from .model import POSITIONS
from .page import PAGES, write_pages
from .pictures import PICTURES, draw_pictures
from .report import RESULTS, cautions, explanation, table, write_results
from .run_folder import BEST, LAST, METRICS, SETTINGS
from .settings import SHARDINGS, LanguageSettings
from .substitution import PROPOSALS
from .text import STDLIB
from .tokens import TOKENS

__all__ = ["lm_command"]

_TRAINING: Final = LanguageSettings()
_JUDGING: Final = LanguageJudging()
_MOST_SEEDS: Final = 10_000
_LARGEST_SEED: Final = 2**63 - _MOST_SEEDS

# Options by the fields of the settings that they become.
_OF_TRAINING: Final = (
    *("text", "tokens", "vocabulary", "context", "layers", "heads", "width", "positions", "tied", "components"),
    *("steps", "batch_size", "learning_rate", "warmup", "weight_decay", "clip_norm", "evaluate_every"),
    *("validation_windows", "device", "threads", "sharding"),
)
_OF_JUDGING: Final = ("radii", "norm", "budgets", "proposals", "candidates", "sequences", "held_out")


class _Counts(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Whole numbers with commas between, as a tuple."""

    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(count) for count in value.split(","))
        except ValueError:
            self.fail(f"{value!r} must be whole numbers such as 1,2,4", param, ctx)


def _comma(values: Sequence[object]) -> str:
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


_SIZE = click.IntRange(min=1)


def _option(name: str, field: str, kind: Any, words: str, *, of: object = _TRAINING) -> Decorator:
    """An option whose default is that of the settings, and shown with it."""
    default = getattr(of, field)
    shown = _comma(default) if isinstance(default, tuple) else f"{default}"
    return click.option(name, field, type=kind, help=f"{words}  [default: {shown}]")


@click.command("lm")
@click.option(
    "--losses",
    type=Names("loss", LANGUAGE_LOSSES, ALIASES),
    default="ce,non_target_logits",
    show_default=True,
    help=f"What to train with, some of {', '.join(LANGUAGE_LOSSES)}, with commas between; a distance is cross-entropy "
    "plus tau times it, sigsoftmax and the mixtures are output layers; drsl is short for uniform.",
)
@click.option(
    "--tau",
    "taus",
    type=Tau(),
    multiple=True,
    help="Weight of a loss's distance, as in uniform=1; several values train with each of them. Defaults: "
    + "; ".join(f"{name}={tau:g}" for name, tau in DEFAULT_TAUS.items() if tau),
)
@click.option(
    "--seeds", type=click.IntRange(min=1, max=_MOST_SEEDS), default=1, show_default=True, help="Models per loss."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=_LARGEST_SEED),
    default=0,
    show_default=True,
    help="First seed; the others follow.",
)
@_option(
    "--text",
    "text",
    str,
    f"A file, a folder of which all files are read, or {STDLIB}: the modules of Python's own standard library.",
)
@_option("--tokens", "tokens", click.Choice(TOKENS), "bytes, or BPE learned from the training part.")
@_option("--vocabulary", "vocabulary", click.IntRange(min=256), "Most tokens that BPE makes.")
@_option("--context", "context", _SIZE, "Tokens that the model reads at most.")
@_option("--layers", "layers", _SIZE, "Blocks of the transformer.")
@_option("--heads", "heads", _SIZE, "Attention heads.")
@_option("--width", "width", _SIZE, "Size of a token's vector.")
@_option("--positions", "positions", click.Choice(POSITIONS), "How the model knows them.")
@click.option("--tied/--untied", default=None, help="Output layer with the weights of the embedding.  [default: tied]")
@_option("--components", "components", _SIZE, "Of mixtures.")
@_option("--steps", "steps", _SIZE, "Training steps.")
@_option("--batch-size", "batch_size", _SIZE, "Windows of text per step, of all processes together.")
@_option("--lr", "learning_rate", float, "Highest learning rate.")
@_option("--warmup", "warmup", float, "Share of the steps in which it rises.")
@_option("--weight-decay", "weight_decay", float, "Of matrices.")
@_option("--clip-norm", "clip_norm", float, "Shorten gradients to this length.")
@_option("--evaluate-every", "evaluate_every", _SIZE, "Steps between evaluations, the best of which is kept.")
@_option("--validation-windows", "validation_windows", _SIZE, "Windows of the validation part that are looked at.")
@_option("--eps", "radii", Radii(math.inf), "Radii, as shares of the mean length of the model's vectors.", of=_JUDGING)
@_option("--norm", "norm", click.Choice(NORMS), "Of the change of each token's vector.", of=_JUDGING)
@click.option(
    "--attack-losses",
    type=Names("loss", EMBEDDING_LOSSES),
    help=f"What PGD ascends, some of {', '.join(EMBEDDING_LOSSES)}.  [default: {_comma(_JUDGING.losses)}]",
)
@click.option("--attack-steps", type=_SIZE, help=f"Steps of PGD.  [default: {_JUDGING.steps}]")
@click.option("--restarts", type=_SIZE, help=f"Starts of PGD.  [default: {_JUDGING.restarts}]")
@_option("--substitutions", "budgets", _Counts(), "Numbers of tokens to exchange.", of=_JUDGING)
@_option(
    "--proposals",
    "proposals",
    Names("proposal", PROPOSALS),
    f"Where candidates come from, some of {', '.join(PROPOSALS)}.",
    of=_JUDGING,
)
@_option("--candidates", "candidates", _SIZE, "Evaluated for each exchange.", of=_JUDGING)
@_option("--sequences", "sequences", _SIZE, "Sequences that are attacked.", of=_JUDGING)
@_option("--held-out", "held_out", click.Choice(PARTS), "The part to judge with.", of=_JUDGING)
@_option("--sharding", "sharding", click.Choice(SHARDINGS), "With torchrun: whole models, or FSDP2's parts of one.")
@click.option(
    "--out",
    type=Folder(),
    default=Path("drsl-lm-results"),
    show_default=True,
    help="Folder for the results. Runs found in it are used again, finished or not, if made with the same options.",
)
@click.option("--fresh", is_flag=True, help="Train and attack again even where a run is found.")
@_option("--device", "device", str, "cpu, or cuda for a GPU.")
@click.option(
    "--threads",
    type=click.IntRange(min=1, max=1024),
    help="CPU threads; they change the last digits.  [default: what torch chooses]",
)
def lm_command(
    losses: tuple[str, ...],
    taus: tuple[tuple[TrainingLoss, ...], ...],
    seeds: int,
    seed: int,
    out: Path,
    fresh: bool,
    **options: Any,
) -> None:
    """Train language models with several losses, attack them, compare.

    Without options, small GPTs learn the source of Python's own standard library, byte by byte: nothing is downloaded.
    They are judged by perplexity on a part of the text that is neither trained on nor looked at before, as it is;
    after PGD on the vectors of its tokens; and after some of its tokens were exchanged. Prints a table and writes a
    report (report.html and report.md, with pictures) and the numbers (results.json, results.csv) to the folder --out.

    If it is interrupted, even by kill -9, the same command goes on. Several processes of torchrun train together.

    \b
    Examples:
      drsl lm
      drsl lm --losses ce,drsl,sigsoftmax,mixture_of_softmax --tau uniform=0.3,3 --seeds 3
      drsl lm --text kjv.txt --tokens bpe --vocabulary 2048 --steps 3000
      torchrun --nproc-per-node 2 -m drsl_kernels.robustness lm --sharding fsdp --device cuda
    """
    keep_freed_memory()
    try:
        setup = _setup(options)
        contestants = _contestants(losses, taus)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    training, all_seeds = setup.training, range(seed, seed + seeds)
    fix_cublas(training.device)
    _prepare(out, [run_folder(out, loss, number) for loss in contestants for number in all_seeds])
    try:
        with joined_world(training.device) as world:
            check_device(training.device)
            console = Console(quiet=True) if world.rank else plain_console()
            corpus = prepared_corpus(training, out, world)
            with ProgressBars(console, len(contestants) * seeds) as bars:
                trained = train_all(setup, corpus, contestants, all_seeds, out, bars, world=world, fresh=fresh)
        if world.rank:
            return
        with ProgressBars(console, len(contestants) * seeds) as bars:
            comparison = judge_all(setup, corpus, contestants, all_seeds, trained, out, bars)
    except (FloatingPointError, ModuleNotFoundError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    write_results(comparison, out)
    draw_pictures(comparison, out)
    write_pages(comparison, out)
    _show(comparison, out, console)


def _show(comparison: LanguageComparison, out: Path, console: Console) -> None:
    if comparison.reused:
        found = f"{comparison.reused} of {len(comparison.runs)} runs"
        console.print(f"Found finished in {out} and used again: {found}.", soft_wrap=True)
    head, *rows = table(comparison)
    shown = Table()
    for i, name in enumerate(head):
        head_of = name.replace(" ", "\n") if i else name
        shown.add_column(head_of, justify="right" if i else "left", no_wrap=not i, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    for words in cautions(comparison):
        console.print(f"- {words}", highlight=False)
    for what, meaning in explanation(comparison).items():
        console.print(f"{what}: {meaning}", highlight=False)
    console.print(f"Written to {out}: {', '.join((*RESULTS, *PICTURES, *PAGES))}", soft_wrap=True)


def _contestants(names: tuple[str, ...], taus: tuple[tuple[TrainingLoss, ...], ...]) -> list[LanguageLoss]:
    """The losses in the order of their names, each with the taus given for it or else its own."""
    chosen = {name: [LanguageLoss.named(name)] for name in names}
    for losses in taus:
        name = losses[0].name
        if name not in names:
            raise click.BadParameter(f"{name!r} is not among --losses {','.join(names)}", param_hint="--tau")
        chosen[name] = [LanguageLoss(loss.name, loss.tau) for loss in losses]
    return [loss for name in names for loss in chosen[name]]


def _setup(options: dict[str, Any]) -> LanguageSetup:
    """What is given over the defaults. Raises ValueError for what does not go together."""
    given = {name: value for name, value in options.items() if value is not None}
    if "vocabulary" in given and given.get("tokens", _TRAINING.tokens) != "bpe":
        raise click.UsageError("--vocabulary needs --tokens bpe")
    training = {name: given[name] for name in _OF_TRAINING if name in given}
    training.setdefault("threads", torch.get_num_threads())
    judging: dict[str, Any] = {name: given[name] for name in _OF_JUDGING if name in given}
    renamed = {"losses": "attack_losses", "steps": "attack_steps", "restarts": "restarts"}
    judging |= {field: given[option] for field, option in renamed.items() if option in given}
    return LanguageSetup(LanguageSettings(**training), LanguageJudging(**judging))


def _prepare(out: Path, runs: Sequence[Path]) -> None:
    """What is in the way is found before the work; folders of runs come with the runs."""
    earlier_results(out / RESULTS[0], ("tokens", "runs"), "drsl lm")
    files = (SETTINGS, LAST, BEST, METRICS, JUDGED)
    kept = [run / name for run in runs if run.exists() for name in files]
    prepare_folder(out, [out / "runs" / "any", *kept, *(out / name for name in (*RESULTS, *PICTURES, *PAGES))])
