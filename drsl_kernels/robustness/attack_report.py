"""The outcome of attacks on checkpoints as tables, sentences, JSON and CSV.

Relies on `attack_run`; `attack_command` relies on it.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from .attack_names import attacks_in_words, eps_names
from .attack_run import Attacked, AttackSettings
from .attack_table import AttackOutcome
from .identity import environment
from .masking import Check
from .storage import write_atomically, write_json

__all__ = [
    "RESULTS",
    "check_lines",
    "digests_of",
    "explanation",
    "heading",
    "results_table",
    "wave_lines",
    "write_results",
]

RESULTS: Final = ("results.json", "results.csv")

_CSV_COLUMNS: Final = ("checkpoint", "attack", "norm", "eps", "accuracy", "correct", "images", "seconds")
_MARKS: Final = {"passed": ("passed ", "green"), "warning": ("WARNING", "bold red"), "not run": ("not run", "yellow")}


def explanation(settings: AttackSettings, results: Sequence[Attacked]) -> dict[str, str]:
    """What the numbers mean, in plain words, for whoever meets the table or the files alone."""
    numbers = settings.parameters
    datasets = ", ".join(dict.fromkeys(result.subject.loaded.about["dataset"] for result in results))
    images = ", ".join(dict.fromkeys(str(result.images) for result in results))
    ball = (
        "no pixel, in [0, 1], changed by more than eps"
        if numbers.norm == "linf"
        else "pixels in [0, 1], the Euclidean length of an image's change at most eps"
    )
    return {
        "accuracy": f"percent of {images} {settings.held_out} images of {datasets}",
        "attack": f"{attacks_in_words(settings.attacks, numbers)}; {ball}; each attack on its own",
        "worst case": "images that survive every attack, sample by sample, at this eps and every smaller one",
    }


def heading(result: Attacked) -> str:
    """Which checkpoint, and what it is."""
    about = result.subject.loaded.about
    loss = about["loss"]
    with_tau = f" tau={loss['tau']:g}" if loss["tau"] else ""
    return f"{result.subject.path}: {about['model']} on {about['dataset']}, {loss['name']}{with_tau}; accuracy in %"


def results_table(result: Attacked) -> Table:
    """Attacks by radius, for one checkpoint; `explanation` says what they mean."""
    table = result.table
    drawn = Table()
    drawn.add_column("attack", no_wrap=True)
    for name in eps_names(table.epsilons):
        drawn.add_column(f"eps {name}", justify="right")
    drawn.add_row("none", *[_percent(table.clean_accuracy())] * len(table.epsilons))
    for attack in table.attacks:
        drawn.add_row(attack, *(_percent(table.of(attack, eps).accuracy()) for eps in table.epsilons))
    drawn.add_section()
    drawn.add_row("worst case", *map(_percent, table.worst_case().values()), style="bold")
    return drawn


def wave_lines(result: Attacked) -> list[str]:
    """The frequency that the single Fourier attack chose at each radius, and what it does."""
    lines = []
    for outcome in result.table.outcomes:
        if outcome.found is not None:
            wave = _wave(outcome.found)
            l, m = wave["frequency"]  # noqa: E741
            lines.append(
                f"{outcome.attack}, eps {outcome.eps:.4g}: worst is {'+' if wave['sign'] > 0 else '-'} the wave "
                f"(l, m) = ({l}, {m}), which fools {100 * wave['fooling_rate']:.1f} % of the {wave['samples']} images "
                "classified correctly"
            )
    return lines


def check_lines(checks: Sequence[Check]) -> list[Text]:
    """One line for each masking check, those that warn first."""
    ordered = sorted(checks, key=lambda check: ("warning", "passed", "not run").index(check.outcome))
    return [_line(check) for check in ordered]


def write_results(settings: AttackSettings, results: Sequence[Attacked], folder: Path) -> None:
    """Write results.json and results.csv. The outcome of each image and each frequency is in parts/ alone."""
    as_json, as_csv = (folder / name for name in RESULTS)
    content = {
        "meaning": explanation(settings, results) | {"units": "accuracies are fractions, times are seconds"},
        "environment": environment(),
        "settings": asdict(settings),
        "checkpoints": [_as_json(result) for result in results],
    }
    write_json(as_json, content)
    write_atomically(as_csv, lambda path: _write_csv(settings, results, path))


def digests_of(content: dict[str, Any]) -> set[str]:
    """Of the checkpoints that `write_results` told of."""
    return {entry["sha256"] for entry in content["checkpoints"]}


def _line(check: Check) -> Text:
    mark, style = _MARKS[check.outcome]
    where = "" if check.eps is None else f", eps {check.eps:.4g}"
    return Text.assemble((mark, style), f" {check.name}{where}: {check.sentence}")


def _as_json(result: Attacked) -> dict[str, Any]:
    table = result.table
    return {
        "path": str(result.subject.path),
        "sha256": result.subject.digest,
        "about": result.subject.loaded.about,
        "images": result.images,
        "clean_accuracy": table.clean_accuracy(),
        "worst_case": [{"eps": eps, "accuracy": accuracy} for eps, accuracy in table.worst_case().items()],
        "attacks": [
            {
                "attack": outcome.attack,
                "black_box": outcome.black_box,
                "eps": outcome.eps,
                "accuracy": outcome.accuracy(),
                "standing_after_each_start": outcome.standing(),
                "seconds": outcome.seconds,
            }
            | _chosen(outcome)
            for outcome in table.outcomes
        ],
        "checks": [asdict(check) for check in result.checks],
    }


def _chosen(outcome: AttackOutcome) -> dict[str, Any]:
    return {} if outcome.found is None else {"worst_wave": _wave(outcome.found)}


def _wave(found: dict[str, Any]) -> dict[str, Any]:
    """What `SettledFourier.found` says of the worst frequency."""
    most = max(max(row) for row in found["fooled"])
    return {name: found[name] for name in ("frequency", "sign", "samples")} | {"fooling_rate": most / found["samples"]}


def _write_csv(settings: AttackSettings, results: Sequence[Attacked], path: Path) -> None:
    """The attack "none" has the clean accuracy; "worst_case" is over all attacks."""
    norm = settings.parameters.norm
    # A path may hold bytes that are no UTF-8.
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(_CSV_COLUMNS)
        for result in results:
            table, name, images = result.table, str(result.subject.path), result.images
            clean = int(table.clean_correct.sum())
            writer.writerow([name, "none", norm, 0.0, table.clean_accuracy(), clean, images, ""])
            for o in table.outcomes:
                standing = int(o.robust.sum())
                writer.writerow([name, o.attack, norm, o.eps, o.accuracy(), standing, images, round(o.seconds, 3)])
            for eps, accuracy in table.worst_case().items():
                writer.writerow([name, "worst_case", norm, eps, accuracy, int(table.robust(eps).sum()), images, ""])


def _percent(accuracy: float) -> str:
    return f"{100 * accuracy:.1f}"
