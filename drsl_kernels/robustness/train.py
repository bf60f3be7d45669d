"""Training in memory: epochs of steps as a `Recipe` says, the same for every loss.

`train` needs a model, images and a generator; `engine` adds data sets, validation and checkpoints. Relies on `losses`,
`adversarial`, `augmentation` and `optimisation`; `engine` and `timing` rely on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor, nn

from drsl_kernels import GaussianMixtureHead

from .adversarial import batch_result, draw_starts
from .augmentation import crop_and_flip, draw_crops
from .distributed import World
from .losses import BatchLoss, BatchResult, TrainingLoss
from .optimisation import learning_rate_at, make_optimizer, set_learning_rate
from .random_streams import generator_for, own_random_state, seed_global_state
from .recipe import Recipe

__all__ = ["EpochLog", "EpochSums", "Recipe", "make_optimizer", "make_scaler", "train", "train_epoch"]

# Values are looked at once in so many batches: looking at each would make a GPU wait each time.
_LOOK_EVERY = 100


@dataclass(frozen=True)
class EpochLog:
    """Means over the training images of one epoch, each taken before the step on its batch.

    `distance` is D without tau, None for losses without one; `accuracy` is in [0, 1]; `seconds` is wall
    time. `loss` is what is descended, all of it; the others are those of the images that the loss looks at: attacked
    ones in Madry training, clean ones in TRADES.
    """

    epoch: int
    loss: float
    cross_entropy: float
    distance: float | None
    accuracy: float
    seconds: float


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: TrainingLoss,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    on_epoch: Callable[[EpochLog], None] | None = None,
) -> list[EpochLog]:
    """Train the model in place and return one log per epoch.

    Args:
        model: maps x to logits (N, C).
        x, y: images (N, ...) and classes (N,), on the device of the model. Label noise is not added here: its recipe
            describes labels that are noisy already.
        loss, recipe: what to descend and how.
        generator: a CPU generator; its state decides the order of the images, and the seed that it was given all
            other randomness. The global random state is left as it was.
        on_epoch: called with each log as it is made.

    Raises:
        FloatingPointError: the loss became infinite or NaN; the message names epoch and batch.
        ValueError: x and y differ in length or are empty, loss "gm" for a model without a `GaussianMixtureHead`, or amp
            "float16" without a CUDA device.
        TypeError: x or y is no tensor, or the generator none.
    """
    _check_arguments(model, x, y, loss, generator)
    optimizer = make_optimizer(model, recipe)
    scaler = make_scaler(recipe, x.device)
    logs = []
    for epoch in range(1, recipe.epochs + 1):
        logs.append(train_epoch(model, x, y, loss, recipe, optimizer, epoch=epoch, generator=generator, scaler=scaler))
        if on_epoch is not None:
            on_epoch(logs[-1])
    return logs


def _check_arguments(model: nn.Module, x: Tensor, y: Tensor, loss: TrainingLoss, generator: torch.Generator) -> None:
    for argument, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument} must be a Tensor, got {value!r}")
    if not len(x):
        raise ValueError(f"x must hold one image or more, got shape {tuple(x.shape)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y must have shape (N,) = ({len(x)},), got {tuple(y.shape)}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    if loss.head == "gaussian" and not any(isinstance(part, GaussianMixtureHead) for part in model.modules()):
        raise ValueError(
            f"loss {loss} needs a model with a GaussianMixtureHead, got {type(model).__name__} without one"
        )


def make_scaler(recipe: Recipe, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss in float16, so that small gradients do not vanish; else does nothing."""
    if recipe.amp == "float16" and device.type != "cuda":
        raise ValueError(f"amp 'float16' needs a CUDA device, got {device}; 'bfloat16' works everywhere")
    return torch.amp.GradScaler("cuda", enabled=recipe.amp == "float16")


@dataclass
class EpochSums:
    """What an epoch has added up so far: one row (loss, cross-entropy, distance, correct) per batch, float64.

    Each entry is a sum over the images of the joint batch. `seconds` is the time that earlier processes spent on the
    epoch, before they were interrupted.
    """

    rows: Tensor = field(default_factory=lambda: torch.empty(0, 4, dtype=torch.float64))
    seconds: float = 0.0
    _unseen: list[Tensor] = field(default_factory=list)
    _since: float = field(default_factory=perf_counter)

    @property
    def batches(self) -> int:
        return len(self.rows) + len(self._unseen)

    def add(self, result: BatchResult | None, images: int, device: torch.device) -> None:
        """The sums of this process's part of a batch; None for an empty part."""
        if result is None:
            self._unseen.append(torch.zeros(4, dtype=torch.float64, device=device))
            return
        distance = torch.zeros_like(result.cross_entropy) if result.distance is None else result.distance
        sums = (result.loss.detach(), result.cross_entropy, distance, result.correct)
        row = torch.stack([value.double() for value in sums])
        row[0] *= images
        self._unseen.append(row)

    def look(self, world: World, loss: TrainingLoss, recipe: Recipe, epoch: int) -> None:
        """Add up over processes what has come since the last look, and see that it is finite."""
        if not self._unseen:
            return
        begin = len(self.rows)
        self.rows = torch.cat([self.rows, world.sum(torch.stack(self._unseen)).cpu()])
        self._unseen = []
        bad = (~self.rows[begin:, 0].isfinite()).nonzero().flatten()
        if len(bad):
            batch = begin + int(bad[0])
            raise FloatingPointError(
                f"training with {loss}: the loss is {self.rows[batch, 0].item()} in epoch {epoch}, batch {batch + 1}; "
                f"a smaller learning rate (now {recipe.learning_rate:g}) or a smaller tau may help"
            )

    def elapsed(self) -> float:
        return self.seconds + perf_counter() - self._since

    def log(self, epoch: int, images: int, loss: TrainingLoss) -> EpochLog:
        total, cross_entropy, distance, correct = (float(sums.sum()) / images for sums in self.rows.T.contiguous())
        distances = distance if loss.has_distance else None
        return EpochLog(epoch, total, cross_entropy, distances, correct, self.elapsed())


