"""The linear stage: `python -m gpu.linear --out DIR --device cuda --seconds 60`, with benchmarks/ on the path.

Time and peak memory of the heads of language models: the loss of hidden states, a weight and labels, and its gradients
to the first two. Contenders take turns, one call each per round. Memory is what a call takes at its peak above what was
there before it and the two gradients that it leaves. Every loss and gradient is held against whole logits in float32.
Relies on `device`, `linear_contenders`, `store`; `gpu_suite` runs it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drsl_kernels import softmax_loss

from . import store
from .contenders import LEFT_OUT, TAU
from .device import Device, Run, device
from .linear_contenders import LinearContender, linear_contenders
from .store import WHOLE_LOGITS

WARM_ROUNDS = 2
TRUTH_ROWS = 1024  # whose logits the truth has in memory at a time
ALLOWED = 3e-2  # relative error of loss and gradients, in norm: bfloat16 rounds the logits
TRUTH = dict[str, tuple[Tensor, Tensor, Tensor]]  # kind -> loss, gradients to hidden and weight


@dataclass(frozen=True)
class LinearCase:
    """A head of so many classes, on so many tokens of a hidden width."""

    tokens: int
    width: int
    classes: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"{self.tokens}x{self.width}x{self.classes} {self.dtype}"

    @property
    def gradient_bytes(self) -> int:
        return (self.tokens + self.classes) * self.width * getattr(torch, self.dtype).itemsize


def cases(dry_run: bool) -> list[LinearCase]:
    """The vocabularies, the one that most models have first."""
    if dry_run:
        return [LinearCase(5, 4, 11)]
    return [LinearCase(8192, 4096, classes) for classes in (128256, 32000, 262144, 10000)]


def main() -> None:
    """Measure case by case, share the time that is left among the cases that are left, keep each result at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    here = device(options.device)
    end = time.monotonic() + options.seconds
    todo = cases(dry_run=options.device == "cpu")
    found, left_out = linear_contenders(here)
    about = {"tau": TAU, "left_out": left_out, "notes": {c.name: c.note for c in found if c.note}}
    results: list[dict[str, Any]] = []
    for i, case in enumerate(todo):
        facts = {**asdict(case), "name": case.name}
        share = (end - time.monotonic()) / (len(todo) - i)
        if share <= 0:
            results.append({**facts, "skipped": "no time left"})
        else:
            results.append({**facts, **measure(here, case, found, time.monotonic() + share)})
            print(f"{case.name}: {len(results[-1]['times'])} contenders", flush=True)
        store.update(options.out, linear={**about, "cases": results})


def measure(here: Device, case: LinearCase, found: Sequence[LinearContender], end: float) -> dict[str, Any]:
    """Medians and quartiles in seconds, peaks in bytes, who is wrong and who cannot."""
    hidden, weight, y = inputs(here, case)
    truths = {kind: truth(kind, hidden, weight, y) for kind in ("plain", "penalty")}
    runs: dict[str, Run] = {}
    peaks: dict[str, int | None] = {}
    wrong: dict[str, str] = {}
    reasons: LEFT_OUT = {}
    for contender in found:
        run = gradients_of(contender, hidden, weight, y)
        try:
            disagreement = compare(contender, hidden, weight, y, truths)
            peak = here.peak(run)
        except Exception as error:  # whatever a contender cannot do is a result; a broken device raises again below
            reasons[contender.name] = f"{type(error).__name__}: {error}"[:300]
        else:
            runs[contender.name] = run
            peaks[contender.name] = None if peak is None else max(peak - case.gradient_bytes, 0)
            if disagreement:
                wrong[contender.name] = disagreement
        here.synchronize()
    truths.clear()
    here.free()
    times = summary(rounds(here, runs, end))
    del hidden, weight, y
    runs.clear()
    gc.collect()
    here.free()
    return {"times": times, "peak_bytes": peaks, "disagrees": wrong, "left_out": reasons}


def inputs(here: Device, case: LinearCase) -> tuple[Tensor, Tensor, Tensor]:
    """Random normal hidden states and weights, whose logits have a standard deviation of 2, and labels."""
    torch.manual_seed(case.classes)
    options: dict[str, Any] = {"device": here.torch, "dtype": getattr(torch, case.dtype)}
    hidden = torch.randn(case.tokens, case.width, **options).requires_grad_()
    weight = torch.randn(case.classes, case.width, **options).mul_(2 * case.width**-0.5).requires_grad_()
    return hidden, weight, torch.randint(case.classes, (case.tokens,), device=here.torch)


def gradients_of(contender: LinearContender, hidden: Tensor, weight: Tensor, y: Tensor) -> Run:
    return lambda: torch.autograd.grad(contender.loss(hidden, weight, y), (hidden, weight))


def truth(kind: str, hidden: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss and its gradients, in float32, some rows at a time."""
    wide = weight.detach().float().requires_grad_()
    distance = "uniform" if kind == "penalty" else None
    total, of_hidden, of_weight = torch.zeros((), device=y.device), [], torch.zeros_like(wide)
    for rows, labels in zip(hidden.detach().split(TRUTH_ROWS), y.split(TRUTH_ROWS), strict=True):
        leaf = rows.float().requires_grad_()
        logits = F.linear(leaf, wide)
        loss = softmax_loss(logits, labels, distance=distance, tau=TAU, reduction="sum", backend="reference") / len(y)
        gradients = torch.autograd.grad(loss, (leaf, wide))
        total += loss.detach()
        of_hidden.append(gradients[0])
        of_weight += gradients[1]
    return total, torch.cat(of_hidden), of_weight


def compare(contender: LinearContender, hidden: Tensor, weight: Tensor, y: Tensor, truths: TRUTH) -> str:
    """What is wrong with a contender's loss and gradients, if anything is."""
    loss = contender.loss(hidden, weight, y)
    found = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
    errors = {
        name: ((mine.float() - true).norm() / true.norm()).item()
        for name, mine, true in zip(("loss", "hidden", "weight"), found, truths[contender.kind], strict=True)
    }
    if all(error < ALLOWED for error in errors.values()):  # a NaN is not
        return ""
    return "relative errors " + ", ".join(f"{error:.1e} of {name}" for name, error in errors.items())


def rounds(here: Device, runs: dict[str, Run], end: float) -> dict[str, list[float]]:
    """Seconds per call, one of each contender per round, in rotating order."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(WARM_ROUNDS + here.most_rounds):
        if i >= WARM_ROUNDS + here.least_rounds and time.monotonic() > end:
            break
        start = i % len(names)
        for name in names[start:] + names[:start]:
            seconds = here.elapsed(runs[name], cold=False)
            if i >= WARM_ROUNDS:
                samples[name].append(seconds)
    return samples


def summary(samples: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {
        name: {
            **dict(zip(("q1", "median", "q3"), statistics.quantiles(values, n=4, method="inclusive"), strict=True)),
            "samples": len(values),
            **({f"over {WHOLE_LOGITS}": medians[name] / medians[WHOLE_LOGITS]} if WHOLE_LOGITS in medians else {}),
        }
        for name, values in samples.items()
    }


if __name__ == "__main__":
    main()
