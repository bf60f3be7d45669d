"""The softmax bottleneck where its size is known: `python benchmarks/bottleneck.py --out FILE.json`.

Contexts i have target probabilities P_i of C classes, and an output layer of width 1 without bias, whose hidden states
h_i and class weights w_j are all free: logits h_i w_j. It is trained with softmax, sigsoftmax, and mixtures of two of
either, from many starts; and what softmax can reach at best is bounded from below, see `least_gap`. The page that
shows the result is docs/evidence/softmax_bottleneck.md. Relies on `machine` and the package's output layers.
"""

from __future__ import annotations

import math
from pathlib import Path

import click
import torch
from machine import where, write
from torch import Tensor

from drsl_kernels import MixtureOfSigsoftmax, MixtureOfSoftmax, sigsoftmax

# name: layer and components. One component is the plain activation.
MODELS: dict[str, tuple[type[MixtureOfSoftmax] | type[MixtureOfSigsoftmax], int]] = {
    "softmax": (MixtureOfSoftmax, 1),
    "sigsoftmax": (MixtureOfSigsoftmax, 1),
    "mixture of 2 softmaxes": (MixtureOfSoftmax, 2),
    "mixture of 2 sigsoftmaxes": (MixtureOfSigsoftmax, 2),
}
# Three classes, each certain in one context: the middle one of w has probability 1/2 at most, see the page.
ORDER = dict.fromkeys(MODELS, math.log(2.0) / 3.0)
TOLERANCE = 1e-8  # nats between the least gap that was found and the bound
RANK = 1e-6  # singular values below this share of the largest count as 0
LINE = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
PLANE = torch.tensor([[-1.0, 0.0, 1.0], [-1.0, 2.0, -1.0]], dtype=torch.float64)
PLANE = PLANE / PLANE.norm(dim=1, keepdim=True)  # the plane of logits of three classes, but for a constant


def targets() -> dict[str, Tensor]:
    """Probabilities, contexts times classes."""
    lifted = sigsoftmax(1.5 * torch.stack([LINE, -LINE]))
    ends = torch.stack([(2.0 * LINE).softmax(0), (-2.0 * LINE).softmax(0)])
    hollow = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64) @ ends
    return {"lifted": lifted, "hollow": hollow, "one-hot": torch.eye(3, dtype=torch.float64)}


