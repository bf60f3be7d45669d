"""Attacks on checkpoints: every attack at every radius, masking checks beside them, finished parts kept in a folder.

A finished part is used again only if all that decides its numbers is the same. Relies on `attack_table`, `masking`,
`attack_names`, `checkpoint` and `data`; `attack_report` and `attack_command` rely on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from . import masking
from .attack_kinds import AnyAttack
from .attack_losses import per_sample
from .attack_names import AttackParameters, canonical_names, describe, make_attack
from .attack_parts import FinishedParts
from .attack_table import AttackOutcome, AttackTable, run_attack
from .checkpoint import LoadedModel, load_model
from .data import Part, load
from .evaluate import Search
from .identity import digest_of_file, digest_of_tensors, environment
from .losses import TrainingLoss
from .masking import Check

__all__ = ["AttackSettings", "Attacked", "Progress", "Subject", "attack_checkpoint", "load_subject"]

# Part of every finished part's identity. Raise it when a change to attacks or checks changes the numbers.
_REVISION: Final = 2


@dataclass(frozen=True)
class AttackSettings:
    """What decides the numbers, besides the checkpoints.

    Attributes:
        attacks: names, see `attack_names`.
        epsilons: the radii.
        parameters: of the attacks.
        held_out: the images to judge with, "test" or "validation".
        samples: use only the first so many of them; None for all.
        check_samples: how many of these the masking checks look at; 0 for no checks.
        batch_size: images that the model sees at a time.
        seed: of the random starts.
        device, threads: where it is computed, and on how many CPU threads.

    Raises:
        ValueError: an unknown attack, no radius, or a number out of its range.
    """

    attacks: tuple[str, ...] = ("pgd:log_odds", "pgd:margin", "pgd:ce")
    epsilons: tuple[float, ...] = (8 / 255,)
    parameters: AttackParameters = field(default_factory=AttackParameters)
    held_out: Part = "test"
    samples: int | None = None
    check_samples: int = 256
    batch_size: int = 256
    seed: int = 0
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.epsilons or not all(0 <= eps < torch.inf for eps in self.epsilons):
            raise ValueError(f"epsilons must be 0 or more and finite, and at least one, got {self.epsilons!r}")
        if not self.attacks:
            raise ValueError(f"attacks must not be empty, got {self.attacks!r}")
        for argument in ("samples", "batch_size"):
            value = getattr(self, argument)
            if value is not None and value < 1:
                raise ValueError(f"{argument} must be 1 or more, got {value!r}")
        if self.check_samples < 0:
            raise ValueError(f"check_samples must be 0 or more, got {self.check_samples!r}")
        object.__setattr__(self, "attacks", canonical_names(self.attacks))
        object.__setattr__(self, "epsilons", tuple(sorted(set(self.epsilons))))


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is attacked, or attacked from: where it lies, the sha256 of its bytes, and what is in it."""

    path: Path
    digest: str
    loaded: LoadedModel

    @property
    def label(self) -> str:
        """The path's last folder and name, for tables."""
        return "/".join(self.path.parts[-2:])


@dataclass(frozen=True)
class Attacked:
    """The outcome for one checkpoint; `reused` counts the parts that were found finished."""

    subject: Subject
    images: int
    table: AttackTable
    checks: tuple[Check, ...]
    reused: int


class Progress(Protocol):
    """Who wants to know how far the work is; as in `experiment`."""

    def begin_run(self, label: str, steps: int) -> None: ...
    def step(self, doing: str) -> None: ...
    def end_run(self) -> None: ...


def load_subject(path: Path, device: str) -> Subject:
    """Raises what `checkpoint.load_model` does."""
    return Subject(path, digest_of_file(path), load_model(path, device=device))


