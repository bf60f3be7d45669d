"""All that decides a training run: `TrainingSettings`, and what suits each data set.

Kept in a run's folder, so that the run can be resumed with the same settings and with no others. Relies on `recipe` and
`losses`; `engine`, `experiment` and the commands rely on it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from .attack_objects import REACH
from .balls import Norm
from .loss_names import default_taus
from .losses import TrainingLoss
from .recipe import Adversarial, Method, Recipe

__all__ = ["TrainingSettings", "default_attack", "default_settings", "default_tau", "differences"]


@dataclass(frozen=True)
class TrainingSettings:
    """What decides the weights that a run ends with.

    Attributes:
        dataset, model: names of `data.DATASETS` and `models.MODELS`.
        loss, recipe: what to descend and how.
        seed: of first weights, order of images, label noise, crops and attacks.
        device: "cpu", "cuda" or "cuda:1"; with torchrun each process takes a GPU of its own.
        threads: CPU threads of each process. They change the last digits.
        samples: use only so many training images, and as many for validation; None for all.
        robust_images: validation images that are attacked after each epoch of adversarial training.
        data_dir: where the files of the data set are; not compared when a run is resumed.
    """

    dataset: str = "digits"
    model: str = "small_cnn"
    loss: TrainingLoss = field(default_factory=lambda: TrainingLoss("ce"))
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    samples: int | None = None
    robust_images: int = 512
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("threads", "robust_images", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value!r}")
        if self.recipe.label_smoothing and not self.loss.parts.takes_smoothing:
            raise ValueError(f"label_smoothing must be 0 with loss {self.loss}, got {self.recipe.label_smoothing!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed!r}")

    def as_json(self) -> dict[str, Any]:
        """Names, numbers, lists and dicts, as JSON gives them back."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "loss": asdict(self.loss),
            "recipe": self.recipe.as_json(),
            "data_dir": None if self.data_dir is None else str(self.data_dir),
        }

    @staticmethod
    def from_json(content: dict[str, Any]) -> TrainingSettings:
        """The inverse of `as_json`; KeyError, TypeError or ValueError for anything else."""
        return TrainingSettings(
            **content
            | {
                "loss": TrainingLoss(**content["loss"]),
                "recipe": Recipe.from_json(content["recipe"]),
                "data_dir": None if content["data_dir"] is None else Path(content["data_dir"]),
            }
        )


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """In words, where two settings (`as_json`) are not the same. Where the data lie does not matter."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new or prefix + name == "data_dir":
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        else:
            old, new = (repr(side[name]) if name in side else "not given" for side in (before, now))
            found.append(f"{prefix}{name} was {old} and is now {new}")
    return found


_CIFAR: Final = Recipe(
    epochs=100,
    batch_size=128,
    learning_rate=0.1,
    optimizer="sgd",
    momentum=0.9,
    weight_decay=5e-4,
    schedule="cosine",
    augmentation="crop_flip",
)
_MNIST: Final = Recipe(epochs=20, batch_size=128, learning_rate=1e-3, schedule="cosine")

# The digits as `drsl compare` trains them, the others as the field does.
_DEFAULTS: Final[dict[str, tuple[str, Recipe]]] = {
    "digits": ("small_cnn", Recipe()),
    "mnist": ("small_cnn", _MNIST),
    "fashion_mnist": ("small_cnn", _MNIST),
    "cifar10": ("resnet18", _CIFAR),
    "cifar100": ("resnet18", _CIFAR),
}

# Radius, step size and steps of adversarial training: for MNIST and CIFAR those of Madry et al. (CIFAR with 10 steps
# instead of 7, as in TRADES), for the others the radius at which this project compares models.
_ATTACKS: Final[dict[str, tuple[float, float, int]]] = {
    "digits": (0.1, 0.025, 10),
    "mnist": (0.3, 0.01, 40),
    "fashion_mnist": (0.1, 0.025, 10),
    "cifar10": (8 / 255, 2 / 255, 10),
    "cifar100": (8 / 255, 2 / 255, 10),
}

# In L2 the radius of `drsl attack`, the usual one for CIFAR, for all of them, and steps that together go 2.5 times as
# far. On 8x8 digits it weighs about as much as their 0.1 in linf: of a linear score whose 64 weights are normal, a
# change of 0.1 per pixel moves as much as one of length 0.1 * sqrt(2 / pi) * 8 = 0.64.
_L2_ATTACK: Final = (0.5, REACH * 0.5 / 10, 10)


def default_settings(dataset: str) -> TrainingSettings:
    """What suits a data set, for cross-entropy without attacks."""
    model, recipe = _DEFAULTS[dataset]
    return TrainingSettings(dataset=dataset, model=model, recipe=recipe)


def default_attack(dataset: str, method: Method, norm: Norm = "linf") -> Adversarial:
    """Radius, step size and number of steps of adversarial training that suit a data set."""
    eps, alpha, steps = _ATTACKS[dataset] if norm == "linf" else _L2_ATTACK
    return Adversarial(method=method, eps=eps, alpha=alpha, steps=steps, norm=norm)


def default_tau(name: str) -> float:
    """The weight of a loss's distance that did best on held-out images; see `loss_names.DEFAULT_TAUS`."""
    return default_taus(name)[-1]
