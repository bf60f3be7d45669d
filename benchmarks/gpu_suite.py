"""Everything that needs a GPU, by one command: `python benchmarks/gpu_suite.py --out DIR`.

Needs Python with torch, triton, pytest and what the build needs (setuptools, cmake, ninja, pybind11), nvcc, and no
network. Stages, each in processes of its own and within its time:

    build      the package in place, with its CUDA kernels
    test       pytest, the tests marked `gpu`, on both GPU backends
    sanitize   compute-sanitizer's memcheck and racecheck over small and awkward inputs
    bench      speed against PyTorch, torch.compile and the peers that are installed, and against a plain copy
    linear     time and peak memory of a language model's head: the fused linear loss, whole logits, and the peers
    profile    ncu on one call per backend and size

A stage that fails or runs out of time is reported, and the next ones run. DIR gets results.json (kept up to date while
the suite runs), results.csv, linear.csv, a picture per regime, suite.log and what ncu printed; the targets come last on
standard output. The exit status is 1 if a stage failed, and 130 if Ctrl-C or SIGTERM ended the suite, which still
writes and prints what there is. `--dry-run` does all of it on the CPU: tiny sizes, Triton's interpreter, recorded
output of the tools that need a GPU. Its figures mean nothing and say so.

Relies on the modules of benchmarks/gpu/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import report, store
from gpu.tools import ROOT, Result, find_tool, parse_junit, parse_ncu, parse_sanitizer, run_together

BENCHMARKS = Path(__file__).parent
SAMPLES = BENCHMARKS / "gpu" / "samples"
BUDGETS = {"build": 120, "test": 120, "sanitize": 60, "bench": 180, "linear": 60, "profile": 40}  # seconds
DRY_BUDGETS = dict.fromkeys(BUDGETS, 600)  # never reached: what a dry run does is little, and no test depends on time
TEST_PROCESSES = 14
SANITIZE_PARTS = 5  # processes per tool; no divisor of the number of dtypes times backends, so that each gets of all
SANITIZERS = ("memcheck", "racecheck")
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)


@dataclass(frozen=True)
class Suite:
    """What every stage needs to know."""

    out: Path
    dry_run: bool
    budgets: dict[str, float]
    end: float  # of the whole, on time.monotonic()'s clock

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    def run(self, command: list[str | Path], seconds: float, **env: str) -> Result:
        """Run a command with the package and this folder on Python's path; its output goes into the log."""
        return self.run_together([command], seconds, **env)[0]

    def run_together(self, commands: list[list[str | Path]], seconds: float, **env: str) -> list[Result]:
        """The same for commands at the same time."""
        path = os.pathsep.join([str(ROOT), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
        env |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "KINETO_LOG_LEVEL": "99"}
        env |= {"TRITON_INTERPRET": "1" if self.dry_run else "0"}
        if self.dry_run:
            env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        results = run_together(commands, seconds=min(seconds, self.end - time.monotonic()), env=env)
        with (self.out / "suite.log").open("a") as log:
            for command, result in zip(commands, results, strict=True):
                log.write(f"$ {' '.join(map(str, command))}\n{result.output}\n[{result.failure or 'done'}]\n\n")
        return results

    def module(self, name: str, *options: str | Path) -> list[str | Path]:
        return [sys.executable, "-m", f"gpu.{name}", *options]


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: the reason why it failed, what it found out, what could not be done here."""

    failure: str = ""
    found: dict[str, Any] | None = None
    note: str = ""


def main() -> None:
    """Run the stages, write the results, print the targets."""
    options = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, as Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job is born ignoring
    budgets = {**(DRY_BUDGETS if options.dry_run else BUDGETS), **dict(options.budget)}
    suite = Suite(options.out.resolve(), options.dry_run, budgets, time.monotonic() + sum(budgets.values()))
    for old in (store.NAME, "suite.log"):
        (suite.out / old).unlink(missing_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about = report.DRY_RUN if suite.dry_run else "medians and quartiles in seconds"
    store.update(suite.out, about=about, dry_run=suite.dry_run, date=now, stages={})

    stages: dict[str, Any] = {}
    interrupted = False
    for name in ("build", "machine", *BUDGETS):
        if name in stages or name not in ("machine", *options.stage):
            continue
        begin = time.monotonic()
        try:
            outcome = STAGES[name](suite)
        except KeyboardInterrupt:
            interrupted = True
            outcome = Outcome("interrupted")
        seconds = round(time.monotonic() - begin, 1)
        stages[name] = {"failure": outcome.failure, "note": outcome.note, "seconds": seconds}
        store.update(suite.out, stages=stages, **(outcome.found or {}))
        print(f"{name:<9} {seconds:6.1f} s  {outcome.failure or 'ok'}  {outcome.note}".rstrip(), flush=True)
        if interrupted:
            break
    finish(suite, options.commit)
    sys.exit(130 if interrupted else any(stage["failure"] for stage in stages.values()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--stage", type=stage_names, default=list(BUDGETS), help="some of the stages, with commas")
    parser.add_argument(
        "--budget", type=budget, action="append", default=[], metavar="STAGE=SECONDS", help="time of a stage"
    )
    parser.add_argument("--commit", help="the project's commit, where the sources are here without git")
    parser.add_argument("--dry-run", action="store_true", help="all of it on the CPU; the figures mean nothing")
    options = parser.parse_args()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: no folder can be made there: {error.strerror}")
    if not os.access(options.out, os.W_OK | os.X_OK):
        parser.error(f"--out {options.out}: the folder is not writable")
    return options


def stage_names(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(BUDGETS):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {','.join(BUDGETS)}")
    return names


def budget(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    if name not in BUDGETS or not seconds.replace(".", "", 1).isdigit():
        raise argparse.ArgumentTypeError(f"{text}: expected STAGE=SECONDS, STAGE one of {', '.join(BUDGETS)}")
    return name, float(seconds)


def finish(suite: Suite, commit: str | None) -> None:
    """The targets into results.json, the CSV, the pictures, and the table on standard output."""
    results = store.read(suite.out)
    rows = report.targets(results)
    versions = results.get("versions", {}) | ({"commit": commit} if commit else {})
    results = store.update(suite.out, targets=rows, versions=versions)
    report.write_csv(results, suite.out / "results.csv")
    report.write_linear_csv(results, suite.out / "linear.csv")
    drawn = report.draw(results, suite.out)
    if not drawn:
        print("no pictures: matplotlib is not installed, or nothing was measured")
    if suite.dry_run:
        print(report.DRY_RUN)
    print(report.table(rows, suite.dry_run))


def build(suite: Suite) -> Outcome:
    """Install in place without a network. A dry run says what it would do."""
    tools = {name: str(find_tool(name) or "") for name in ("nvcc", "g++", "cmake", "ninja", "compute-sanitizer", "ncu")}
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-e",
        str(ROOT),
    ]
    found = {"build": {"command": command, "tools": tools}}
    if suite.dry_run:
        return Outcome(found=found, note="a dry run builds nothing")
    result = suite.run(list(command), suite.budgets["build"], DRSL_KERNELS_BUILD="1", PIP_BREAK_SYSTEM_PACKAGES="1")
    return Outcome(result.failure and f"{result.failure}: {last_line(result)}", found)


def machine(suite: Suite) -> Outcome:
    """Where and with what all this runs; both GPU backends have to be usable."""
    result = suite.run(suite.module("machine"), 60)
    if result.failure:
        return Outcome(f"{result.failure}: {last_line(result)}")
    facts = json.loads(next(line for line in result.output.splitlines() if line.startswith("{")))
    gpu_backends = [b for b in facts["backends"] if b["name"] in ("triton", "cuda")]
    unusable = "; ".join(f"{b['name']}: {b['detail']}" for b in gpu_backends if not b["usable"])
    return Outcome("" if suite.dry_run else unusable, facts, unusable if suite.dry_run else "")


def test(suite: Suite) -> Outcome:
    """pytest over tests/gpu; on the CPU, the same tests on small inputs."""
    junit = suite.out / "junit.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", f"--junitxml={junit}"]
    command += ["--on-cpu", "--one-each"] if suite.dry_run else ["--require-backends", *in_parallel()]
    result = suite.run(list(command), suite.budgets["test"])
    if not junit.exists():
        return Outcome(f"{result.failure}: {last_line(result)}")
    found = parse_junit(junit.read_text())
    junit.unlink()
    note = f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
    return Outcome(result.failure, {"test": found}, note)


def in_parallel() -> list[str]:
    """Kernels are compiled at their first call, by the host: several processes share that."""
    there = subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True, check=False).returncode == 0
    processes = max(1, min(TEST_PROCESSES, (os.cpu_count() or 1) - 2))
    return ["-n", str(processes), "--dist", "worksteal"] if there else []


def sanitize(suite: Suite) -> Outcome:
    """Both tools at once, several processes each: they need most of their time for starting and compiling."""
    tool = find_tool("compute-sanitizer")
    if tool is None and not suite.dry_run:
        return Outcome(note="no compute-sanitizer here")
    seconds = suite.budgets["sanitize"]
    program = suite.module("exercise", "--mode=sanitize", f"--device={suite.device}", f"--seconds={0.6 * seconds}")

    def command(name: str, part: int) -> list[str | Path]:
        options: list[str | Path] = [str(tool), "--tool", name, "--report-api-errors", "no", "--print-limit", "10"]
        return [*options, *program, f"--part={part}/{SANITIZE_PARTS}"]

    if suite.dry_run:
        result = suite.run(program, seconds)
        if result.failure:
            return Outcome(f"{result.failure}: {last_line(result)}")
        jobs = [(name, 0) for name in SANITIZERS]
        results = [Result(0, (SAMPLES / f"{name}.txt").read_text()) for name in SANITIZERS]
    else:
        jobs = [(name, part) for name in SANITIZERS for part in range(SANITIZE_PARTS)]
        # Without caching, each tensor is an allocation of its own, whose ends the tool knows.
        commands = [command(*job) for job in jobs]
        results = suite.run_together(commands, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    found = [
        {"tool": name, "part": part, **parse_sanitizer(r.output), "failure": r.failure, "done": exercised(r)}
        for (name, part), r in zip(jobs, results, strict=True)
    ]
    bad = [f for f in found if f["failure"] or f["errors"] != 0]
    failure = "; ".join(f"{f['tool']} {f['part']}: {f['failure'] or f['errors']}" for f in bad)
    note = "; ".join(f"{f['tool']} {f['errors']} errors in {f['done']}" for f in found)
    if suite.dry_run:
        note = f"no tool ran: {exercised(result)}; recorded output of {' and '.join(SANITIZERS)} was read"
    return Outcome(failure, {"sanitize": found, "recorded": suite.dry_run}, note)


def bench(suite: Suite) -> Outcome:
    """The benchmark ends by itself before its time is over, and keeps each case as it goes."""
    seconds = suite.budgets["bench"]
    options = ["--out", suite.out, "--device", suite.device, "--seconds", str(0.9 * seconds - 10)]
    # Its processes compile side by side already.
    result = suite.run(suite.module("bench", *options), seconds, TORCHINDUCTOR_COMPILE_THREADS="1")
    cases = store.read(suite.out).get("bench", {}).get("cases", [])
    measured = sum("works" in case for case in cases)
    note = f"{measured} of {len(cases)} cases measured"
    failure = result.failure and f"{result.failure}: {last_line(result)}"
    return Outcome(failure or ("" if measured else "nothing was measured"), note=note)


def linear(suite: Suite) -> Outcome:
    """The benchmark ends by itself before its time is over, and keeps each case as it goes."""
    seconds = suite.budgets["linear"]
    options = ["--out", suite.out, "--device", suite.device, "--seconds", str(0.8 * seconds - 5)]
    result = suite.run(suite.module("linear", *options), seconds)
    cases = store.read(suite.out).get("linear", {}).get("cases", [])
    measured = sum("times" in case for case in cases)
    note = f"{measured} of {len(cases)} vocabularies measured"
    failure = result.failure and f"{result.failure}: {last_line(result)}"
    return Outcome(failure or ("" if measured else "nothing was measured"), note=note)


def profile(suite: Suite) -> Outcome:
    """ncu on the calls that gpu/exercise.py announces."""
    tool = find_tool("ncu")
    if tool is None and not suite.dry_run:
        return Outcome(note="no ncu here")
    seconds = suite.budgets["profile"]
    program = suite.module("exercise", "--mode", "profile", "--device", suite.device, "--seconds", str(0.5 * seconds))
    options = ["--csv", "--print-units", "base", "--profile-from-start", "off", "--clock-control", "none"]
    command = [str(tool), *options, "--metrics", ",".join(METRICS)]
    result = suite.run(program if suite.dry_run else [*command, *program], seconds)
    if suite.dry_run and not result.failure:
        result = Result(0, (SAMPLES / "ncu.txt").read_text())
    (suite.out / "ncu.txt").write_text(result.output)
    kernels = parse_ncu(result.output)
    failure = result.failure or ("" if kernels else "ncu reported no kernels")
    summary = report.summary_of_kernels(kernels)
    found = {"profile": {"kernels": kernels, "summary": summary, "recorded": suite.dry_run}}
    note = f"{len(kernels)} kernels{' in recorded output of ncu, which did not run' if suite.dry_run else ''}"
    return Outcome(failure and f"{failure}: {last_line(result)}", found, note)


STAGES: dict[str, Callable[[Suite], Outcome]] = {
    "build": build,
    "machine": machine,
    "test": test,
    "sanitize": sanitize,
    "bench": bench,
    "linear": linear,
    "profile": profile,
}


def last_line(result: Result) -> str:
    lines = [line for line in result.output.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "no output"


def exercised(result: Result) -> str:
    lines = [line for line in result.output.splitlines() if line.startswith("exercise: ")]
    return lines[-1].removeprefix("exercise: ") if lines else "what did not finish"


if __name__ == "__main__":
    main()
