"""Attacks on one network whose logits are multiplied: `python benchmarks/scaled_logits.py --out FILE.json`.

A factor changes no decision, so it must change no worst case. It does change what is left of the gradient of
F.cross_entropy, which rounds 1 - p to 0. The table is in docs/attacking.md. Relies on `machine` and the package's
attacks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from machine import where, write
from torch import Tensor

from drsl_kernels.robustness import Attack, TrainingLoss, worst_case
from drsl_kernels.robustness.data import digits
from drsl_kernels.robustness.models import small_cnn
from drsl_kernels.robustness.recipe import Recipe
from drsl_kernels.robustness.train import train

FACTORS = (1, 5, 20, 100)
EPS = 0.1


def torch_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


LOSSES: dict[str, tuple[Any, ...]] = {
    "worst case over `log_odds` and `margin`": ("log_odds", "margin"),
    "`ce` of this package": ("ce",),
    "`F.cross_entropy`": (torch_cross_entropy,),
}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--epochs", default=40, show_default=True)
@click.option("--steps", default=20, show_default=True)
def main(out: Path, epochs: int, steps: int) -> None:
    """Robust accuracy of a network trained with cross-entropy on the digits, its logits multiplied."""
    torch.set_num_threads(1)
    split = digits()
    model = small_cnn(0)
    order = torch.Generator().manual_seed(0)
    train(model, split.train_x, split.train_y, TrainingLoss("ce"), Recipe(epochs=epochs), generator=order)
    model.eval()

    def accuracy(factor: float, losses: tuple[Any, ...]) -> float:
        attacks = [Attack(loss, steps=steps, restarts=2) for loss in losses]
        start = torch.Generator().manual_seed(0)
        images = split.held_out_x, split.held_out_y
        found = worst_case(lambda x: factor * model(x), *images, epsilons=[EPS], attacks=attacks, generator=start)
        return found.robust_accuracy()[0]

    rows = {name: [accuracy(factor, losses) for factor in FACTORS] for name, losses in LOSSES.items()}
    settings = {"images": len(split.held_out_y), "eps": EPS, "epochs": epochs, "steps": steps, "factors": FACTORS}
    write(out, where() | settings | {"robust_accuracy": rows})
    for name, values in rows.items():
        print(name, *(f"{100 * value:.1f}" for value in values))


if __name__ == "__main__":
    main()
