"""Outcomes and checks kept as files as soon as they are finished, and used again if all that decides them is the same.

Relies on `storage`, `attack_table` and `masking`; `attack_run` relies on it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from .attack_table import AttackOutcome
from .identity import plain
from .masking import Check
from .storage import read_json, write_json

__all__ = ["FinishedParts", "parts_of"]

# File systems take 255 bytes, of which the prefix and what marks an unfinished file need some.
_LONGEST_NAME: Final = 150


def parts_of(folder: Path) -> Path:
    """Where finished parts are kept."""
    return folder / "parts"


class FinishedParts:
    """The finished parts of one checkpoint, each in a file of its own.

    Args:
        folder: the results' folder.
        prefix: of the files' names; one for each checkpoint.
        identity: what decides the numbers of all parts; each adds what it was asked.
        fresh: use nothing that is there.

    `reused` counts the parts that were used again.
    """

    def __init__(self, folder: Path, prefix: str, identity: dict[str, Any], *, fresh: bool) -> None:
        self.folder, self.prefix, self.identity, self.fresh = parts_of(folder), prefix, identity, fresh
        self.reused = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def outcome(
        self, name: str, asked: dict[str, Any], images: int, make: Callable[[], AttackOutcome]
    ) -> AttackOutcome:
        kept = self._kept(name, asked)
        outcome = None if kept is None else _as_outcome(kept, images)
        if outcome is not None:
            self.reused += 1
            return outcome
        outcome = make()
        self._keep(name, asked, asdict(outcome) | {"fell": outcome.fell.tolist()})
        return outcome

    def check(self, name: str, asked: dict[str, Any], make: Callable[[], Check]) -> Check:
        kept = self._kept(name, asked)
        if isinstance(kept, dict) and kept.keys() == Check.__dataclass_fields__.keys():
            self.reused += 1
            return Check(**kept)
        check = make()
        self._keep(name, asked, asdict(check))
        return check

    def _kept(self, name: str, asked: dict[str, Any]) -> Any:
        content = None if self.fresh else read_json(self._path(name))
        if not isinstance(content, dict) or content.get("identity") != plain(self.identity | asked):
            return None
        return content.get("result")

    def _keep(self, name: str, asked: dict[str, Any], result: dict[str, Any]) -> None:
        write_json(self._path(name), {"identity": self.identity | asked, "result": result})

    def _path(self, name: str) -> Path:
        plain_name = re.sub("[^A-Za-z0-9.-]+", "_", name)
        if len(plain_name) > _LONGEST_NAME:  # of a source that lies deep in folders
            digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
            plain_name = f"{plain_name[:40]}-{digest[:16]}"
        return self.folder / f"{self.prefix}-{plain_name}.json"


def _as_outcome(content: Any, images: int) -> AttackOutcome | None:
    """What was kept, or None if it is not what `AttackOutcome` gives."""
    try:
        fell, restarts = content["fell"], content["restarts"]
        if not isinstance(content.get("found"), dict | None):
            return None
        if len(fell) != images or not all(type(start) is int and -1 <= start <= restarts for start in fell):
            return None
        return AttackOutcome(**content | {"fell": torch.tensor(fell, dtype=torch.int64)})
    except (KeyError, TypeError):
        return None
