"""The GPU suite without a GPU: its dry run goes through every stage and writes every file, and says that it is one."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STAGES = ("build", "machine", "test", "sanitize", "bench", "linear", "profile")


@pytest.fixture(scope="module", autouse=True)
def _path() -> None:
    sys.path.append(str(BENCHMARKS))  # the suite is no part of the package


def suite(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "gpu_suite.py", "--out", out, "--dry-run", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "MPLBACKEND": "agg"})


@pytest.mark.slow
def test_a_dry_run(tmp_path: Path) -> None:
    """One run, and one test for all that is asked of it: parallel tests would each have to run it."""
    done = suite(tmp_path)
    log = tmp_path / "suite.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    results = json.loads((tmp_path / "results.json").read_text())
    for check in (
        check_every_stage_ran_and_every_file_is_there,
        check_a_dry_run_says_that_it_is_one,
        check_where_and_with_what_it_ran,
        check_the_gpu_tests_themselves_work,
        check_every_contender_was_measured_and_agrees,
        check_the_linear_losses_were_measured_and_agree,
        check_the_table_comes_last,
    ):
        check(done.stdout, tmp_path, results)


@pytest.mark.slow
def test_a_stage_that_runs_out_of_time_does_not_stop_the_next(tmp_path: Path) -> None:
    done = suite(tmp_path, "--stage", "test,profile", "--budget", "test=0.5")
    stages = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert done.returncode == 1
    assert "time limit" in stages["test"]["failure"]
    assert not stages["profile"]["failure"]


@pytest.mark.parametrize(
    "options", [["--stage", "tests"], ["--stage", ","], ["--budget", "bench=long"], ["--budget", "x=1"]]
)
def test_wrong_options_are_refused(options: list[str], tmp_path: Path) -> None:
    done = suite(tmp_path / "out", *options)
    assert done.returncode == 2
    assert "expected" in done.stderr
    assert not (tmp_path / "out").exists()


def test_results_need_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        done = suite(out)
        assert done.returncode == 2
        assert f"error: --out {out}: " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_suite_writes_what_there_is(which: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "gpu_suite.py", "--out", tmp_path, "--dry-run", "--stage", "bench"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        wait_until(lambda: (tmp_path / "results.json").exists())
        process.send_signal(which)
        printed = process.communicate()[0]
    assert process.returncode == 130
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stages"]["machine"]["failure"] == "interrupted"
    assert results["targets"]
    assert any(line.startswith("target") for line in printed.splitlines())


def test_a_command_that_takes_too_long_is_ended_with_its_children() -> None:
    from gpu.tools import run

    result = run(["sh", "-c", "sleep 60 & echo $!; wait"], seconds=3)
    assert result.failure == "stopped at its time limit"
    wait_until(lambda: has_ended(result.output))


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="this process is told to ignore SIGINT")
def test_an_interrupted_command_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    inner = f"sleep 60 & echo $! > {child}.part; mv {child}.part {child}; wait"
    script = f"from gpu.tools import run; run(['sh', '-c', {inner!r}], seconds=60)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=BENCHMARKS, stderr=subprocess.PIPE) as process:
        wait_until(child.exists)
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode != 0
    wait_until(lambda: has_ended(child.read_text()))


def test_reading_compute_sanitizer() -> None:
    from gpu.tools import parse_sanitizer

    bad = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at rows_kernel+0x1f0
========= ERROR SUMMARY: 12 errors
"""
    assert parse_sanitizer(bad)["errors"] == 12
    assert "Invalid __global__ read of size 4 bytes" in parse_sanitizer(bad)["reports"]
    race = "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
    assert parse_sanitizer(race)["errors"] == 2
    assert parse_sanitizer("========= ERROR SUMMARY: 0 errors\n")["errors"] == 0
    assert parse_sanitizer("the program died\n")["errors"] is None


def test_reading_ncu() -> None:
    from gpu.report import summary_of_kernels
    from gpu.tools import parse_ncu

    kernels = parse_ncu((BENCHMARKS / "gpu" / "samples" / "ncu.txt").read_text())
    assert [kernel["case"] for kernel in kernels] == ["triton 128x10 float32", "cuda 4096x1000 float32"]
    assert kernels[1]["metrics"]["dram__bytes_read.sum"] == 16_384_000
    assert kernels[1]["grid"] == "(512, 1, 1)"
    summary = summary_of_kernels(kernels)
    assert [row["registers"] for row in summary] == [40, 64]
    assert summary[1]["microseconds"] == pytest.approx(12.3205)
    assert summary[1]["gb_per_s"] == pytest.approx(16_384_000 / 12_320.5)
    assert parse_ncu("==ERROR== no permission\n") == []


