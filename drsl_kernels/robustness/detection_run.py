"""The detection of abnormal images in a comparison's runs, kept beside the weights.

Relies on `detection`, `judging` and `storage`; `experiment` relies on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from .detection import MOST_IMAGES, Detection, detect, strangers_to
from .identity import digest_of_tensors
from .judging import Judging
from .progress import Progress
from .settings import TrainingSettings
from .storage import read_json, write_json

__all__ = ["DETECTED", "Detector"]

DETECTED: Final = "detection.json"

# Part of the identity of what is kept. Raise it when a change to attacks, scores or strangers changes the numbers.
_REVISION: Final = 1


@dataclass(frozen=True)
class Detector:
    """What all runs of a comparison are tried with: strangers, and an attack of so many steps within eps."""

    strangers: dict[str, Tensor]
    eps: float
    steps: int

    @staticmethod
    def of(training: TrainingSettings, judging: Judging, x: Tensor) -> Detector:
        """x: the images to judge with, on the CPU; all runs meet the same strangers, whatever their seeds."""
        strangers = strangers_to(training.dataset, x[:MOST_IMAGES], data_dir=training.data_dir, seed=0)
        return Detector(strangers, judging.histogram_eps(), judging.parameters.steps)

    def made(self, folder: Path, identity: dict[str, Any]) -> tuple[Detection, ...] | None:
        """What `make` found under the same identity, None where there is nothing of the kind."""
        content = read_json(folder / DETECTED)
        if not isinstance(content, dict) or content.get("identity") != self._identity(identity):
            return None
        try:
            return tuple(Detection(**detection) for detection in content["detections"])
        except (KeyError, TypeError):  # not what asdict(Detection) gives
            return None

    def make(
        self,
        folder: Path,
        identity: dict[str, Any],
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        seed: int,
        progress: Progress,
    ) -> tuple[Detection, ...]:
        """Try the scores on a run's model, and keep what is found in its folder; `identity` is that of its judging."""
        found = detect(
            model,
            x[:MOST_IMAGES],
            y[:MOST_IMAGES],
            {name: images.to(x.device) for name, images in self.strangers.items()},
            eps=self.eps,
            steps=self.steps,
            seed=seed,
            on_attack=lambda score: progress.step(f"attacking {score or 'the classifier'} (detection)"),
        )
        self._keep(folder, identity, found)
        return found

    def _keep(self, folder: Path, identity: dict[str, Any], found: Sequence[Detection]) -> None:
        content = {"identity": self._identity(identity), "detections": [asdict(detection) for detection in found]}
        write_json(folder / DETECTED, content)

    def _identity(self, identity: dict[str, Any]) -> dict[str, Any]:
        strangers = {name: digest_of_tensors(images) for name, images in self.strangers.items()}
        return identity | {
            "detection_revision": _REVISION,
            "eps": self.eps,
            "steps": self.steps,
            "strangers": strangers,
        }
