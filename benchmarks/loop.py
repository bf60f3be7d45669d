"""What the loss costs in a real loop: `python benchmarks/loop.py --out FILE.json`.

Seconds per epoch of the bundled training, and seconds of a PGD-20 attack on its model, each as a ratio to the same with
`F.cross_entropy`; rounds are interleaved. Relies on drsl_kernels.robustness, `interleaved` and `machine`.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from interleaved import interleave
from machine import where, write
from torch import Tensor

from drsl_kernels import fused_drsl_loss
from drsl_kernels.robustness import pgd
from drsl_kernels.robustness.data import digits
from drsl_kernels.robustness.loss_names import DEFAULT_TAUS
from drsl_kernels.robustness.losses import TrainingLoss
from drsl_kernels.robustness.models import small_cnn
from drsl_kernels.robustness.timing import time_epochs
from drsl_kernels.robustness.train import Recipe

EPS, STEPS = 0.1, 20
TRAINED_WITH = ("uniform", "non_target_logits")
ATTACKED = 256  # images


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write all medians to this JSON file.")
@click.option("--rounds", default=40, show_default=True, help="Epochs of each loss, and attacks at least.")
@click.option("--seconds", default=75.0, show_default=True, help="Time spent on the attacks.")
@click.option("--threads", default=2, show_default=True, help="Threads that torch may use.")
def main(out: Path | None, rounds: int, seconds: float, threads: int) -> None:
    """Time training and attack with our losses against both with F.cross_entropy."""
    torch.set_num_threads(threads)
    data = digits()
    losses = [TrainingLoss(name, DEFAULT_TAUS[name][0]) for name in TRAINED_WITH]
    epochs = time_epochs(losses, lambda _: small_cnn(0), data.train_x, data.train_y, Recipe(), rounds=rounds)
    ratios = {f"epoch, {loss}": epochs[loss].ratio for loss in losses}

    model = small_cnn(0).eval()
    x, y = data.held_out_x[:ATTACKED], data.held_out_y[:ATTACKED]
    attack = partial(pgd, model, x, y, eps=EPS, alpha=EPS / 4, steps=STEPS)
    plain = partial(F.cross_entropy, reduction="none")
    runs = {
        "F.cross_entropy": lambda: attack(loss=plain),
        "log_odds": lambda: attack(loss="log_odds"),
        "ce": lambda: attack(loss="ce"),
        "uniform": lambda: attack(loss=_uniform),
    }
    times = interleave(runs, seconds=seconds, least_rounds=max(2, rounds))
    ratios |= {f"PGD-{STEPS}, {name}": times[name].over_first for name in runs if name != "F.cross_entropy"}
    for name, ratio in ratios.items():
        print(f"{name:32} {ratio:.3f} of F.cross_entropy")
    if out is not None:
        seconds_of = {name: asdict(timing) for name, timing in times.items()}
        write(out, {"threads": threads, **where(), "ratios": ratios, "rounds": rounds, "attack_seconds": seconds_of})


def _uniform(logits: Tensor, y: Tensor) -> Tensor:
    return fused_drsl_loss(logits, y, 0.5, reduction="none")


if __name__ == "__main__":
    main()
