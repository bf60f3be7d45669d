"""The comparison of language models: train with each loss and seed, attack the result, keep what was found.

Each run has a folder with its checkpoints and what judging found; whatever is finished there is used again when all
that decides it is the same. Several processes train together; then one of them judges. Relies on `engine`, `judging`
and `timing`; the reports and the command rely on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ..distributed import World
from ..identity import digest_of_file, environment, plain
from ..progress import Progress
from ..random_streams import deterministic
from ..storage import set_aside
from ..training_folder import sole_use
from .corpus import Corpus, load_corpus, make_tokens
from .engine import Trained, train_language_model
from .judging import JUDGED, LanguageJudging, LanguageResult, judge, load_result, save_result
from .losses import LanguageLoss
from .run_folder import BEST, LAST, METRICS, SETTINGS, load_language_model, obstacle, read_run
from .settings import LanguageSettings
from .text import read_text
from .timing import StepTime, time_steps

__all__ = ["LanguageComparison", "LanguageSetup", "judge_all", "prepared_corpus", "run_folder", "train_all"]

# Part of every judged run's identity. Raise it when a change to attacks or scores changes the numbers.
_REVISION: Final = 2


@dataclass(frozen=True)
class LanguageSetup:
    """What decides the numbers of a comparison: how every run is trained, and judged. Raises ValueError, see there."""

    training: LanguageSettings = field(default_factory=LanguageSettings)
    judging: LanguageJudging = field(default_factory=LanguageJudging)

    def __post_init__(self) -> None:
        self.judging.check_context(self.training.context)

    def of_run(self, loss: LanguageLoss, seed: int) -> LanguageSettings:
        return replace(self.training, loss=loss, seed=seed)


@dataclass(frozen=True)
class LanguageComparison:
    """The outcome: runs by loss, then seed; `reused` counts those found judged, `corpus` is what they read."""

    setup: LanguageSetup
    corpus: Corpus
    losses: tuple[LanguageLoss, ...]
    seeds: tuple[int, ...]
    runs: tuple[LanguageResult, ...]
    times: dict[LanguageLoss, StepTime]
    reused: int

    def of(self, loss: LanguageLoss) -> list[LanguageResult]:
        return [run for run in self.runs if run.loss == loss]


def run_folder(folder: Path, loss: LanguageLoss, seed: int) -> Path:
    """The folder of a run."""
    return folder / "runs" / f"{loss.name}-tau{loss.tau_text()}-seed{seed}"


def prepared_corpus(settings: LanguageSettings, folder: Path, world: World) -> Corpus:
    """The text as tokens; BPE is learned by one process and kept in the folder.

    Raises:
        FileNotFoundError, ValueError: the text is missing, too short, or not what its tokens need.
    """
    text = read_text(settings.text)
    if world.rank == 0:
        make_tokens(settings.tokens, text, settings.vocabulary, folder)
    world.wait()
    tokens = make_tokens(settings.tokens, text, settings.vocabulary, folder)
    return load_corpus(text, tokens, context=settings.context)


def train_all(
    setup: LanguageSetup,
    corpus: Corpus,
    losses: Sequence[LanguageLoss],
    seeds: Sequence[int],
    folder: Path,
    progress: Progress,
    *,
    world: World | None = None,
    fresh: bool = False,
) -> list[Trained]:
    """Train every run that the folder does not hold yet, loss by loss; with several processes all of them take part.

    Within a seed all losses start from the same weights and see the same windows of text in the same order.

    Raises:
        FloatingPointError: training gives NaN.
        ValueError: a run's folder holds something else.
        BlockingIOError: another process trains the same run.
    """
    world = world or World()
    trained = []
    for loss in losses:
        for seed in seeds:
            place = run_folder(folder, loss, seed)
            settings = setup.of_run(loss, seed)
            progress.begin_run(f"{loss}, seed {seed}", settings.steps)
            with sole_use(place) if world.rank == 0 else nullcontext():
                if world.rank == 0:
                    _make_way(place, settings, corpus, progress, world, fresh)
                world.wait()
                begun = read_run(place)
                # Threads change last digits alone: a run goes on with the number that it began with.
                settings = settings if begun is None else replace(settings, threads=begun.threads)
                world.wait()
                trained.append(train_language_model(settings, corpus, place, progress, world=world))
            progress.end_run()
    return trained


def judge_all(
    setup: LanguageSetup,
    corpus: Corpus,
    losses: Sequence[LanguageLoss],
    seeds: Sequence[int],
    trained: Sequence[Trained],
    folder: Path,
    progress: Progress,
) -> LanguageComparison:
    """Judge every trained run that has not been judged yet, then time the losses; by one process.

    Raises:
        FloatingPointError: a model gives NaN.
    """
    runs, reused = [], 0
    outcomes = iter(trained)
    for loss in losses:
        for seed in seeds:
            progress.begin_run(f"{loss}, seed {seed}", setup.judging.attacks())
            result, was_there = _judged(setup, corpus, loss, seed, next(outcomes), folder, progress)
            runs.append(result)
            reused += was_there
            progress.end_run()
    progress.begin_timing()
    times = time_steps(losses, corpus, setup.training)
    return LanguageComparison(setup, corpus, tuple(losses), tuple(seeds), tuple(runs), times, reused)


def _judged(
    setup: LanguageSetup,
    corpus: Corpus,
    loss: LanguageLoss,
    seed: int,
    trained: Trained,
    folder: Path,
    progress: Progress,
) -> tuple[LanguageResult, bool]:
    place = run_folder(folder, loss, seed)
    training = read_run(place) or setup.of_run(loss, seed)
    identity: dict[str, Any] = plain(
        {
            "revision": _REVISION,
            "environment": environment(),
            "weights": digest_of_file(place / BEST),
            "training": training.identity(),
            "judging": setup.judging.as_json(),
            "text": corpus.text.digest,
            "tokens": corpus.tokens.digest,
        }
    )
    found = load_result(place / JUDGED, identity)
    if found is not None:
        return found, True
    with deterministic(training.threads):
        model = load_language_model(place / BEST, device=training.device).model
        result = judge(
            model,  # type: ignore[arg-type]
            corpus,
            setup.judging,
            loss=loss,
            seed=seed,
            rows=trained.rows,
            best_step=trained.best.step,
            on_attack=progress.step,
        )
    save_result(place / JUDGED, identity, result)
    return result, False


def _make_way(
    place: Path, settings: LanguageSettings, corpus: Corpus, progress: Progress, world: World, fresh: bool
) -> None:
    """Set aside a run that cannot be used; remove any where another is wanted afresh."""
    # The settings go last: if this is interrupted, the next attempt finds that they are others.
    files = (JUDGED, LAST, BEST, METRICS, SETTINGS)
    if fresh:
        for name in files:
            (place / name).unlink(missing_ok=True)
        return
    begun = read_run(place)
    why_not = begun and obstacle(place, replace(settings, threads=begun.threads), corpus, world)
    if why_not is not None:
        kept = set_aside(place, files)
        progress.note(f"{place} {why_not}. What was there is kept in {kept}")
