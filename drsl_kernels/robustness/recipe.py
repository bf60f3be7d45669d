"""How to train, as names and numbers that are checked once: `Recipe`, with `Adversarial` for attacked images.

Relies on nothing but the checks of numbers; `optimisation`, `augmentation`, `adversarial`, `train` and `engine` do what
a recipe says.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from drsl_kernels.spec import integer, number

from .balls import NORMS

__all__ = [
    "AMP",
    "AUGMENTATIONS",
    "INNER_LOSSES",
    "METHODS",
    "OPTIMIZERS",
    "SCHEDULES",
    "Adversarial",
    "CraftMode",
    "Method",
    "Precision",
    "Recipe",
]

OptimizerName: TypeAlias = Literal["sgd", "adam", "adamw"]
ScheduleName: TypeAlias = Literal["constant", "cosine", "multistep", "onecycle"]
Augmentation: TypeAlias = Literal["none", "crop_flip"]
Precision: TypeAlias = Literal["none", "bfloat16", "float16"]
Method: TypeAlias = Literal["madry", "trades"]
CraftMode: TypeAlias = Literal["train", "eval"]
InnerLoss: TypeAlias = Literal["ce", "log_odds", "margin", "training"]

OPTIMIZERS: Final[tuple[str, ...]] = get_args(OptimizerName)
SCHEDULES: Final[tuple[str, ...]] = get_args(ScheduleName)
AUGMENTATIONS: Final[tuple[str, ...]] = get_args(Augmentation)
AMP: Final[tuple[str, ...]] = get_args(Precision)
METHODS: Final[tuple[str, ...]] = get_args(Method)
CRAFT_MODES: Final[tuple[str, ...]] = get_args(CraftMode)
INNER_LOSSES: Final[tuple[str, ...]] = get_args(InnerLoss)

# Optimizers make products of these numbers and weights; float32 must hold them.
_TOO_LARGE: Final = 1e30

# Fields that came after the first runs were written, and are 0 in all of those.
_LATER: Final = ("absum", "l1")

# The mode in which each paper's code crafts its examples.
_MODE_OF: Final[dict[str, CraftMode]] = {"madry": "train", "trades": "eval"}


@dataclass(frozen=True)
class Adversarial:
    """Training on images attacked anew in every step; see `adversarial` for the formulas.

    Attributes:
        method: "madry" (arXiv 1706.06083), the loss of the attacked images alone, or "trades" (arXiv 1901.08573), the
            loss of the clean ones plus beta times the divergence between the two predictions.
        eps, alpha: radius and step size of the inner attack, in the units of the images, which are in [0, 1].
        steps: gradient steps of the inner attack; its last point is trained on.
        norm: "linf" or "l2".
        random_start: begin at a random point (uniform in the ball for "madry", a Gaussian of deviation 0.001 for
            "trades"), not at the image.
        loss: what the inner attack of "madry" ascends: "ce", "log_odds", "margin", or "training", the whole training
            loss with its distance. "trades" ascends its divergence, whatever stands here.
        beta: weight of the divergence in "trades".
        mode: the model's mode while examples are crafted. None for that of the paper's own code: "train" for "madry"
            (batch normalisation uses the statistics of the batch, and its running averages move with every look;
            dropout is on) and "eval" for "trades" (nothing in the model changes).
    """

    method: Method = "madry"
    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    norm: Literal["linf", "l2"] = "linf"
    random_start: bool = True
    loss: InnerLoss = "ce"
    beta: float = 6.0
    mode: CraftMode | None = None

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        _check_choice("norm", self.norm, NORMS)
        _check_choice("loss", self.loss, INNER_LOSSES)
        _check_range("eps", self.eps, above=0)
        _check_range("alpha", self.alpha, above=0)
        _check_integer("steps", self.steps, 1)
        _check_range("beta", self.beta, least=0)
        if self.mode is None:
            object.__setattr__(self, "mode", _MODE_OF[self.method])
        _check_choice("mode", self.mode, CRAFT_MODES)


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults: Adam at a constant learning rate, shuffled batches, nothing else.

    They suit cross-entropy on small images, judged on held-out training images: longer training, weight decay or a
    larger learning rate do not make it more robust.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step; of all processes together where several train.
        learning_rate: of the first step, or the highest of the schedule.
        optimizer: "sgd" (Nesterov momentum where momentum is above 0), "adam" or "adamw".
        weight_decay: of all parameters; decoupled from the gradient in "adamw" alone.
        momentum: of "sgd".
        absum, l1: weights of `drsl_kernels.absum_penalty` and `l1_penalty`, of all convolutions; one of them is 0. They
            work by their proximal step, with the learning rate of the moment, after each step of the optimizer, and not
            through the loss, which is logged without them.
        schedule: the learning rate, step by step: "constant"; "cosine", half a wave down to 0; "multistep", times 0.1
            at the start of each epoch after those in `milestones`; "onecycle", up and down again as in
            `torch.optim.lr_scheduler.OneCycleLR`, with momentum left as it is.
        milestones: epochs after which "multistep" lowers the rate, ascending.
        warmup_epochs: so many epochs, or fractions, the rate rises linearly to where the schedule begins. Not with
            "onecycle", which has a rise of its own.
        clip_norm: gradients are shortened to this Euclidean length, all parameters taken together; None for not.
        label_smoothing: of the training loss, in [0, 1), as in `F.cross_entropy`.
        label_noise: the share of training labels, in [0, 1], that are replaced by another class before training. The
            labels of the images that choose the best epoch stay as they are.
        augmentation: "crop_flip" pads by 4 pixels of 0, crops at random and mirrors every other image; or "none".
        amp: the dtype of automatic mixed precision, or "none". "float16" scales the loss, and needs a GPU.
        adversarial: training on attacked images, None for plain training.

    Raises:
        ValueError, TypeError: a number outside its range, an unknown name, or two settings that exclude each other.
    """

    epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 2e-3
    optimizer: OptimizerName = "adam"
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: ScheduleName = "constant"
    milestones: tuple[int, ...] = ()
    warmup_epochs: float = 0.0
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    label_noise: float = 0.0
    augmentation: Augmentation = "none"
    amp: Precision = "none"
    adversarial: Adversarial | None = None
    absum: float = 0.0
    l1: float = 0.0

    def __post_init__(self) -> None:
        _check_integer("epochs", self.epochs, 1)
        _check_integer("batch_size", self.batch_size, 1)
        _check_range("learning_rate", self.learning_rate, above=0, below=_TOO_LARGE)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_range("weight_decay", self.weight_decay, least=0, below=_TOO_LARGE)
        _check_range("momentum", self.momentum, least=0, below=1)
        for name in ("absum", "l1"):
            _check_range(name, getattr(self, name), least=0, below=_TOO_LARGE)
        if self.absum and self.l1:  # one proximal step after the other is not that of their sum
            raise ValueError(f"one of absum and l1 must be 0, got {self.absum!r} and {self.l1!r}")
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_range("warmup_epochs", self.warmup_epochs, least=0, below=self.epochs)
        if self.clip_norm is not None:
            _check_range("clip_norm", self.clip_norm, above=0)
        _check_range("label_smoothing", self.label_smoothing, least=0, below=1)
        _check_range("label_noise", self.label_noise, least=0)
        if self.label_noise > 1:
            raise ValueError(f"label_noise must be from 0 to 1, got {self.label_noise!r}")
        _check_choice("augmentation", self.augmentation, AUGMENTATIONS)
        _check_choice("amp", self.amp, AMP)
        object.__setattr__(self, "milestones", tuple(self.milestones))
        self._check_schedule()

    def _check_schedule(self) -> None:
        if (self.schedule == "multistep") != bool(self.milestones):
            raise ValueError(
                f"milestones must be given with schedule 'multistep' and with no other, "
                f"got {self.milestones!r} with {self.schedule!r}"
            )
        for milestone in self.milestones:
            _check_integer("milestones", milestone, 1)
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must ascend, got {self.milestones!r}")
        if self.schedule == "onecycle" and self.warmup_epochs:
            raise ValueError(f"warmup_epochs must be 0 with schedule 'onecycle', got {self.warmup_epochs!r}")

    def as_json(self) -> dict[str, Any]:
        """Names, numbers, lists and dicts, as JSON gives them back.

        Fields of `_LATER` are left out where they do nothing: so a run of before them is still the same run.
        """
        fields = {name: value for name, value in asdict(self).items() if value or name not in _LATER}
        return fields | {"milestones": list(self.milestones)}

    @staticmethod
    def from_json(content: dict[str, Any]) -> Recipe:
        adversarial = content.get("adversarial")
        return Recipe(**(content | {"adversarial": None if adversarial is None else Adversarial(**adversarial)}))


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_integer(name: str, value: object, least: int) -> None:
    if integer(name, value) < least:
        raise ValueError(f"{name} must be {least} or more, got {value!r}")


def _check_range(
    name: str, value: object, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    """Both lower bounds are told apart: `least` may be reached, `above` may not."""
    found = number(name, cast(float, value))
    if not (least <= found and above < found < below):
        lower = f"above {above:g}" if above > -math.inf else f"{least:g} or more"
        upper = "finite" if below == math.inf else f"below {below:g}"
        raise ValueError(f"{name} must be {lower} and {upper}, got {value!r}")
