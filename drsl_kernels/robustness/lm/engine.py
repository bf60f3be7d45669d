"""Training of a language model: steps, evaluations, and checkpoints from which it goes on bit for bit.

Which windows of text a step sees depends on the seed and on the step alone, so that the model, the optimizer and the
number of steps are all the state there is. Relies on `model`, `corpus`, `sharding` and `run_folder`; `experiment`
relies on it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, Final

import torch
from torch import Tensor, nn

from drsl_kernels import __version__

from ..attacks import evaluation_mode
from ..checkpoint import FORMAT, reading_state, save_checkpoint
from ..distributed import World
from ..optimisation import set_learning_rate
from ..progress import Progress
from ..random_streams import deterministic
from ..storage import clear_unfinished
from ..training_logs import write_metrics
from .corpus import Corpus, drawn_windows, windows
from .model import GPT
from .run_folder import BEST, LAST, METRICS, REMEDY, SETTINGS, begin, obstacle, read_last
from .scoring import Score, token_losses
from .settings import LanguageSettings
from .sharding import Placement

__all__ = ["StepRow", "Trained", "make_optimizer", "train_language_model"]

_BETAS: Final = (0.9, 0.95)
_BATCH: Final = 32  # windows of an evaluation at a time
_LOOK_EVERY: Final = 20  # steps: looking at each loss would make a GPU wait each time


@dataclass(frozen=True)
class StepRow:
    """One evaluation, one line of metrics.csv.

    `train_loss` and `gradient_norm` (before it is shortened) are means over the steps since the last evaluation,
    `seconds` their wall time; `learning_rate` is that of the last of them. The others are of the validation windows.
    """

    step: int
    learning_rate: float
    train_loss: float
    gradient_norm: float
    validation_perplexity: float
    validation_bits_per_byte: float
    validation_accuracy: float
    seconds: float


@dataclass(frozen=True)
class Trained:
    """A finished run: its evaluations, the best of them, and whether it had been finished before."""

    rows: tuple[StepRow, ...]
    best: StepRow
    was_finished: bool


def train_language_model(
    settings: LanguageSettings,
    corpus: Corpus,
    folder: Path,
    progress: Progress,
    *,
    world: World | None = None,
    checkpoint_seconds: float = 10.0,
) -> Trained:
    """Train until the last step is done, or go on from where the run in the folder stands.

    Args:
        settings: of the run.
        corpus: the text, as tokens.
        folder: for its files: settings.json, last.pt, best.pt and metrics.csv. The caller has the sole use of it.
        progress: told of every step.
        world: the processes that train together; rank 0 alone writes.
        checkpoint_seconds: last.pt is written whenever so many seconds have passed, and at the end; with several
            processes after every evaluation instead.

    The weights depend on settings, text, number of processes, software and type of machine alone, not on how often the
    run was interrupted.

    Raises:
        ValueError: the folder holds another run, or damaged files; fewer windows than processes.
        FloatingPointError: a loss, a gradient or an evaluation is not finite; the message names the step, and last.pt
            and best.pt stay as they were.
        OSError: a file cannot be written.
    """
    world = world or World()
    _check_processes(settings, corpus, world)
    why_not = obstacle(folder, settings, corpus, world)
    if why_not is not None:
        raise ValueError(f"{folder} {why_not}")
    with deterministic(settings.threads):
        training = _Training(settings, corpus, folder, progress, world, checkpoint_seconds)
        training.prepare()
        return training.go_on()


def make_optimizer(model: nn.Module, settings: LanguageSettings) -> torch.optim.AdamW:
    """AdamW with decay of matrices alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=_BETAS)


