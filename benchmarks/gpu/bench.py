"""The bench stage: `python -m gpu.bench --out DIR --device cuda --seconds 180`, with benchmarks/ on the path.

Times every contender on every case: the loss alone, its backward pass, both, and how long the host is busy with both.
Contenders take turns, one sample each per round. Two regimes:

    latency     small batches, as in training on images. A sample is the mean of a few calls one after another, from
                the first kernel's start to the last one's end, host overhead included; the data stay in the cache.
    bandwidth   logits of 256 MiB and more. A sample is one call, on an emptied cache, with the host ahead.

What has to be compiled is compiled beforehand by several processes, which leave it in the caches on disk.
Relies on `device`, `contenders`, `store`; `gpu_suite` runs it.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from drsl_kernels import fused_drsl_loss

from . import store
from .contenders import LEFT_OUT, TAU, Contender, contenders
from .device import Device, Run, device
from .store import COPY, FORWARD_BACKWARD, PLAIN_BASE

WORKS = ("forward", "backward", FORWARD_BACKWARD, "host")
WARM_ROUNDS = 2
WARM_SHARE = 0.35  # of the time, at most, for compiling beforehand
LAUNCHES_SHARE = 0.07  # ... and for counting launches at the end


@dataclass(frozen=True)
class Case:
    """Logits of one size. "latency" and "bandwidth" as above. `compiled_penalty`: the compiled reference takes part."""

    regime: Literal["latency", "bandwidth"]
    rows: int
    classes: int
    dtype: str
    compiled_penalty: bool = False

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.classes} {self.dtype}"

    @property
    def cold(self) -> bool:
        return self.regime == "bandwidth"

    @property
    def bytes(self) -> int:
        return self.rows * self.classes * getattr(torch, self.dtype).itemsize


def cases(dry_run: bool) -> list[Case]:
    """The sizes, in an order in which those cut off by the time limit are missed least."""
    latency = [(128, 10), (256, 1000), (4096, 1000), (128, 100), (1024, 1000)]
    elements = 2**27  # 256 MiB in bfloat16, 512 in float32
    bandwidth = [(math.ceil(elements / c), c) for c in (1000, 128256, 10, 32000, 100, 262144, 4096)]
    if dry_run:
        return [Case("latency", 4, 3, "float32", True), Case("bandwidth", 2, 40, "bfloat16", True)]
    thorough = {*latency[:3:2], *bandwidth[:2]}  # it compiles for long, so not everywhere
    return [
        Case(regime, *shape, dtype, compiled_penalty=shape in thorough)
        for regime, shapes in (("latency", latency), ("bandwidth", bandwidth))
        for shape in shapes
        for dtype in ("float32", "bfloat16")
    ]


def main() -> None:
    """Measure, or with --warm I/N compile what every N-th case from the I-th on needs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--warm")
    options = parser.parse_args()
    here = device(options.device)
    todo = cases(dry_run=options.device == "cpu")
    if options.warm:
        first, step = map(int, options.warm.split("/"))
        for case in todo[first::step]:
            warm(here, case)
        return
    end = time.monotonic() + options.seconds
    ready = warm_in_processes(options, WARM_SHARE * options.seconds)
    measure_all(here, todo, ready, options.out, end, LAUNCHES_SHARE * options.seconds)


def measure_all(
    here: Device, todo: Sequence[Case], ready: set[str], out: Path, end: float, seconds_for_launches: float
) -> None:
    """Measure case by case, share the time that is left among the cases that are left, keep each result at once."""
    found, left_out = contenders(here)
    about = {"tau": TAU, "left_out": left_out, "notes": {c.name: c.note for c in found if c.note}}
    results: list[dict[str, Any]] = []
    for i, case in enumerate(todo):
        begin = time.monotonic()
        share = (end - seconds_for_launches - begin) / (len(todo) - i)
        if share <= 0:
            results.append({**asdict(case), "name": case.name, "skipped": "no time left"})
        else:
            with entries(here, case, found, ready) as (taking_part, reasons):
                works = measure(here, case, taking_part, begin + share - time.monotonic())
                wrong = {e.name: e.disagreement for e in taking_part if e.disagreement}
            facts = {**asdict(case), "name": case.name, "bytes": case.bytes, "cache_emptied": case.cold}
            results.append({**facts, "works": works, "left_out": reasons, "disagrees": wrong})
            print(f"{case.name}: {len(works[FORWARD_BACKWARD])} contenders", flush=True)
        store.update(out, bench={**about, "cases": results})
    # The profiler stays attached once used and would slow the timed calls: it comes last.
    counted = [c for c in found if not c.must_be_ready]
    for case, result in zip(todo, results, strict=True):
        if time.monotonic() > end or case.cold or case.dtype != "float32" or "skipped" in result:
            continue
        with entries(here, case, counted, ready) as (taking_part, _):
            result["launches"] = {e.name: here.launches(e.prepare(FORWARD_BACKWARD, 1)) for e in taking_part}
        store.update(out, bench={**about, "cases": results})


