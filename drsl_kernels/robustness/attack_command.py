"""The command `drsl attack`: reads options, shows progress, prints. The work is done in `attack_run`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

import click

from .attack_names import FOURIER, ONLY_LINF, canonical_names, least_classes
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
from .attack_parts import parts_of
from .attack_report import (
    RESULTS,
    check_lines,
    digests_of,
    explanation,
    heading,
    results_table,
    wave_lines,
    write_results,
)
from .attack_run import AttackSettings, Subject, attack_checkpoint, load_subject
from .attacks import NORMS, Norm
from .command_parts import (
    ProgressBars,
    check_device,
    earlier_results,
    keep_freed_memory,
    one_process,
    plain_console,
    prepare_folder,
    reproducible,
)
from .data import PARTS, Part
from .fourier_pictures import draw_heat_map, heat_map_name
from .options import Folder, Radii, check_radius
from .storage import set_aside

__all__ = ["attack_command"]

_DEFAULTS: Final = AttackSettings()
_USUAL_EPS: Final[dict[str, float]] = {"linf": 8 / 255, "l2": 0.5}
_MOST_THREADS: Final = 1024


@click.command("attack")
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="CHECKPOINT...")
@attacks_option(_DEFAULTS.attacks)
@click.option(
    "--eps",
    "epsilons",
    type=Radii(largest=math.inf),
    help="How far an attack may change an image, pixels being from 0 to 1: each pixel (linf), or the Euclidean length "
    "of the change (l2). Several with commas between; fractions such as 8/255 will do.  [default: 8/255; 0.5 for l2]",
)
@click.option(
    "--norm", type=click.Choice(NORMS), default=_DEFAULTS.parameters.norm, show_default=True, help="What eps bounds."
)
@steps_option
@restarts_option
@targets_option
@iterations_option
@queries_option
@click.option(
    "--transfer-from",
    "sources",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="CHECKPOINT",
    help="A model on which the attack 'transfer' finds its points; may be given several times. Without 'transfer' "
    "among the attacks, it is added.",
)
@click.option(
    "--held-out",
    type=click.Choice(PARTS),
    default=_DEFAULTS.held_out,
    show_default=True,
    help="Images to judge with. validation is what training set aside: choose options with it.",
)
@click.option("--samples", type=click.IntRange(min=1), help="Attack only the first so many images.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=_DEFAULTS.batch_size,
    show_default=True,
    help="Images that the model sees at a time.",
)
@click.option(
    "--check-samples",
    type=click.IntRange(min=0),
    default=_DEFAULTS.check_samples,
    show_default=True,
    help="Images that the masking checks look at; 0 for no checks.",
)
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Where the images are.  [default: where training had them]"
)
@click.option(
    "--out",
    type=Folder(),
    default=Path("drsl-attack"),
    show_default=True,
    help="Folder for the results. Finished attacks found in it are used again if made with the same options; a table "
    "of other checkpoints is kept in a folder replaced-1, replaced-2, ...",
)
@click.option("--fresh", is_flag=True, help="Attack again even where a finished attack is found.")
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**63 - 1),
    default=_DEFAULTS.seed,
    show_default=True,
    help="Of the random starts. The same seed gives the same numbers on the same machine.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1, max=_MOST_THREADS),
    default=_DEFAULTS.threads,
    show_default=True,
    help="CPU threads; they change the last digits.",
)
@click.option("--device", default=_DEFAULTS.device, show_default=True, help="Where to compute: cpu, or cuda for a GPU.")
def attack_command(checkpoints: tuple[Path, ...], sources: tuple[Path, ...], **options: Any) -> None:
    """Attack trained models, and say whether the figures are to be believed.

    CHECKPOINT is a file that `drsl train` wrote, such as best.pt; it says which images it was trained on and how they
    are normalised. Prints, for each, what every attack leaves on its own and what survives them all, then the masking
    checks: signs that a model looks robust because attacks cannot see. Writes results.json and results.csv to --out;
    for the attack fourier also a picture of each model, which says what waves fool it.

    \b
    Examples:
      drsl attack runs/ce/best.pt --eps 2/255,4/255,8/255
      drsl attack runs/*/best.pt --attacks pgd:log_odds,pgd:dlr,pgd-t,square --samples 1000
      drsl attack runs/drsl/best.pt --attacks autoattack --norm l2 --eps 0.5
      drsl attack runs/drsl/best.pt --attacks fourier --eps 0.1
      drsl attack runs/drsl/best.pt --attacks pgd:margin,transfer --transfer-from runs/ce/best.pt

    A robust accuracy is an upper bound: take the worst case, over attacks of several kinds, one of them without
    gradients (square, transfer), and look at the warnings.
    """
    one_process("drsl attack")
    keep_freed_memory()
    settings, out = _settings(options, bool(sources)), options["out"]
    check_device(settings.device)
    models = [_load(path, settings.device, "CHECKPOINT") for path in dict.fromkeys(checkpoints)]
    strangers = [_load(path, settings.device, "--transfer-from") for path in dict.fromkeys(sources)]
    _check_fit(settings, models, strangers, options["data_dir"] is not None)
    before = earlier_results(out / RESULTS[0], ("meaning", "settings", "checkpoints"), "drsl attack")
    maps = [heat_map_name(model) for model in models] if FOURIER in settings.attacks else []
    prepare_folder(out, [out / name for name in (*RESULTS, *maps)] + [parts_of(out) / "any.json"])
    console = plain_console()
    if before is not None and not digests_of(before) <= {model.digest for model in models}:
        kept = set_aside(out, RESULTS)
        console.print(f"The results in {out} are of other checkpoints. They are kept in {kept}", soft_wrap=True)
    results = []
    with reproducible(settings.threads), ProgressBars(console, len(models)) as bars:
        for subject in models:
            _note_left_out(settings, subject, strangers, bars)
            try:
                result = attack_checkpoint(
                    settings, subject, strangers, out, bars, data_dir=options["data_dir"], fresh=options["fresh"]
                )
                results.append(result)
                write_results(settings, results, out)
                draw_heat_map(result, out)
            except (FloatingPointError, OSError, ValueError) as error:
                raise click.ClickException(f"{subject.path}: {error}") from error
    reused = sum(result.reused for result in results)
    if reused:
        console.print(f"Found finished in {out} and used again: {reused} attacks and checks.", soft_wrap=True)
    for result in results:
        console.print(f"\n{heading(result)}", highlight=False, soft_wrap=True)
        console.print(results_table(result))
        for wave in wave_lines(result):
            console.print(wave, highlight=False)
        for line in check_lines(result.checks):
            console.print(line, highlight=False)
    console.print()
    for what, meaning in explanation(settings, results).items():
        console.print(f"{what}: {meaning}", highlight=False)
    written = [name for name in (*RESULTS, *maps) if (out / name).exists()]
    console.print(f"Written to {out}: {', '.join(written)}", soft_wrap=True)


def _settings(options: dict[str, Any], has_source: bool) -> AttackSettings:
    norm = cast(Norm, options["norm"])
    attacks: tuple[str, ...] = options["attacks"]
    transfers = any(name.startswith("transfer") for name in attacks)
    if transfers and not has_source:
        raise click.BadParameter("the attack 'transfer' needs --transfer-from CHECKPOINT", param_hint="--attacks")
    if has_source and not transfers:
        attacks = (*attacks, *canonical_names(["transfer"]))
    for name in attacks:
        kind = name.partition(":")[0]
        if norm != "linf" and kind in ONLY_LINF:
            raise click.BadParameter(f"{kind} is an attack in the norm linf, not {norm}", param_hint="--attacks")
    check_package(attacks)
    refuse_unused(attacks)
    epsilons = options["epsilons"] or (_USUAL_EPS[norm],)
    check_radius(max(epsilons), norm, "--eps")
    return AttackSettings(
        attacks=attacks,
        epsilons=epsilons,
        parameters=attack_parameters(options, norm),
        held_out=cast(Part, options["held_out"]),
        **{name: options[name] for name in ("samples", "check_samples", "batch_size", "seed", "device", "threads")},
    )


def _load(path: Path, device: str, hint: str) -> Subject:
    try:
        return load_subject(path, device)
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise click.BadParameter(f"cannot load {path}: {reason}", param_hint=hint) from error


def _note_left_out(settings: AttackSettings, model: Subject, strangers: Sequence[Subject], bars: ProgressBars) -> None:
    if any(name.startswith("transfer") for name in settings.attacks):
        for stranger in strangers:
            if stranger.digest == model.digest:
                bars.note(f"{model.path}: nothing is transferred from {stranger.path}, which is the same model.")


def _check_fit(
    settings: AttackSettings, models: Sequence[Subject], strangers: Sequence[Subject], has_data_dir: bool
) -> None:
    """What an attack needs of a model, and what two models must have in common, before hours of work."""
    if has_data_dir and all(model.loaded.about["dataset"] == "digits" for model in models):
        raise click.UsageError("--data-dir needs a checkpoint of a data set with files, which digits has not")
    for model in models:
        about = model.loaded.about
        for name in settings.attacks:
            if about["classes"] < least_classes(name):
                needs = f"{name} needs {least_classes(name)} classes or more, {model.path} has {about['classes']}"
                raise click.BadParameter(needs, param_hint="--attacks")
        others = [stranger for stranger in strangers if stranger.digest != model.digest]
        if not others and all(name.startswith("transfer") for name in settings.attacks):
            raise click.BadParameter(
                f"nothing is left to attack {model.path} with, for a model is no stranger to itself; leave it out, or "
                "add other --attacks",
                param_hint="--transfer-from",
            )
        for stranger in others:
            other = stranger.loaded.about
            mine, theirs = ((list(a["shape"]), a["classes"]) for a in (about, other))
            if mine != theirs:
                raise click.BadParameter(
                    f"{stranger.path} takes images of shape {theirs[0]} in {theirs[1]} classes, "
                    f"{model.path} of shape {mine[0]} in {mine[1]}",
                    param_hint="--transfer-from",
                )