@dataclass
class _Training:
    """A run between two steps."""

    settings: LanguageSettings
    corpus: Corpus
    folder: Path
    progress: Progress
    world: World
    checkpoint_seconds: float
    step: int = 0
    rows: list[StepRow] = field(default_factory=list)
    best: int = 0  # its index in rows
    # Loss and length of the gradient of each step since the last evaluation, looked at and not yet.
    seen: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.float64))
    unseen: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        settings, self.device = self.settings, torch.device(self.settings.device)
        self.placement = Placement(settings.sharding, self.world)
        shape = settings.shape(self.corpus.tokens.vocabulary)
        self.model = self.placement.place(GPT(shape, seed=settings.seed), self.device)
        self.optimizer = make_optimizer(self.model, settings)
        validation = windows(self.corpus.validation, settings.context, settings.validation_windows)
        self.validation = validation.to(self.device)
        self.byte_lengths = self.corpus.byte_lengths.to(self.device)
        self.written = monotonic()

    def prepare(self) -> None:
        """Stand where the run in the folder stands, or begin it."""
        if (self.folder / LAST).exists():
            self.load(read_last(self.folder))
        self.world.wait()  # no process writes before all have looked
        if self.world.rank:
            return
        clear_unfinished(self.folder, sole_use=True)
        if not (self.folder / SETTINGS).exists():
            begin(self.folder, self.settings, self.corpus, self.world)
        if self.rows:
            write_metrics(self.folder / METRICS, self.rows)

    def go_on(self) -> Trained:
        was_finished = self.finished
        for _ in range(self.step):
            self.progress.step("training")
        since = perf_counter()
        while not self.finished:
            self.descend()
            self.progress.step("training")
            self.seconds += perf_counter() - since
            if self.step % self.settings.evaluate_every == 0 or self.finished:
                self.evaluate()
            elif self._is_time():
                self.save_last()
            since = perf_counter()
        return Trained(tuple(self.rows), self.rows[self.best], was_finished)

    @property
    def finished(self) -> bool:
        return self.step == self.settings.steps

    def descend(self) -> None:
        """One step on a batch that all processes share."""
        settings = self.settings
        place = (settings.seed, "windows", self.step)
        batch = drawn_windows(self.corpus.train, settings.context, settings.batch_size, *place)
        mine = self.world.part(batch).to(self.device)
        share = len(mine) / len(batch)
        set_learning_rate(self.optimizer, settings.learning_rate_at(self.step))
        self.optimizer.zero_grad()
        self.model.train()
        loss = self.model(mine[:, :-1], mine[:, 1:], settings.loss)
        self.placement.backward(loss, share, self.model)
        length = self.placement.clip(self.model, settings.clip_norm)
        self.optimizer.step()
        # The loss is this process's part of the joint one, the length is the joint one in all of them.
        self.unseen.append(torch.stack([loss.detach().double() * share, length.double() / self.world.size]))
        self.step += 1
        if len(self.unseen) == _LOOK_EVERY:
            self.look()

    def look(self) -> None:
        """Add up over processes what has come since the last look, and see that it is finite."""
        if not self.unseen:
            return
        new = self.world.sum(torch.stack(self.unseen)).cpu()
        bad = (~new.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            loss, length = new[bad[0]].tolist()
            raise FloatingPointError(
                f"training with {self.settings.loss}: in step {self.step - len(new) + int(bad[0]) + 1} the loss is "
                f"{loss} and its gradient has length {length}; a smaller learning rate (now "
                f"{self.settings.learning_rate:g}) or a smaller tau may help"
            )
        self.seen, self.unseen = torch.cat([self.seen, new]), []

    def evaluate(self) -> None:
        """Judge the model on the validation windows; keep it if it is the best so far."""
        self.look()
        score = self.score()
        if not math.isfinite(score.nats):
            raise FloatingPointError(f"after step {self.step} the loss of the validation part is {score.nats}")
        loss, length = self.seen.mean(0).tolist()
        row = StepRow(
            step=self.step,
            learning_rate=self.settings.learning_rate_at(self.step - 1),
            train_loss=loss,
            gradient_norm=length,
            validation_perplexity=score.perplexity,
            validation_bits_per_byte=score.bits_per_byte,
            validation_accuracy=score.accuracy,
            seconds=self.seconds,
        )
        self.rows.append(row)
        if len(self.rows) == 1 or row.validation_bits_per_byte < self.rows[self.best].validation_bits_per_byte:
            self.best = len(self.rows) - 1
            self._save(BEST, self.placement.states(self.model, None))
        self.seen, self.seconds = self.seen[:0], 0.0
        if self.world.rank == 0:
            write_metrics(self.folder / METRICS, self.rows)
        if self.finished or self.world.size > 1 or self._is_time():
            self.save_last()

    def score(self) -> Score:
        """Of the validation windows; each process has as many batches, for sharded weights need all of them."""
        batches = -(-len(self.validation) // (self.world.size * _BATCH))
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        with evaluation_mode(self.model), torch.no_grad():
            for batch in self.world.part(self.validation).tensor_split(batches):
                y = batch[:, 1:]
                nats, correct = token_losses(self.model(batch[:, :-1]), y)
                sums += torch.stack([nats.double().sum(), correct.sum().double(), self.byte_lengths[y].sum().double()])
        nats_sum, correct_sum, byte_sum = self.world.sum(sums).tolist()
        return Score(nats_sum, int(correct_sum), self.validation[:, 1:].numel(), int(byte_sum))

    def save_last(self) -> None:
        self.look()
        states = self.placement.states(self.model, self.optimizer)
        state = {
            "optimizer": states["optimizer"],
            "step": self.step,
            "rows": [asdict(row) for row in self.rows],
            "best": self.best,
            "seen": self.seen,
            "seconds": self.seconds,
        }
        self._save(LAST, {"model": states["model"], "state": state})
        self.written = monotonic()

    def load(self, content: dict[str, Any]) -> None:
        """Stand where the run stood when it wrote this checkpoint. ValueError where that does not tell."""
        with reading_state(self.folder / LAST, REMEDY):
            self._take(content["model"], content["state"])

    def _take(self, model: dict[str, Any], state: dict[str, Any]) -> None:
        self.placement.load(self.model, self.optimizer, {"model": model, "optimizer": state["optimizer"]})
        self.step, self.best, self.seen, self.seconds = (state[name] for name in ("step", "best", "seen", "seconds"))
        self.rows = [StepRow(**row) for row in state["rows"]]

    def _is_time(self) -> bool:
        """Processes do not agree about the time, and have to write together."""
        return self.world.size == 1 and monotonic() - self.written >= self.checkpoint_seconds

    def _save(self, name: str, content: dict[str, Any]) -> None:
        if self.world.rank:
            return
        about = {
            "shape": self.model.shape.as_json(),
            "loss": asdict(self.settings.loss),
            "seed": self.settings.seed,
            "step": self.step,
            "text": self.corpus.text.digest,
            "tokens": self.corpus.tokens.digest,
            "drsl_kernels": __version__,
            "torch": str(torch.__version__),
        }
        save_checkpoint(self.folder / name, {"format": FORMAT, "about": about} | content)


def _check_processes(settings: LanguageSettings, corpus: Corpus, world: World) -> None:
    """Every process needs a part of every batch, of the validation windows, too."""
    there = len(windows(corpus.validation, settings.context, settings.validation_windows))
    for name, size in (("batch_size", settings.batch_size), ("validation_windows", there)):
        if size < world.size:
            raise ValueError(f"{name} must be at least the number of processes, {world.size}, got {size}")