def random_target(contexts: int = 12, classes: int = 10) -> Tensor:
    """Without structure, to look at ranks."""
    logits = torch.randn(contexts, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return logits.softmax(1)


def entropy(p: Tensor) -> float:
    """Mean over contexts, in nats: what no model's cross-entropy goes below."""
    return float(torch.special.entr(p).sum(1).mean())


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File for the result.")
@click.option("--restarts", default=6, show_default=True, help="Starts of each training.")
@click.option("--steps", default=400, show_default=True, help="The most steps of a training.")
def main(out: Path, restarts: int, steps: int) -> None:
    """Bound what softmax can reach, and train."""
    torch.set_num_threads(1)
    rows = []
    for name, p in targets().items():
        known = ORDER if name == "one-hot" else {"softmax": least_gap(p), "mixture of 2 softmaxes": least_gap(p, True)}
        reached = {model: best_gap(p, model, 1, restarts, steps)[0] for model in MODELS}
        rows.append({"target": name, "p": p.tolist(), "entropy": entropy(p), "known": known, "reached": reached})
        print(rows[-1], flush=True)
    p = random_target()
    ranks = {}
    for model in MODELS:
        gap, log_p = best_gap(p, model, 2, restarts, steps)
        ranks[model] = {"gap": gap, "rank": rank(log_p)}
    random = {"shape": list(p.shape), "width": 2, "entropy": entropy(p), "rank": rank(p.log()), "models": ranks}
    print(random)
    write(out, {**where(), "restarts": restarts, "tolerance": TOLERANCE, "rows": rows, "random": random})


# ----------------------------------------------------------------------------------------------------------
# What is reached


def best_gap(p: Tensor, model: str, width: int, restarts: int, steps: int) -> tuple[float, Tensor]:
    """The least mean KL(P_i, Q_i) in nats over the restarts, and log Q."""
    trained = [train(p, model, width, seed, steps) for seed in range(restarts)]
    return min(trained, key=lambda found: found[0])


def train(p: Tensor, model: str, width: int, seed: int, steps: int) -> tuple[float, Tensor]:
    """By L-BFGS over all contexts at once. A context is a unit vector, so that its hidden states are free."""
    kind, components = MODELS[model]
    contexts = torch.eye(len(p), dtype=torch.float64)
    layer = kind(len(p), p.shape[1], components, width=width, bias=False, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
        layer.weight.mul_(3.0)
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = layer.loss(contexts, p)
        loss.backward()
        return loss

    optimizer.step(step)
    with torch.no_grad():
        log_q = layer(contexts)
    # log(0) counts nothing where P is 0
    gap = (torch.special.xlogy(p, p) - p * log_q).sum(1).mean()
    return float(gap), log_q


def rank(log_p: Tensor) -> int:
    return int(torch.linalg.matrix_rank(log_p, rtol=RANK))


# ----------------------------------------------------------------------------------------------------------
# What is known


def least_gap(p: Tensor, mixture: bool = False) -> float:
    """The least mean gap of softmax; with `mixture` that of any number of softmaxes that share w. For three classes.

    The class weights w matter by their direction alone, an angle t of `PLANE`. Given t the contexts are independent:
    a row's gap K(t) is the least KL(P, softmax(h w)) over h, of a concave maximisation.

    The logits v with KL(P, softmax(v)) < c are a convex set. It does not hold 0 as long as c is at most K's maximum,
    so the lines through 0 that meet it are an interval of angles, around that of log P, where K = 0. Hence between two
    angles K is at least the less of its two values, unless the angle of log P lies between them, and then it is at
    least 0. Intervals whose sum of bounds is not above the least value at an angle so far, less `TOLERANCE`, are halved
    until none is left.

    A mixture of softmax(h w) has q_j <= q_i^l q_k^(1-l), by Hölder's inequality, where w_j = l w_i + (1-l) w_k lies
    between the others. Where P satisfies that, the bound of the row is 0; where it does not, the best q has equality,
    and the bound is K.
    """
    edges = torch.linspace(0.0, math.pi, 193, dtype=torch.float64)  # 30, 90 and 150 degrees are among them
    low, high, least = edges[:-1], edges[1:], math.inf
    while len(low) > 0:
        middle = (low + high) / 2.0
        values = [row_gap(row, middle) * (violates(row, middle) if mixture else 1.0) for row in p]
        least = min(least, float(torch.stack(values).mean(0).min()))
        bounds = torch.stack([bound(row, low, high, mixture) for row in p]).mean(0)
        rest = bounds < least - TOLERANCE
        low, high = torch.cat([low[rest], middle[rest]]), torch.cat([middle[rest], high[rest]])
    return least


def symmetric_gap(p: Tensor) -> float:
    """That of w = (-1, 0, 1) for two contexts that are mirror images: where the mean of w is that of the target, m.

    With x = exp(h): (x - 1/x) / (x + 1 + 1/x) = m, and so x = (m + sqrt(4 - 3 m^2)) / (2 (1 - m)).
    """
    m = float(p[0] @ LINE)
    h = math.log((m + math.sqrt(4.0 - 3.0 * m * m)) / (2.0 * (1.0 - m)))
    return float((p[0] * (p[0].log() - (h * LINE).log_softmax(0))).sum())


def bound(row: Tensor, low: Tensor, high: Tensor, mixture: bool) -> Tensor:
    """Of the row's gap, from below, in each interval of angles."""
    v = PLANE @ row.log()
    zero = torch.atan2(v[1], v[0]).remainder(math.pi)
    bounds = torch.minimum(row_gap(row, low), row_gap(row, high)).masked_fill((low <= zero) & (zero <= high), 0.0)
    if mixture:
        # P's state changes at `zero`, and where two weights are equal: at 30, 90 and 150 degrees, which are edges.
        bounds = bounds.masked_fill(~violates(row, (low + high) / 2.0), 0.0)
    return bounds


def violates(row: Tensor, angles: Tensor) -> Tensor:
    """Where P has more of the middle class than Hölder's inequality leaves to a mixture."""
    w, order = weights(angles).sort(1)
    share = (w[:, 2] - w[:, 1]) / (w[:, 2] - w[:, 0])
    log_p = row.log()[order]
    return log_p[:, 1] > share * log_p[:, 0] + (1.0 - share) * log_p[:, 2]


def row_gap(row: Tensor, angles: Tensor) -> Tensor:
    """K: the least KL(P, softmax(h w)) over h, found by bisection where the model's mean of w is that of P."""
    w = weights(angles)
    low, high = torch.full_like(angles, -200.0), torch.full_like(angles, 200.0)
    for _ in range(60):
        h = (low + high) / 2.0
        above = ((h.unsqueeze(1) * w).softmax(1) * w).sum(1) > w @ row
        low, high = torch.where(above, low, h), torch.where(above, h, high)
    return (row * (row.log() - (h.unsqueeze(1) * w).log_softmax(1))).sum(1)


def weights(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], 1) @ PLANE


if __name__ == "__main__":
    main()