def attack_checkpoint(
    settings: AttackSettings,
    subject: Subject,
    sources: Sequence[Subject],
    folder: Path,
    progress: Progress,
    *,
    data_dir: Path | None = None,
    fresh: bool = False,
) -> Attacked:
    """Run what `folder` does not hold yet: every attack at every radius, then the checks.

    Args:
        settings: what to run.
        subject: the checkpoint to attack, on the device of the settings.
        sources: checkpoints to transfer attacks from; the subject itself is left out, for it is no stranger.
        folder: finished parts are kept in folder/parts, one file each.
        progress: told of every start of every attack and of every check.
        data_dir: where the images are; None for where the checkpoint says.
        fresh: run everything again.

    Raises:
        FloatingPointError: the model gives NaN.
        FileNotFoundError, ValueError: the images are not there, or their files are damaged.
        OSError: a part cannot be written.
    """
    about, model = subject.loaded.about, subject.loaded.model
    place = data_dir if data_dir is not None else about.get("data_dir")
    split = load(about["dataset"], data_dir=None if place is None else Path(place), held_out=settings.held_out)
    x, y = (part[: settings.samples] for part in (split.held_out_x, split.held_out_y))
    identity = {
        "revision": _REVISION,
        "environment": environment(),
        "checkpoint": subject.digest,
        "images": digest_of_tensors(x, y),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "device": settings.device,
        "threads": settings.threads,
    }
    parts = FinishedParts(folder, f"{subject.path.stem}-{subject.digest[:12]}", identity, fresh=fresh)
    x, y = x.to(settings.device), y.to(settings.device)
    attacks = _attacks(settings, subject, sources)
    progress.begin_run(subject.label, _steps(settings, attacks))
    clean = Search(model, x, y, (0.0, 1.0), settings.batch_size, None).robust().cpu()
    outcomes = []
    for eps in settings.epsilons:
        for attack, source in attacks:
            asked = {"attack": describe(attack), "source": source, "eps": eps}

            def run(attack: AnyAttack = attack, eps: float = eps, asked: dict[str, Any] = asked) -> AttackOutcome:
                generator = torch.Generator(device=settings.device).manual_seed(_seed(settings.seed, asked))
                return run_attack(
                    model,
                    x,
                    y,
                    attack,
                    eps,
                    batch_size=settings.batch_size,
                    generator=generator,
                    on_restart=lambda eps, attack: progress.step(f"{attack.name}, eps {eps:.4g}"),
                )

            outcome = parts.outcome(f"{attack.name}-{attack.norm}-eps{eps!r}", asked, len(y), run)
            outcomes.append(outcome)
    table = AttackTable(clean, tuple(outcomes))
    checks = _checks(settings, model, x, y, table, parts, progress) if settings.check_samples else ()
    progress.end_run()
    return Attacked(subject, len(y), table, tuple(checks), parts.reused)


def _attacks(
    settings: AttackSettings, subject: Subject, sources: Sequence[Subject]
) -> list[tuple[AnyAttack, str | None]]:
    """Each attack, and the digest of the checkpoint that it transfers from, if it does."""
    about = subject.loaded.about
    trained_with = per_sample(
        TrainingLoss(**about["loss"]), label_smoothing=(about.get("recipe") or {}).get("label_smoothing", 0.0)
    )
    strangers = [source for source in sources if source.digest != subject.digest]
    found: list[tuple[AnyAttack, str | None]] = []
    for name in settings.attacks:
        if not name.startswith("transfer"):
            found.append((make_attack(name, settings.parameters, training_loss=trained_with), None))
            continue
        for source in strangers:
            attack = make_attack(
                name,
                settings.parameters,
                training_loss=trained_with,
                source=source.loaded.model,
                source_label=str(source.path) if len(sources) > 1 else "",
            )
            found.append((attack, source.digest))
    return found


def _steps(settings: AttackSettings, attacks: Sequence[tuple[AnyAttack, str | None]]) -> int:
    starts = sum(attack.restarts for attack, _ in attacks)
    checks = 4 + len(settings.epsilons) if settings.check_samples else 0
    return len(settings.epsilons) * starts + checks


def _checks(
    settings: AttackSettings,
    model: Any,
    x: Tensor,
    y: Tensor,
    table: AttackTable,
    parts: FinishedParts,
    progress: Progress,
) -> list[Check]:
    """Those about the model, then for each radius those about its figures."""
    few, labels = x[: settings.check_samples], y[: settings.check_samples]
    norm = settings.parameters.norm
    found: list[Check] = []

    def keep(name: str, make: Callable[[], Check], eps: float | None = None) -> None:
        asked = {"check": name, "samples": len(labels), "norm": norm, "eps": eps}
        found.append(parts.check(f"check-{name}-{norm}-eps{eps!r}", asked, make))
        progress.step(f"checking {name}")

    look: dict[str, Any] = {"batch_size": settings.batch_size}
    generator = torch.Generator(device=settings.device).manual_seed(settings.seed)
    of_model = masking.checks_of_model(model, few, labels, norm=norm, generator=generator, **look)
    for name, make in of_model.items():
        keep(name, make)
    found.append(masking.never_rises(table))
    for eps in settings.epsilons:
        found.append(masking.black_box_beats_white_box(table, eps))
        white = [outcome for outcome in table.outcomes if outcome.eps == eps and not outcome.black_box]
        found.append(masking.attacks_agree(white))
        found.append(masking.restarts_saturate(white))
        keep("steps", partial(masking.rises_with_steps, model, few, labels, eps, norm=norm, **look), eps)
    return found


def _seed(seed: int, asked: dict[str, Any]) -> int:
    """A seed for each attack and radius, so that none depends on which ran before it."""
    digest = hashlib.sha256(json.dumps([seed, asked], sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:7], "big")
