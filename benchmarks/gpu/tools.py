"""Other programs: finding them, running them within a time limit, and reading what they print.

Relies on nothing outside of Python; `gpu_suite` and `machine` rely on it.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
GRACE = 5  # seconds


@dataclass(frozen=True)
class Result:
    """What became of a command."""

    status: int | None  # None: stopped at the time limit
    output: str  # standard output and error together, in order

    @property
    def failure(self) -> str:
        """In words; empty if it went well."""
        if self.status is None:
            return "stopped at its time limit"
        return f"exit status {self.status}" if self.status else ""


def run(command: Sequence[str | Path], *, seconds: float, env: dict[str, str] | None = None) -> Result:
    """Run a command, and end it with all of its children when the time is over: first as by Ctrl-C, so that it can
    write what it has, after some seconds by force. The same when this process is interrupted meanwhile.
    """
    return run_together([command], seconds=seconds, env=env)[0]


def run_together(
    commands: Sequence[Sequence[str | Path]], *, seconds: float, env: dict[str, str] | None = None
) -> list[Result]:
    """Run commands at the same time, each as `run` does."""
    end = time.monotonic() + seconds
    processes: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as files:
        outputs = [files.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in commands]
        try:
            processes.extend(_start(command, output, env) for command, output in zip(commands, outputs, strict=True))
            statuses = [_wait(process, end) for process in processes]
        finally:
            _end([process for process in processes if process.poll() is None])
        for output in outputs:
            output.seek(0)
        return [Result(status, output.read()) for status, output in zip(statuses, outputs, strict=True)]


def _start(command: Sequence[str | Path], output: IO[str], env: dict[str, str] | None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # its own process group, which is what is ended
        text=True,
    )


def _wait(process: subprocess.Popen[str], end: float) -> int | None:
    """The exit status; None if the process has not ended by then."""
    try:
        return process.wait(max(end - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return None


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    try:
        for process in processes:
            _signal(process, signal.SIGINT)
        end = time.monotonic() + GRACE
        for process in processes:
            _wait(process, end)
    finally:  # at once when interrupted again
        for process in processes:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen[str], which: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # none of the group is left
        os.killpg(process.pid, which)


def find_tool(name: str) -> Path | None:
    """A program on PATH, beside this Python, or where CUDA's installers put it."""
    on_path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"), Path("/usr/local/cuda/bin")]
    homes += sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    found = [Path(on_path)] if on_path else [home / name for home in homes if (home / name).is_file()]
    return found[0] if found else None


def output_of(*command: str) -> str:
    """Standard output of a short command; empty if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def parse_junit(text: str) -> dict[str, Any]:
    """What pytest's --junitxml says: counts, and per test its outcome and message."""
    tests = []
    for case in ET.fromstring(text).iter("testcase"):
        outcome, message = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                lines = (child.text or "").strip().splitlines()
                message = child.get("message") or (lines[-1] if lines else "")
                if message == "collection failure":
                    message = f"{message}: {lines[-1]}"
        tests.append({"name": case.get("name", ""), "outcome": outcome, "message": message[:500]})
    counts = {kind: sum(t["outcome"] == kind for t in tests) for kind in ("passed", "failed", "skipped")}
    return {**counts, "tests": tests}


def parse_sanitizer(text: str) -> dict[str, Any]:
    """The number of errors (None without a summary) and the first lines of what compute-sanitizer says."""
    lines = [line[9:].strip() for line in text.splitlines() if line.startswith("=========")]
    memory = [re.fullmatch(r"ERROR SUMMARY: (\d+) errors?", line) for line in lines]
    race = [re.fullmatch(r"RACECHECK SUMMARY: (\d+) hazards? displayed \(.*\)", line) for line in lines]
    counts = [int(match[1]) for match in memory + race if match]
    return {"errors": max(counts) if counts else None, "reports": [line for line in lines if line][:40]}


def parse_ncu(text: str) -> list[dict[str, Any]]:
    """Kernels with their metrics from the output of `ncu --csv --print-units base`.

    That is one line per kernel and metric, below a header that starts with "ID", after the output of the program
    and lines like `==PROF== Profiling "name" - 0 (1/3): ...`. A line `case: ...` of the program names the case of
    the kernels that follow.
    """
    lines = text.splitlines()
    cases: dict[str, str] = {}
    case = ""
    for line in lines:
        if line.startswith("case: "):
            case = line.removeprefix("case: ")
        profiled = re.match(r'==PROF== Profiling ".*" - (\d+)', line)
        if profiled:
            cases[profiled[1]] = case
    starts = [i for i, line in enumerate(lines) if line.startswith('"ID",')]
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in lines[starts[0] :] if line.startswith('"')) if starts else []:
        facts = {"case": cases.get(row["ID"], ""), "kernel": row["Kernel Name"]}
        facts |= {key: row[name] for key, name in (("block", "Block Size"), ("grid", "Grid Size")) if row.get(name)}
        metrics = kernels.setdefault(row["ID"], {**facts, "metrics": {}})["metrics"]
        metrics[row["Metric Name"]] = _number(row["Metric Value"])
    return list(kernels.values())


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text