def test_reading_junit() -> None:
    from gpu.tools import parse_junit

    found = parse_junit(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="no"/></testcase>'
        '<testcase name="c"><skipped message="why"/></testcase><testcase name="d"><error message="x"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert [t["message"] for t in found["tests"]] == ["", "no", "why", "x"]


def test_targets_are_held_against_the_worst_case() -> None:
    from gpu.report import targets

    def case(rows: int, copy: float, peer: float, **more: Any) -> dict[str, Any]:
        seconds = {"drsl": 1.0, "drsl plain": 1.0, "copy": copy, "F.cross_entropy": 4.0, "liger": peer}
        times = {
            name: {"median": s, "over copy": s / copy, "over F.cross_entropy": s / 4.0} for name, s in seconds.items()
        }
        facts = {"regime": "bandwidth", "rows": rows, "classes": 10, "dtype": "float32", "name": f"{rows}x10 float32"}
        return {**facts, "works": {"forward+backward": times}, "disagrees": {}, **more}

    def target(cases: list[dict[str, Any]], name: str) -> dict[str, Any]:
        return next(row for row in targets({"bench": {"cases": cases}}) if row["target"].startswith(name))

    row = target([case(1, 0.9, 2.0), case(2, 0.5, 2.0)], "float32, large: over the copy")
    assert (row["default"], row["default at"], row["met"]) == (2.0, "2x10 float32", False)
    assert target([case(1, 0.9, 2.0)], "float32, large: over the copy")["met"] is True
    assert target([case(1, 0.9, 0.5)], "float32, large, plain")["met"] is False
    assert target([case(1, 0.9, 0.5, disagrees={"liger": "wrong"})], "float32, large, plain")["met"] is True
    assert target([case(1, 0.9, 2.0)], "bfloat16, large: over")["met"] is None
    counts = {"drsl": 2, "F.cross_entropy": 2}
    assert target([case(1, 1, 1, regime="latency", launches=counts)], "launches")["met"] is False
    tests = [{"name": "test_cuda_graph[triton-few]", "outcome": "passed", "message": ""}]
    assert [r["met"] for r in targets({"test": {"tests": tests}}) if "graph" in r["target"]] == [True]
    tests.append({"name": "test_cuda_graph[cuda-few]", "outcome": "skipped", "message": ""})
    assert [r["met"] for r in targets({"test": {"tests": tests}}) if "graph" in r["target"]] == [False]


def test_targets_of_linear_losses() -> None:
    from gpu.report import targets

    def case(classes: int, ours: float, peak: int | None, **more: Any) -> dict[str, Any]:
        seconds = {"whole logits": 2.0, "drsl": ours, "drsl plain": ours, "liger": 1.5, "F.cross_entropy": 0.1}
        times = {name: {"median": s, "over whole logits": s / 2.0} for name, s in seconds.items()}
        peaks = {"whole logits": 100, "drsl": peak}
        return {"name": str(classes), "classes": classes, "times": times, "peak_bytes": peaks, "disagrees": {}, **more}

    def target(cases: list[dict[str, Any]], name: str) -> dict[str, Any]:
        return next(row for row in targets({"linear": {"cases": cases}}) if row["target"].startswith(name))

    row = target([case(10, 1.0, 99), case(128256, 2.4, 50)], "linear: time")
    assert (row["default"], row["default at"], row["met"]) == (1.2, "128256", False)
    peer = "linear, plain: time over the fastest peer"
    assert target([case(10, 1.4, 99)], peer)["met"] is True
    assert target([case(10, 1.6, 99)], peer)["met"] is False
    assert target([case(10, 1.6, 99, disagrees={"liger": "wrong"})], peer)["met"] is None
    memory = "linear, large: memory over whole logits"
    assert target([case(10, 1.0, 99), case(128256, 1.0, 50)], memory)["met"] is True
    assert target([case(128256, 1.0, 70)], memory)["met"] is False
    assert target([case(10, 1.0, 50), case(128256, 1.0, None)], memory)["met"] is None


def check_every_stage_ran_and_every_file_is_there(printed: str, out: Path, results: dict[str, Any]) -> None:
    assert set(results["stages"]) == set(STAGES)
    assert not any(stage["failure"] for stage in results["stages"].values())
    files = {path.name for path in out.iterdir()}
    written = {"results.json", "results.csv", "linear.csv", "latency.png", "bandwidth.png", "suite.log", "ncu.txt"}
    assert files == written


def check_a_dry_run_says_that_it_is_one(printed: str, out: Path, results: dict[str, Any]) -> None:
    assert results["dry_run"] is True
    assert "mean nothing" in results["about"]
    assert "mean nothing" in printed
    assert all(row["dry_run"] == "True" for row in table(out))
    assert results["machine"]["gpu"] is None


def check_where_and_with_what_it_ran(printed: str, out: Path, results: dict[str, Any]) -> None:
    assert {"python", "torch", "triton", "nvcc", "commit", "sources"} <= set(results["versions"])
    assert {b["name"] for b in results["backends"]} == {"cpp", "triton", "cuda", "reference"}
    assert results["date"].startswith("20")


def check_the_gpu_tests_themselves_work(printed: str, out: Path, results: dict[str, Any]) -> None:
    """Their bodies ran on the CPU, on two cases of each."""
    assert results["test"]["failed"] == 0
    assert results["test"]["passed"] > 40


def check_every_contender_was_measured_and_agrees(printed: str, out: Path, results: dict[str, Any]) -> None:
    here = {"copy", "F.cross_entropy", "reference", "drsl", "drsl plain", "drsl triton", "drsl triton plain"}
    for case in results["bench"]["cases"]:
        works = ["forward", "backward", "forward+backward", *(["host"] if case["regime"] == "latency" else [])]
        assert list(case["works"]) == works
        assert not case["disagrees"]
        for times in case["works"].values():
            assert here <= set(times)
            assert all(0 < t["q1"] <= t["median"] <= t["q3"] for t in times.values())
            assert times["F.cross_entropy"]["over F.cross_entropy"] == 1
            assert times["copy"]["over copy"] == 1
        assert set(case["left_out"]) >= {"drsl cuda", "drsl cuda plain"}
    assert {"liger", "quack", "cut-cross-entropy"} == set(results["bench"]["left_out"])
    counted = [case["launches"] for case in results["bench"]["cases"] if "launches" in case]
    assert counted
    assert all(counts["F.cross_entropy"] > 0 for counts in counted)
    rows = table(out)
    measured = [t for case in results["bench"]["cases"] for times in case["works"].values() for t in times]
    assert [row["contender"] for row in rows] == measured


def check_the_linear_losses_were_measured_and_agree(printed: str, out: Path, results: dict[str, Any]) -> None:
    linear = results["linear"]
    for case in linear["cases"]:
        assert {"whole logits", "F.cross_entropy", "drsl", "drsl plain", "drsl triton plain"} <= set(case["times"])
        assert not case["disagrees"]
        assert all(0 < t["q1"] <= t["median"] <= t["q3"] for t in case["times"].values())
        assert case["times"]["whole logits"]["over whole logits"] == 1
        assert set(case["left_out"]) == {"drsl cuda", "drsl cuda plain"}
    assert {"liger", "cut-cross-entropy"} <= set(linear["left_out"])
    rows = table(out, "linear.csv")
    assert [row["contender"] for row in rows] == [name for case in linear["cases"] for name in case["times"]]
    assert all(row["dry_run"] == "True" for row in rows)


def check_the_table_comes_last(printed: str, out: Path, results: dict[str, Any]) -> None:
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("target"))
    assert len(lines) - start - 1 == len(results["targets"])
    assert not any("met" in line.lower().split() for line in lines[start + 1 :])  # a dry run meets and misses nothing


def has_ended(pid: str) -> bool:
    status = Path("/proc", pid.strip(), "stat")
    return not status.exists() or status.read_text().split()[2] == "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def table(out: Path, name: str = "results.csv") -> list[dict[str, str]]:
    with (out / name).open() as file:
        return list(csv.DictReader(file))
