"""Time and peak memory of the fused linear loss on the CPU: `python benchmarks/linear.py --out FILE.json`.

Forward and backward of output layer and loss, with the penalty, against logits that are stored whole, and against
PyTorch's cross-entropy without a penalty: of whole logits, and as `F.linear_cross_entropy`, with its defaults and in
chunks. Times are taken in turns in one process, memory in a process of its own for each contender. Relies on `machine`.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from machine import peak_memory, where, write
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from drsl_kernels import fused_drsl_loss, fused_linear_drsl_loss

TAU = 0.1
VOCABULARIES = (10_000, 32_000, 128_256, 256_000)
OURS, WHOLE, PLAIN = "fused", "whole logits", "F.cross_entropy of whole logits"
TORCH, TORCH_CHUNKS = "F.linear_cross_entropy", "F.linear_cross_entropy, chunks"


def contenders(hidden: Tensor, weight: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    found: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: fused_linear_drsl_loss(hidden, weight, y, TAU),
        WHOLE: lambda: fused_drsl_loss(F.linear(hidden, weight), y, TAU),
        PLAIN: lambda: F.cross_entropy(F.linear(hidden, weight), y),
    }
    if hasattr(F, "linear_cross_entropy"):  # from torch 2.13 on
        options = nn.LinearCrossEntropyOptions()
        found[TORCH] = lambda: F.linear_cross_entropy(hidden, weight, y)
        found[TORCH_CHUNKS] = lambda: F.linear_cross_entropy(hidden, weight, y, options=options)
    return found


def tensors(tokens: int, width: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (torch.randn(classes, width, generator=generator) / width**0.5).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(classes, (tokens,), generator=generator)


def seconds(run: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> float:
    for leaf in leaves:
        leaf.grad = None
    begin = time.perf_counter()
    run().backward()
    return time.perf_counter() - begin


def timed(tokens: int, width: int, classes: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Median seconds, contenders in turns and in an order that changes; of the slowest, which is no target, once."""
    hidden, weight, y = tensors(tokens, width, classes, dtype)
    runs = contenders(hidden, weight, y)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(runs), len(runs)):
            if name == TORCH_CHUNKS and number != 1:
                continue
            taken = seconds(runs[name], (hidden, weight))
            gc.collect()
            if number > 0:  # the first round warms up
                samples[name].append(taken)
    return {name: statistics.median(values) for name, values in samples.items()}


def memory(name: str, tokens: int, width: int, classes: int, dtype: torch.dtype) -> int:
    """Peak bytes above inputs, parameters and their gradients."""
    hidden, weight, y = tensors(tokens, width, classes, dtype)
    small = tensors(8, width, 64, dtype)
    contenders(*small)[name]().backward()  # what libraries take once
    run = contenders(hidden, weight, y)[name]
    grown = peak_memory(lambda: run().backward())
    return grown - sum(leaf.numel() * leaf.element_size() for leaf in (hidden, weight))


def measured(tokens: int, width: int, classes: int, dtype: str, rounds: int) -> dict[str, Any]:
    times = timed(tokens, width, classes, getattr(torch, dtype), rounds)
    case = [str(tokens), str(width), str(classes), dtype, str(torch.get_num_threads())]
    peaks = {}
    for name in times:
        command = [sys.executable, __file__, "--memory-of", name, *case]
        peaks[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    about = {"tokens": tokens, "width": width, "classes": classes, "dtype": dtype, "rounds": rounds}
    return {**about, "threads": torch.get_num_threads(), "seconds": times, "bytes": peaks, "where": where()}


def rows(case: dict[str, Any]) -> list[list[str]]:
    """Of each contender: classes, name, seconds, MiB, their share of the logits, and time of the fused loss over it."""
    size = case["tokens"] * case["classes"] * getattr(torch, case["dtype"]).itemsize
    found = []
    for name, seconds_taken in case["seconds"].items():
        peak, over = case["bytes"][name], case["seconds"][OURS] / seconds_taken
        cells = [f"{seconds_taken:.2f}", f"{peak / 2**20:.0f}", f"{100 * peak / size:.1f}%", f"{over:.3f}"]
        found.append([f"{case['classes']:,}", name, *cells])
    return found


CASE = ("dtype", "tokens", "width", "threads", "classes")
HEADS = ("classes", "", "seconds", "MiB", "of the logits", "fused over it")


@click.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write all figures to this JSON file, where those of other cases are kept.",
)
@click.option("--tokens", default=2048, show_default=True)
@click.option("--width", default=1024, show_default=True, help="Of the hidden states.")
@click.option("--vocabulary", "vocabularies", type=int, multiple=True, default=VOCABULARIES, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True, help="Threads that torch may use.")
@click.option("--memory-of", hidden=True)
@click.argument("case", nargs=-1)
def main(
    out: Path | None,
    tokens: int,
    width: int,
    vocabularies: tuple[int, ...],
    dtype: str,
    rounds: int,
    threads: int,
    memory_of: str | None,
    case: tuple[str, ...],
) -> None:
    if memory_of is not None:
        torch.set_num_threads(int(case[4]))
        print(memory(memory_of, *(int(number) for number in case[:3]), getattr(torch, case[3])))
        return
    torch.set_num_threads(threads)
    cases = [measured(tokens, width, classes, dtype, rounds) for classes in vocabularies]
    table = Table(*HEADS, title=f"{tokens} tokens of width {width}, {dtype}")
    for one in cases:
        for row in rows(one):
            table.add_row(*row)
        table.add_section()
    Console(width=100).print(table)
    if out is not None:
        before = json.loads(out.read_text())["cases"] if out.exists() else []
        by_case = {tuple(one[name] for name in CASE): one for one in [*before, *cases]}
        write(out, {"tau": TAU, "cases": [by_case[case] for case in sorted(by_case)]})


if __name__ == "__main__":
    main()
