"""Training of language models: interrupted, killed and resumed runs, several processes, losses that are not finite."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drsl_kernels.robustness.checkpoint import save_checkpoint
from drsl_kernels.robustness.distributed import World
from drsl_kernels.robustness.lm import ByteTokens, LanguageLoss, Text, load_corpus, load_language_model
from drsl_kernels.robustness.lm.corpus import Corpus
from drsl_kernels.robustness.lm.engine import _Training, train_language_model
from drsl_kernels.robustness.lm.run_folder import read_last
from drsl_kernels.robustness.lm.settings import LanguageSettings

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = LanguageSettings(
    loss=LanguageLoss("conditional", 0.3),
    context=8,
    layers=1,
    heads=2,
    width=8,
    steps=13,
    batch_size=5,
    evaluate_every=4,
    validation_windows=6,
)
LINES = "".join(f"{i} times {i} is {i * i}\n" for i in range(400)).encode()


def corpus() -> Corpus:
    return load_corpus(Text.of(LINES, "squares"), ByteTokens(), context=8)


class StopError(Exception):
    pass


class StopAt:
    """Interrupts a run after so many steps that this process makes."""

    def __init__(self, steps: float = float("inf"), done: int = 0) -> None:
        self.left = steps + done

    def step(self, doing: str) -> None:
        self.left -= 1
        if not self.left:
            raise StopError

    def begin_run(self, label: str, steps: int) -> None: ...
    def end_run(self) -> None: ...
    def begin_timing(self) -> None: ...
    def note(self, text: str) -> None: ...


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a if name != "seconds")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    """Weights, optimizer, sums, metrics: all but the seconds, bit for bit."""
    for name in ("last.pt", "best.pt"):
        found, expected = (torch.load(place / name, weights_only=True) for place in (folder, undisturbed))
        assert equal(found, expected), name
    assert metrics(folder) == metrics(undisturbed)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train_language_model(TINY, corpus(), folder, StopAt(), checkpoint_seconds=1e9)
    return folder


def test_a_run(undisturbed: Path) -> None:
    rows = metrics(undisturbed)
    assert [row["step"] for row in rows] == ["4", "8", "12", "13"]
    assert float(rows[-1]["validation_perplexity"]) < 0.95 * float(rows[0]["validation_perplexity"])
    best = min(rows, key=lambda row: float(row["validation_bits_per_byte"]))
    loaded = load_language_model(undisturbed / "best.pt")
    assert loaded.about["step"] == int(best["step"])
    assert loaded.about["loss"] == {"name": "conditional", "tau": 0.3}
    assert loaded.model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 256)
    assert not loaded.model.training
    again = train_language_model(TINY, corpus(), undisturbed, StopAt())
    assert again.was_finished
    assert again.best.step == int(best["step"])


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["checkpoints after every step", "none but at the end"])
def test_interrupted_again_and_again(tmp_path: Path, undisturbed: Path, seconds: float) -> None:
    interruptions = 0
    for _ in range(20):
        torch.rand(interruptions)  # whatever the global random state is by then
        done = read_last(tmp_path)["state"]["step"] if (tmp_path / "last.pt").exists() else 0
        # Without checkpoints only the last attempt gets through.
        stop = StopAt(4 if seconds == 0 else 9 + interruptions, done)
        try:
            train_language_model(TINY, corpus(), tmp_path, stop, checkpoint_seconds=seconds)
            break
        except StopError:
            interruptions += 1
    assert interruptions >= 3
    assert_same_run(tmp_path, undisturbed)


def killed_after(calls: int, folder: Path) -> None:
    """Train, and kill this process with SIGKILL at a call of a Python or C function, whichever it is."""
    left = calls

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    read = corpus()
    sys.setprofile(count)
    train_language_model(TINY, read, folder, StopAt(), checkpoint_seconds=0.0)
    sys.setprofile(None)
    (folder / "calls").write_text(str(calls - left))


def in_a_process(calls: int, folder: Path) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["drsl_kernels.robustness.lm.engine", __name__])
    process = context.Process(target=killed_after, args=(calls, folder))
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path, undisturbed: Path) -> None:
    """In a step, between two files, inside of a write: wherever a function is called."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    never = 10**12
    assert in_a_process(never, whole) == 0
    calls = int((whole / "calls").read_text())
    moments = random.Random(20230312)
    for _ in range(4):
        assert in_a_process(moments.randrange(1, calls // 2), killed) in (-signal.SIGKILL, 0)
    assert in_a_process(never, killed) == 0
    for folder in (whole, killed):
        assert_same_run(folder, undisturbed)
    assert not list(killed.glob(".unfinished-*"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


RUN = Path("runs") / "uniform-tau1-seed0"


def options(folder: Path, *more: str) -> list[str]:
    return [
        *("lm", "--text", str(folder / "text"), "--losses", "drsl", "--tau", "uniform=1", "--context", "8"),
        *("--layers", "2", "--heads", "2", "--width", "8", "--steps", "6", "--batch-size", "5", "--threads", "1"),
        *("--evaluate-every", "3", "--validation-windows", "7", "--sequences", "2", "--attack-steps", "1"),
        *("--restarts", "1", "--substitutions", "1", "--candidates", "2", "--clip-norm", "0.5", *more),
    ]


def one_of_two(rank: int, folder: Path, ports: dict[str, tuple[int, int]]) -> None:
    """What torchrun starts: the command itself, with each way to share the weights, interrupted once."""
    from drsl_kernels.robustness.command_parts import ProgressBars
    from drsl_kernels.robustness.commands import drsl
    from drsl_kernels.robustness.lm import command as module

    torch.set_num_threads(1)
    module.draw_pictures = module.write_pages = lambda *_: None  # type: ignore[assignment]  # they take long
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for sharding, (first, second) in ports.items():
        command = options(folder, "--sharding", sharding, "--out", str(folder / sharding))
        stop, os.environ["MASTER_PORT"] = StopAt(5), str(first)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ProgressBars, "step", lambda _, doing, stop=stop: stop.step(doing))
            with pytest.raises(StopError):
                drsl.main(command, standalone_mode=False)
        assert read_last(folder / sharding / RUN)["state"]["step"] == 3
        os.environ["MASTER_PORT"] = str(second)
        drsl.main(command, standalone_mode=False)
        (folder / f"{sharding}-{rank}").touch()


@pytest.mark.slow
def test_two_processes_are_as_one_with_the_joint_batch(tmp_path: Path) -> None:
    """Batches of 5 in parts of 3 and 2, clipped by the joint gradient, whole weights and sharded ones."""
    from click.testing import CliRunner  # here, as processes that are killed import this file, too

    from drsl_kernels.robustness.commands import drsl

    (tmp_path / "text").write_bytes(LINES)
    ports = {name: (free_port(), free_port()) for name in ("none", "fsdp")}
    done = [tmp_path / f"{name}-{rank}" for name in ports for rank in range(2)]
    processes = torch.multiprocessing.spawn(one_of_two, (tmp_path, ports), nprocs=2, join=False, start_method="spawn")
    alone = CliRunner().invoke(drsl, options(tmp_path, "--out", str(tmp_path / "one")))
    assert alone.exit_code == 0, alone.output
    # Not waited for: gloo may deadlock a process that ends (pytorch issue 190489).
    for _ in range(600):
        if all(file.exists() for file in done) or processes.join(timeout=0.1):
            break
        time.sleep(0.1)
    for process in processes.processes:
        process.terminate()
    one = read_last(tmp_path / "one" / RUN)
    for name in ports:
        two = read_last(tmp_path / name / RUN)
        assert two["model"].keys() == one["model"].keys()
        for weight, value in one["model"].items():
            torch.testing.assert_close(two["model"][weight], value, rtol=1e-4, atol=2e-6)
        for row, expected in zip(two["state"]["rows"], one["state"]["rows"], strict=True):
            assert {**row, "seconds": 0} == pytest.approx({**expected, "seconds": 0}, rel=1e-4)
        assert (tmp_path / name / "results.json").exists()
        moved = load_language_model(tmp_path / name / RUN / "best.pt").model
        assert moved.embedding.weight.shape == (256, 8)
    again = CliRunner().invoke(drsl, options(tmp_path, "--out", str(tmp_path / "none")))
    assert "processes was 2 and is now 1" in again.output


@pytest.mark.parametrize("look", [20, 2])
def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path, look: int
) -> None:
    monkeypatch.setattr("drsl_kernels.robustness.lm.engine._LOOK_EVERY", look)
    with pytest.raises(StopError):
        train_language_model(TINY, corpus(), tmp_path, StopAt(5), checkpoint_seconds=0.0)
    before = (tmp_path / "last.pt").read_bytes()
    forward = torch.nn.functional.gelu
    steps = 0

    def broken(x: Tensor) -> Tensor:
        nonlocal steps
        steps += torch.is_grad_enabled()
        return forward(x) * (float("nan") if steps == 3 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "gelu", broken)
        with pytest.raises(FloatingPointError, match=r"training with conditional tau=0\.3: in step 7 the loss is nan"):
            train_language_model(TINY, corpus(), tmp_path, StopAt(), checkpoint_seconds=1e9)
    assert (tmp_path / "last.pt").read_bytes() == before
    train_language_model(TINY, corpus(), tmp_path, StopAt())
    assert_same_run(tmp_path, undisturbed)


class TestFolder:
    def test_of_another_run(self, undisturbed: Path) -> None:
        with pytest.raises(ValueError, match=r"learning_rate was 0\.002 and is now 0\.1"):
            train_language_model(replace(TINY, learning_rate=0.1), corpus(), undisturbed, StopAt())
        other = load_corpus(Text.of(LINES + b"more\n", "squares"), ByteTokens(), context=8)
        with pytest.raises(ValueError, match="text was"):
            train_language_model(TINY, other, undisturbed, StopAt())
        # Where the text lies, and what bytes do not use, is the same run.
        train_language_model(replace(TINY, text="elsewhere", vocabulary=500), corpus(), undisturbed, StopAt())

    def test_of_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "settings.json").write_text("{}")
        with pytest.raises(ValueError, match="does not hold the settings of a run of drsl lm"):
            train_language_model(TINY, corpus(), tmp_path, StopAt())
        (tmp_path / "other.pt").write_bytes(b"text")
        with pytest.raises(ValueError, match=r"other\.pt is no checkpoint of drsl lm"):
            load_language_model(tmp_path / "other.pt")

    @pytest.mark.parametrize("lost", ["optimizer", "step", "seen"])
    def test_of_a_state_that_lacks_something(self, tmp_path: Path, undisturbed: Path, lost: str) -> None:
        shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
        content = read_last(tmp_path)
        del content["state"][lost]
        save_checkpoint(tmp_path / "last.pt", content)
        message = f"no state that this training could go on from, KeyError: '{lost}': train anew"
        with pytest.raises(ValueError, match=message):
            train_language_model(TINY, corpus(), tmp_path, StopAt())

    def test_settings_are_read_back(self) -> None:
        assert LanguageSettings.from_json(TINY.as_json()) == TINY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"warmup": 2.0}, "warmup must be from 0 to 1"),
        ({"sharding": "all"}, "sharding must be one of none, fsdp, got 'all'"),
        ({"vocabulary": 10}, "vocabulary must be 256 or more"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_several_processes_do_not_ask_the_clock(tmp_path: Path) -> None:
    """Each has its own, and they have to write together."""
    for world, due in ((World(), True), (World(0, 2), False)):
        assert _Training(TINY, corpus(), tmp_path, StopAt(), world, 0.0)._is_time() == due


def test_more_processes_than_windows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least the number of processes, 6, got 5"):
        train_language_model(TINY, corpus(), tmp_path, StopAt(), world=World(0, 6))
    settings = replace(TINY, batch_size=500, validation_windows=1000)
    with pytest.raises(ValueError, match=r"validation_windows must be .* 400, got \d+"):
        train_language_model(settings, corpus(), tmp_path, StopAt(), world=World(0, 400))


def test_sharding_needs_processes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs several processes: start them with torchrun"):
        train_language_model(replace(TINY, sharding="fsdp"), corpus(), tmp_path, StopAt())


def test_the_learning_rate_rises_and_falls() -> None:
    settings = replace(TINY, steps=100, warmup=0.1, learning_rate=1.0)
    rates = [settings.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
