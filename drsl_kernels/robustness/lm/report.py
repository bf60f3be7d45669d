"""The comparison of language models in numbers: tables, what they mean, what to keep in mind; JSON and CSV.

Relies on `experiment`; `pictures`, `page` and the command rely on it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from ..identity import environment
from ..loss_names import BASELINE
from ..mean_std import MeanStd
from ..storage import write_atomically, write_json
from .experiment import LanguageComparison
from .judging import LanguageResult, Point
from .losses import LanguageLoss

__all__ = ["RESULTS", "attack_rows", "cautions", "each_attack", "explanation", "table", "write_results"]

RESULTS: Final = ("results.json", "results.csv")

_OTHER_LENGTH: Final = 1.2  # of vectors, from which on the same share is worth a word
_NOTICEABLE: Final = 0.001  # share of a perplexity: what is printed has four digits

_CSV_COLUMNS: Final = ("loss", "tau", "seed", "attack", "size", "perplexity", "accuracy", "nats", "correct", "tokens")


def explanation(comparison: LanguageComparison) -> dict[str, str]:
    """What the numbers mean, in plain words."""
    training, judging, corpus = comparison.setup.training, comparison.setup.judging, comparison.corpus
    seeds = len(comparison.seeds)
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "a single seed"
    parts = ", ".join(f"{len(getattr(corpus.text, name)):,} to {use}" for name, use in _USES.items())
    head = "tied to the embedding" if training.tied else "with weights of its own"
    said = {
        "text": f"{corpus.text.source}; of its bytes, in contiguous parts, {parts}",
        "model": f"GPT of {training.layers} layers, width {training.width}, {training.heads} heads, context "
        f"{training.context}, {training.positions} positions, output layer {head}; {corpus.tokens.vocabulary} tokens "
        f"({training.tokens})",
        "training": f"{training.steps} steps of {training.batch_size} windows, AdamW at {training.learning_rate:g}, "
        "warmup and cosine; the weights of the best step on the validation part",
        "perplexity": f"e to the mean of -log p of a token of the {judging.held_out} part, windows of "
        f"{training.context} tokens; {over}. Kinds of tokens can be compared by bits per byte, not by perplexity",
        "embedding": f"PGD ({', '.join(judging.losses)}; {judging.steps} steps, {judging.restarts} starts, "
        f"{judging.norm}) on the vectors of the tokens of {judging.sequences} sequences, the worst per sequence of "
        "perplexity and of right predictions; radii as shares of the mean length of the model's vectors, so that a "
        "loss that shortens these is attacked in smaller balls",
        "substitution": f"of the first half of the same sequences so many tokens are exchanged "
        f"({', '.join(judging.proposals)}; {judging.candidates} candidates for each), the worst per sequence of "
        "both; scored is the second half, which stays as it is",
        "time": f"median of a training step, turns taken with F.cross_entropy, on {training.device}"
        + (f", threads: {training.threads}" if training.device == "cpu" else ""),
    }
    if judging.held_out == "validation":
        said["perplexity"] += "; the best step was chosen with the same part"
    return said


_USES: Final = {"train": "train on", "validation": "choose the best step with", "test": "test"}


def table(comparison: LanguageComparison) -> list[list[str]]:
    """The head, then the rows: what, and one cell per loss."""
    losses = comparison.losses
    rows = [["trained with", *map(str, losses)]]

    def add(name: str, value: Callable[[LanguageResult], float], text: Callable[[MeanStd], str]) -> None:
        means = (MeanStd.of([value(run) for run in comparison.of(loss)]) for loss in losses)
        rows.append([name, *map(text, means)])

    add("mean length of vectors", lambda run: run.embedding_norm, _number)
    add("perplexity", lambda run: run.score.perplexity, _number)
    add("bits per byte", lambda run: run.score.bits_per_byte, _number)
    add("next token right, %", lambda run: run.score.accuracy, MeanStd.percent)
    for name, kind, i in attack_rows(comparison):
        add(f"perplexity, {name}", lambda run, kind=kind, i=i: getattr(run, kind)[i].perplexity, _number)  # type: ignore[misc]
    for name, kind, i in attack_rows(comparison):
        add(f"right %, {name}", lambda run, kind=kind, i=i: getattr(run, kind)[i].accuracy, MeanStd.percent)  # type: ignore[misc]
    times = [comparison.times[loss] for loss in losses]
    rows.append(["seconds per step", *(f"{time.seconds:.4f}" for time in times)])
    rows.append(["ratio to F.cross_entropy", *(f"{time.ratio:.2f}" for time in times)])
    return rows


def attack_rows(comparison: LanguageComparison) -> Iterator[tuple[str, str, int]]:
    """Name, field of a result and index of each size of attack; index 0 is the attacked text as it is."""
    yield "before the attack", "embedding", 0
    for i, radius in enumerate(comparison.setup.judging.radii, 1):
        yield f"radius {radius:g}", "embedding", i
    yield "second halves before", "substitution", 0
    for i, budget in enumerate(comparison.setup.judging.budgets, 1):
        yield f"{budget} exchanged", "substitution", i


def each_attack(comparison: LanguageComparison) -> list[list[str]]:
    """Perplexity after each attack alone at its largest size: the head, then one row per attack."""
    losses, judging = comparison.losses, comparison.setup.judging
    largest = {"pgd": f"radius {judging.radii[-1]:g}"}
    rows = [["trained with", *map(str, losses)]]
    for name in comparison.runs[0].by_attack:
        size = largest.get(name.partition(":")[0], f"{judging.budgets[-1]} exchanged")
        means = (MeanStd.of([run.by_attack[name][-1].perplexity for run in comparison.of(loss)]) for loss in losses)
        rows.append([f"{name}, {size}", *map(_number, means)])
    return rows


def cautions(comparison: LanguageComparison) -> Iterator[str]:
    """What the losses do not do, and why a figure may mislead, in words."""
    if comparison.setup.judging.held_out == "validation":
        yield "This part chose the best step, too: compare options with these figures, and print those of the test."
    baseline = next((loss for loss in comparison.losses if loss.name == BASELINE), None)
    if baseline is None:
        yield "There is no baseline here: whether a loss helps cannot be told without cross-entropy beside it."
    else:
        for loss in comparison.losses:
            if loss != baseline:
                yield from _against(comparison, loss, baseline)
    if len(comparison.seeds) < 3:
        yield f"{len(comparison.seeds)} seed(s) say little about the spread between trainings: use 3 or more."
    yield from _weak_attacks(comparison)
    yield (
        "An exchanged token may change what the text means, and the continuation with it: read substitution as "
        "sensitivity, and compare models, not texts."
    )


def _against(comparison: LanguageComparison, loss: LanguageLoss, baseline: LanguageLoss) -> Iterator[str]:
    def both(value: Callable[[LanguageResult], float]) -> tuple[MeanStd, MeanStd]:
        ours, theirs = (MeanStd.of([value(run) for run in comparison.of(some)]) for some in (loss, baseline))
        return ours, theirs

    def lower(ours: MeanStd, theirs: MeanStd) -> bool:
        return theirs.mean - ours.mean > max((ours.std or 0.0) + (theirs.std or 0.0), _NOTICEABLE * theirs.mean)

    ours, theirs = both(lambda run: run.embedding_norm)
    if not 1 / _OTHER_LENGTH < ours.mean / theirs.mean < _OTHER_LENGTH:
        yield (
            f"The vectors of {loss} are {ours.mean / theirs.mean:.2f} times as long as those of {baseline}, and so are "
            "the radii: compare radii times lengths, too."
        )
    ours, theirs = both(lambda run: run.score.perplexity)
    if lower(theirs, ours):
        yield f"{loss} costs perplexity without an attack: {_number(ours)} where {baseline} has {_number(theirs)}."
    no_gain = [
        name
        for name, kind, i in attack_rows(comparison)
        if i and not lower(*both(lambda run, kind=kind, i=i: getattr(run, kind)[i].perplexity))  # type: ignore[misc]
    ]
    if no_gain:
        where = "; ".join(no_gain)
        beyond = ", beyond the spread of the seeds," if len(comparison.seeds) > 1 else ""
        yield f"{loss} has no lower perplexity than {baseline}{beyond} with: {where}."


def _weak_attacks(comparison: LanguageComparison) -> Iterator[str]:
    """Signs that an attack found less than there is."""
    for loss in comparison.losses:
        runs = comparison.of(loss)
        if min(run.embedding[-1].accuracy - run.embedding[0].accuracy / 2 for run in runs) > 0:
            yield (
                f"{loss}: at the largest radius more than half of the right predictions are left; try a larger one, "
                "where little should survive."
            )
        guided = [name for name in comparison.setup.judging.proposals if name != "random"]
        if not guided or "random" not in comparison.setup.judging.proposals:
            continue
        beaten = sum(run.by_attack["random"][-1].nats > max(run.by_attack[g][-1].nats for g in guided) for run in runs)
        if beaten:
            yield (
                f"{loss}: exchanges drawn at random did more than those that the gradient proposed, for {beaten} of "
                f"{len(runs)} seeds: the gradient misleads there, and figures may be too good."
            )


def _number(value: MeanStd) -> str:
    spread = "" if value.std is None else f" ± {value.std:.2g}"
    return f"{value.mean:.4g}{spread}"


def write_results(comparison: LanguageComparison, folder: Path) -> None:
    """Write results.json (everything) and results.csv (one line per loss, seed, attack and size)."""
    as_json, as_csv = (folder / name for name in RESULTS)
    write_json(as_json, _as_json(comparison))
    write_atomically(as_csv, lambda path: _write_csv(comparison, path))


def _as_json(comparison: LanguageComparison) -> dict[str, Any]:
    without = ("loss", "seed")
    training = {name: value for name, value in comparison.setup.training.as_json().items() if name not in without}
    return {
        "meaning": explanation(comparison) | {"units": "accuracies are fractions, losses are nats, times are seconds"},
        "cautions": list(cautions(comparison)),
        "environment": environment(),
        "text": comparison.corpus.text.digest,
        "tokens": comparison.corpus.tokens.digest,
        "settings": {"training": training, "judging": comparison.setup.judging.as_json()},
        "seeds": list(comparison.seeds),
        "times": [{"loss": loss.name, "tau": loss.tau, **asdict(time)} for loss, time in comparison.times.items()],
        "runs": [_run(run) for run in comparison.runs],
    }


def _run(run: LanguageResult) -> dict[str, Any]:
    return {
        "loss": run.loss.name,
        "tau": run.loss.tau,
        "seed": run.seed,
        "best_step": run.best_step,
        **asdict(run.score),
        "perplexity": run.score.perplexity,
        "bits_per_byte": run.score.bits_per_byte,
        "accuracy": run.score.accuracy,
        "embedding_norm": run.embedding_norm,
        "embedding": _points(run.embedding),
        "substitution": _points(run.substitution),
        "by_attack": {name: _points(points) for name, points in run.by_attack.items()},
        "sample": run.sample,
        "evaluations": [asdict(row) for row in run.rows],
    }


def _points(points: Sequence[Point]) -> list[dict[str, Any]]:
    """With perplexities as far as they are finite: JSON has no infinity."""
    return [
        asdict(point)
        | {"perplexity": point.perplexity if point.perplexity < math.inf else None, "accuracy": point.accuracy}
        for point in points
    ]


def _write_csv(comparison: LanguageComparison, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_CSV_COLUMNS)
        for run in comparison.runs:
            whole = Point(0.0, run.score.nats, run.score.correct, run.score.tokens)
            series = {"none": (whole,), "embedding": run.embedding, "substitution": run.substitution} | run.by_attack
            for attack, points in series.items():
                for p in points:
                    row = (run.loss.name, run.loss.tau, run.seed, attack, p.size, p.perplexity, p.accuracy)
                    writer.writerow([*row, p.nats, p.correct, p.tokens])