class Entry:
    """A contender on the logits of a case."""

    def __init__(self, contender: Contender, logits: Tensor, y: Tensor) -> None:
        self.name = contender.name
        self._contender, self._original, self._y = contender, logits.detach(), y
        self._logits = self._original.clone().requires_grad_() if contender.overwrites_logits else logits
        self.disagreement = ""

    def prepare(self, work: str, calls: int) -> Run:
        """A function that does the work `calls` times; what does not belong to the work happens before it returns."""
        loss, logits, y = self._contender.loss, self._logits, self._y
        if self._contender.overwrites_logits:
            with torch.no_grad():
                logits.copy_(self._original)
        if work == "forward":
            plain_logits = logits.detach()  # some peers look at what these require, whatever the mode

            @torch.no_grad()
            def run() -> None:
                for _ in range(calls):
                    loss(plain_logits, y)

        elif work == "backward":
            losses = [loss(logits, y) for _ in range(calls)]

            def run() -> None:
                for one in losses:
                    torch.autograd.grad(one, logits)

        else:

            def run() -> None:
                for _ in range(calls):
                    torch.autograd.grad(loss(logits, y), logits)

        return run

    def check(self, truth: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Note where the loss, or the gradient of the first rows, is not that of eager PyTorch in float32."""
        self.prepare("forward", 1)  # restores the logits
        loss = self._contender.loss(self._logits, self._y)
        grad = torch.autograd.grad(loss, self._logits)[0]
        rows = min(64, len(self._y))
        want = truth(self._original, self._y)
        part = self._original[:rows].float().requires_grad_()
        want_grad = torch.autograd.grad(truth(part, self._y[:rows]), part)[0] * (rows / len(self._y))
        error = ((loss.double() - want) / want).abs().item()
        grad_error = ((grad[:rows].double() - want_grad).abs().max() / want_grad.abs().max()).item()
        if not (error < 1e-2 and grad_error < 2e-2):
            self.disagreement = f"relative error {error:.1e} of the loss, {grad_error:.1e} of the gradient"


class CopyEntry:
    """The floor: each logit read once and one value written for it."""

    name, disagreement = COPY, ""

    def __init__(self, logits: Tensor) -> None:
        self._source, self._target = logits.detach(), torch.empty_like(logits)

    def prepare(self, work: str, calls: int) -> Run:
        def run() -> None:
            for _ in range(calls):
                self._target.copy_(self._source)

        return run


@contextmanager
def entries(
    here: Device, case: Case, found: Sequence[Contender], ready: set[str]
) -> Iterator[tuple[list[Entry | CopyEntry], LEFT_OUT]]:
    """The contenders that work on this case, each checked and called once in every way, and why the others do not."""
    logits, y = inputs(here, case)
    taking_part: list[Entry | CopyEntry] = [CopyEntry(logits)]
    reasons: LEFT_OUT = {}
    for contender in found:
        if contender.must_be_ready and warmed(case, contender) not in ready:
            reasons[contender.name] = "not compiled in time" if takes_part(case, contender) else "left to other cases"
            continue
        entry = Entry(contender, logits, y)
        try:
            entry.check(plain_truth if contender.kind == "plain" else penalty_truth)
            for work in WORKS:
                entry.prepare(work, 1)()
        except Exception as error:  # whatever a contender cannot do is a result; a broken device raises again below
            reasons[contender.name] = f"{type(error).__name__}: {error}"[:300]
        else:
            taking_part.append(entry)
        here.synchronize()
    yield taking_part, reasons
    taking_part.clear()
    del logits, y
    torch._dynamo.reset()
    gc.collect()
    here.free()


def measure(here: Device, case: Case, taking_part: Sequence[Entry | CopyEntry], seconds: float) -> dict[str, Any]:
    """Median and quartiles per work and contender. The host's time has no meaning where calls last longer."""
    works = [work for work in WORKS if work != "host" or not case.cold]
    result: dict[str, Any] = {}
    for work in works:
        samples = rounds(here, case, work, taking_part, seconds / len(works))
        medians = {name: statistics.median(values) for name, values in samples.items()}
        result[work] = {
            name: {
                **dict(zip(("q1", "median", "q3"), statistics.quantiles(values, n=4, method="inclusive"), strict=True)),
                "samples": len(values),
                **{f"over {base}": medians[name] / medians[base] for base in (PLAIN_BASE, COPY) if base in medians},
            }
            for name, values in samples.items()
        }
    return result


def rounds(
    here: Device, case: Case, work: str, taking_part: Sequence[Entry | CopyEntry], seconds: float
) -> dict[str, list[float]]:
    """Seconds per call, one sample of each contender per round, in rotating order."""
    calls = 1 if case.cold else here.host_calls if work == "host" else here.latency_calls
    samples: dict[str, list[float]] = {entry.name: [] for entry in taking_part}
    end = time.monotonic() + seconds
    gc.collect()
    gc.disable()
    try:
        for i in range(WARM_ROUNDS + here.most_rounds):
            if i >= WARM_ROUNDS + here.least_rounds and time.monotonic() > end:
                break
            start = i % len(taking_part)
            for entry in [*taking_part[start:], *taking_part[:start]]:
                run = entry.prepare(work, calls)
                time_of_all = here.enqueue(run) if work == "host" else here.elapsed(run, cold=case.cold)
                if i >= WARM_ROUNDS:
                    samples[entry.name].append(time_of_all / calls)
    finally:
        gc.enable()
    return samples


def warm_in_processes(options: argparse.Namespace, seconds: float) -> set[str]:
    """Compile everything, case by case in several processes. Returns the (case, contender) that are done in time."""
    workers = max(1, min(8, (os.cpu_count() or 1) // 2)) if options.device == "cuda" else 1
    end = time.monotonic() + seconds
    with tempfile.TemporaryFile("w+") as output:  # one file for all: each line is one write
        command = [
            sys.executable,
            "-m",
            "gpu.bench",
            f"--out={options.out}",
            f"--device={options.device}",
            "--seconds=0",
        ]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for i in range(workers):
                processes.append(subprocess.Popen([*command, f"--warm={i}/{workers}"], stdout=output))
            for process in processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(end - time.monotonic(), 0))
        finally:  # interrupted or not
            for process in processes:
                process.kill()
                process.wait()
        output.seek(0)
        return {line.removeprefix("ready: ") for line in output.read().splitlines() if line.startswith("ready: ")}


def warm(here: Device, case: Case) -> None:
    """Call once, in every way, what compiles; say so per contender."""
    logits, y = inputs(here, case)
    for contender in contenders(here)[0]:
        if contender.compiles and takes_part(case, contender):
            entry = Entry(contender, logits, y)
            try:
                for work in WORKS:
                    entry.prepare(work, 1)()
                here.synchronize()
            except Exception as error:  # told again, and kept, where it is measured
                print(f"{warmed(case, contender)}: {type(error).__name__}", flush=True)
            else:
                sys.stdout.write(f"ready: {warmed(case, contender)}\n")
                sys.stdout.flush()
    torch._dynamo.reset()
    here.free()


def takes_part(case: Case, contender: Contender) -> bool:
    return case.compiled_penalty or contender.kind == "plain" or not contender.must_be_ready


def warmed(case: Case, contender: Contender) -> str:
    return f"{case.name} / {contender.name}"


def inputs(here: Device, case: Case) -> tuple[Tensor, Tensor]:
    """Random normal logits of standard deviation 2, and labels."""
    torch.manual_seed(case.rows + case.classes)
    shape = (case.rows, case.classes)
    logits = torch.randn(shape, device=here.torch, dtype=getattr(torch, case.dtype)).mul_(2).requires_grad_()
    return logits, torch.randint(case.classes, (case.rows,), device=here.torch)


def plain_truth(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), y)


def penalty_truth(logits: Tensor, y: Tensor) -> Tensor:
    return fused_drsl_loss(logits.float(), y, TAU, backend="reference")


if __name__ == "__main__":
    main()
