"""The outcome of a comparison as a table, as JSON and as CSV.

Relies on `experiment`; `compare_command`, `pictures` and `page` rely on it.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from .attack_names import attacks_in_words, eps_names
from .detection_report import detection_means
from .experiment import Comparison
from .identity import environment
from .judging import RunResult
from .losses import TrainingLoss
from .mean_std import MeanStd
from .run_checks import Finding
from .settings import TrainingSettings
from .storage import write_atomically, write_json

__all__ = [
    "RESULTS",
    "MeanStd",
    "accuracies",
    "explanation",
    "felled_by",
    "finding_lines",
    "results_tables",
    "time_rows",
    "write_results",
]

RESULTS: Final = ("results.json", "results.csv")

# Losses side by side in a terminal of 80 columns.
_COLUMNS: Final = 4

_CSV_COLUMNS: Final = ("loss", "tau", "seed", "eps", "accuracy", "correct", "images")


def explanation(comparison: Comparison) -> dict[str, str]:
    """What the numbers mean, in plain words, for whoever meets the table or the files alone."""
    training, judging = comparison.settings.training, comparison.settings.judging
    seeds = len(comparison.seeds)
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "a single seed"
    return {
        "training": training_in_words(training),
        "accuracy": f"percent of {comparison.runs[0].images} {judging.held_out} images, {over}"
        + ("; the best epoch was chosen with the same images" if judging.held_out == "validation" else ""),
        "robust": (
            f"per-sample worst case over {attacks_in_words(judging.attacks, judging.parameters)}; "
            "no pixel, in [0, 1], changed by more than eps"
        ),
        "time": _timing_in_words(comparison),
    }


def _timing_in_words(comparison: Comparison) -> str:
    if comparison.timed is None:
        return "not timed: at a constant learning rate training diverged"
    training = comparison.settings.training
    threads = f", threads: {training.threads}" if training.device == "cpu" else ""
    return f"{comparison.timed.in_words()}, turns taken with F.cross_entropy, on {training.device}{threads}"


def finding_lines(comparison: Comparison) -> list[Text]:
    """The masking checks that warn, and how many pass or cannot tell."""
    findings = comparison.findings()
    warnings = [finding for finding in findings if finding.outcome == "warning"]
    lines = [Text.assemble(("WARNING", "bold red"), f" {finding.in_words()}") for finding in warnings]
    if findings:
        passed = sum(finding.outcome == "passed" for finding in findings)
        rest = len(findings) - len(warnings) - passed
        told = f"{len(warnings)} of {len(findings)} warn, {passed} pass, {rest} cannot tell"
        lines.append(Text(f"masking checks: {told}; see the report"))
    return lines


def training_in_words(training: TrainingSettings) -> str:
    """Data set, model and method: what all runs have in common."""
    recipe, attack = training.recipe, training.recipe.adversarial
    said = [f"{training.model} on {training.dataset}"]
    if training.samples is not None:
        said.append(f"at most {training.samples} training images")
    epochs = f"{recipe.epochs} epoch{'' if recipe.epochs == 1 else 's'}"
    said.append(f"{epochs} of {recipe.optimizer} at {recipe.learning_rate:g} ({recipe.schedule})")
    for penalty, weight in (("weight decay", recipe.weight_decay), ("Absum", recipe.absum), ("L1", recipe.l1)):
        if weight:
            said.append(f"{penalty} {weight:g}")
    if attack is not None:
        said.append(
            f"adversarial training ({attack.method}) with {attack.steps} steps of {attack.alpha:.3g} within "
            f"eps {attack.eps:.4g} ({attack.norm})"
        )
    if recipe.label_noise:
        said.append(
            f"{100 * recipe.label_noise:g} % of the training labels wrong, those that choose the epoch all right"
        )
    if recipe.amp != "none":
        said.append(f"mixed precision ({recipe.amp})")
    return ", ".join(said) + "; the weights of the best epoch on images held out of training"


def results_tables(comparison: Comparison) -> list[Table]:
    """One column per loss, in as many tables as stay readable; `explanation` says what they mean."""
    losses = comparison.losses
    groups = [losses[start : start + _COLUMNS] for start in range(0, len(losses), _COLUMNS)]
    tables = [_table(comparison, group) for group in groups]
    tables[0].title = f"Accuracy of {comparison.settings.training.dataset} classifiers, in %"
    return tables


def write_results(comparison: Comparison, folder: Path) -> None:
    """Write results.json (all but the softmax values) and results.csv (one line per loss, seed and eps)."""
    as_json, as_csv = (folder / name for name in RESULTS)
    write_json(as_json, _as_json(comparison))
    write_atomically(as_csv, lambda path: _write_csv(comparison, path))


def _table(comparison: Comparison, losses: Sequence[TrainingLoss]) -> Table:
    table = Table()
    table.add_column("trained with")
    for loss in losses:
        table.add_column(str(loss).replace(" ", "\n"), justify="right")
    clean, *robust = zip(*(accuracies(comparison.of(loss)) for loss in losses), strict=True)
    table.add_row("clean", *(value.percent() for value in clean))
    for name, values in zip(eps_names(comparison.settings.judging.epsilons), robust, strict=True):
        table.add_row(f"robust, eps {name}", *(value.percent() for value in values))
    table.add_section()
    for row in time_rows(comparison, losses):
        table.add_row(*row)
    return table


def time_rows(comparison: Comparison, losses: Sequence[TrainingLoss]) -> list[list[str]]:
    """The last rows of tables: what they are, then one cell per loss."""
    times = [comparison.times.get(loss) for loss in losses]
    return [
        ["seconds per epoch", *("not timed" if time is None else f"{time.seconds:.4f}" for time in times)],
        ["ratio to F.cross_entropy", *("not timed" if time is None else f"{time.ratio:.2f}" for time in times)],
    ]


def accuracies(runs: Sequence[RunResult]) -> list[MeanStd]:
    """Clean first, then one per radius."""
    rows = [(run.clean_accuracy, *run.robust_accuracy) for run in runs]
    return [MeanStd.of(values) for values in zip(*rows, strict=True)]


def felled_by(comparison: Comparison, run: RunResult) -> list[dict[str, Any]]:
    """How many images fell to each attack, at each radius, of those that the attacks before it had left standing."""
    judging = comparison.settings.judging
    counts = Counter((radius, attack) for radius, attack, _ in run.fell)
    return [
        {"eps": eps, "attack": name, "images": counts[radius, attack]}
        for radius, eps in enumerate(judging.epsilons)
        for attack, name in enumerate(judging.attacks)
    ]


def _as_json(comparison: Comparison) -> dict[str, Any]:
    runs = zip(comparison.runs, comparison.threads, comparison.checks, strict=True)
    detections = comparison.detections or ((),) * len(comparison.runs)
    return {
        "meaning": explanation(comparison) | {"units": "accuracies are fractions, times are seconds"},
        "environment": environment(),
        "settings": comparison.settings.as_json(),
        "seeds": list(comparison.seeds),
        "summary": [_summary(comparison, loss) for loss in comparison.losses],
        "checks": [_finding(finding) for finding in comparison.findings()],
        "runs": [
            _run(comparison, run)
            | {"threads": threads, "checks": [asdict(check) for check in checks]}
            | ({"detection": [asdict(detection) for detection in found]} if found else {})
            for (run, threads, checks), found in zip(runs, detections, strict=True)
        ],
    }


def _summary(comparison: Comparison, loss: TrainingLoss) -> dict[str, Any]:
    clean, *robust = accuracies(comparison.of(loss))
    time = comparison.times.get(loss)
    found = detection_means(comparison, loss)
    return {
        "loss": loss.name,
        "tau": loss.tau,
        "clean_accuracy": asdict(clean),
        "robust_accuracy": [
            {"eps": eps, **asdict(value)}
            for eps, value in zip(comparison.settings.judging.epsilons, robust, strict=True)
        ],
        "seconds_per_epoch": None if time is None else time.seconds,
        "ratio_to_cross_entropy": None if time is None else time.ratio,
    } | ({"detection": [means.as_json() for means in found]} if found else {})


def _finding(finding: Finding) -> dict[str, Any]:
    content = asdict(finding)
    loss = content.pop("loss")
    return {"loss": loss["name"], "tau": loss["tau"], **content}


def _run(comparison: Comparison, run: RunResult) -> dict[str, Any]:
    return {
        "loss": run.loss.name,
        "tau": run.loss.tau,
        "seed": run.seed,
        "images": run.images,
        "clean_accuracy": run.clean_accuracy,
        "robust_accuracy": [
            {"eps": eps, "accuracy": accuracy}
            for eps, accuracy in zip(comparison.settings.judging.epsilons, run.robust_accuracy, strict=True)
        ],
        "best_epoch": run.best_epoch,
        "felled_by": felled_by(comparison, run),
        "epochs": [asdict(row) for row in run.epochs],
    }


def _write_csv(comparison: Comparison, path: Path) -> None:
    """eps 0 is the clean accuracy."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_CSV_COLUMNS)
        for run in comparison.runs:
            for eps, accuracy in comparison.accuracy_by_eps(run).items():
                correct = round(accuracy * run.images)
                writer.writerow([run.loss.name, run.loss.tau, run.seed, eps, accuracy, correct, run.images])