def train_epoch(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: TrainingLoss,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    *,
    epoch: int,
    generator: torch.Generator,
    scaler: torch.amp.GradScaler | None = None,
    world: World | None = None,
    sums: EpochSums | None = None,
    on_batch: Callable[[EpochSums], None] | None = None,
) -> EpochLog:
    """One pass over the images in an order drawn from the generator; see `train`.

    Args:
        epoch: counted from 1; decides learning rate, crops and attacks, too.
        scaler: from `make_scaler`; None for a new one.
        world: the processes that share each batch. Their models and generators must be alike.
        sums: of an epoch that was interrupted; so many batches are left out now.
        on_batch: called after each step.
    """
    world = world or World()
    step = _Step(model, recipe, optimizer, scaler or make_scaler(recipe, x.device), world)
    sums = sums or EpochSums()
    seed = generator.initial_seed()
    batches = math.ceil(len(y) / recipe.batch_size)
    order = torch.randperm(len(y), generator=generator).to(x.device)
    model.train()
    with own_random_state(x.device):
        for batch, rows in enumerate(torch.split(order, recipe.batch_size)[sums.batches :], start=sums.batches):
            done = (epoch - 1) * batches + batch
            if recipe.schedule != "constant" or recipe.warmup_epochs:
                set_learning_rate(optimizer, learning_rate_at(recipe, done, batches))
            now = loss.at(done, recipe.epochs * batches)
            sums.add(step(x, y, rows, now, (seed, epoch, batch)), len(world.part(rows)), x.device)
            if sums.batches % _LOOK_EVERY == 0:
                sums.look(world, loss, recipe, epoch)
            if on_batch is not None:
                on_batch(sums)
    sums.look(world, loss, recipe, epoch)
    return sums.log(epoch, len(y), loss)


@dataclass(frozen=True)
class _Step:
    """One step of the optimizer on one batch."""

    model: nn.Module
    recipe: Recipe
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    world: World

    def __call__(
        self, x: Tensor, y: Tensor, rows: Tensor, loss: BatchLoss, place: tuple[int, int, int]
    ) -> BatchResult | None:
        """Descend the mean loss over `rows` of x and y; `place` is (seed, epoch, batch)."""
        mine = self.world.part(rows)
        seed_global_state(x.device, *place, "model", self.world.rank)
        self.world.share_buffers(self.model)
        self.optimizer.zero_grad()
        result = self._backward(x, y, rows, mine, loss, place) if len(mine) else None
        self.world.sum_gradients(self.model)
        if self.recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return result

    def _backward(
        self, x: Tensor, y: Tensor, rows: Tensor, mine: Tensor, loss: BatchLoss, place: tuple[int, int, int]
    ) -> BatchResult:
        images, starts = self._images(x, rows, place)
        amp = self.recipe.amp
        # Without the cache of weights: it would keep those cast while no gradient is recorded.
        with torch.autocast(
            x.device.type,
            dtype=torch.float16 if amp == "float16" else torch.bfloat16,
            enabled=amp != "none",
            cache_enabled=False,
        ):
            result = batch_result(self.model, images, y[mine], starts, loss, self.recipe)
        share = len(mine) / len(rows)
        mean = result.loss if share == 1 else result.loss * share
        self.scaler.scale(mean).backward()  # type: ignore[no-untyped-call]
        return result

    def _images(self, x: Tensor, rows: Tensor, place: tuple[int, int, int]) -> tuple[Tensor, Tensor | None]:
        """This process's images of the batch and the starts of their attacks, drawn for the joint batch."""
        images, starts = x[self.world.part(rows)], None
        if self.recipe.adversarial is not None:
            generator = generator_for(*place, "attack", device=x.device)
            joint = x.new_empty((len(rows), *x.shape[1:]))
            starts = draw_starts(self.recipe.adversarial, joint, generator)
        if self.recipe.augmentation == "crop_flip":
            crops = draw_crops(len(rows), generator_for(*place, "crops")).to(x.device)
            images = crop_and_flip(images, self.world.part(crops))
        return images, None if starts is None else self.world.part(starts)
