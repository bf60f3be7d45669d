"""Runs that are killed, resumed and resumed again end in the weights of an undisturbed run; and checkpoints."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drsl_kernels.robustness import checkpoint, engine
from drsl_kernels.robustness.checkpoint import load_checkpoint, load_model, save_checkpoint
from drsl_kernels.robustness.engine import Silent, run
from drsl_kernels.robustness.losses import TrainingLoss
from drsl_kernels.robustness.models import small_cnn
from drsl_kernels.robustness.recipe import Adversarial, Recipe
from drsl_kernels.robustness.settings import TrainingSettings

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = TrainingSettings(
    loss=TrainingLoss("non_target_logits", 0.3),
    recipe=Recipe(
        epochs=3,
        batch_size=16,
        optimizer="sgd",
        learning_rate=0.05,
        schedule="cosine",
        augmentation="crop_flip",
        label_noise=0.1,
        adversarial=Adversarial(eps=0.05, alpha=0.03, steps=2),
    ),
    samples=70,
    robust_images=20,
)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def without_times(content: dict[str, Any]) -> dict[str, Any]:
    state = {name: value for name, value in content["state"].items() if name != "seconds"}
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in state["rows"]]
    return content | {"state": state | {"rows": rows}}


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    """Weights, optimizer, generators, metrics: all but the seconds, bit for bit."""
    for name in ("last.pt", "best.pt"):
        found, expected = load_checkpoint(folder / name), load_checkpoint(undisturbed / name)
        if name == "last.pt":
            found, expected = without_times(found), without_times(expected)
        assert equal(found["model"], expected["model"])
        assert equal(found, expected)
    assert metrics(folder) == metrics(undisturbed)


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    return rows


class StopError(Exception):
    pass


class StopAt(Silent):
    """Interrupts a run after so many steps of this process."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def batch(self) -> None:
        self.left -= 1
        if not self.left:
            raise StopError


class WithEverything(nn.Module):
    """Running averages and random numbers of a model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits


@pytest.fixture
def with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_model(name: str, *, seed: int, **_: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return WithEverything()

    monkeypatch.setattr(engine, "make_model", make_model)


RECIPES = {
    "adam": Recipe(epochs=2, batch_size=16),
    "adamw, one cycle, clipped": Recipe(
        epochs=2, batch_size=16, optimizer="adamw", schedule="onecycle", clip_norm=0.5, weight_decay=0.1
    ),
    "sgd, multistep, bfloat16": Recipe(
        epochs=2, batch_size=16, optimizer="sgd", schedule="multistep", milestones=(1,), amp="bfloat16"
    ),
    "trades": Recipe(epochs=2, batch_size=16, adversarial=Adversarial("trades", 0.05, 0.03, 2)),
    "absum": Recipe(epochs=2, batch_size=16, schedule="cosine", absum=0.1),
    "madry, crops, noise": TINY.recipe,
}


@pytest.mark.usefixtures("with_everything")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_interrupted_again_and_again(tmp_path: Path, recipe: Recipe) -> None:
    """After every third step, checkpoints being written after every second: some steps are done twice."""
    settings = replace(TINY, recipe=recipe)
    run(settings, tmp_path / "undisturbed", tensorboard=False)
    interruptions = 0
    for _ in range(30):
        torch.rand(interruptions)  # whatever the global random state is by then
        try:
            run(
                settings,
                tmp_path / "resumed",
                resume=True,
                tensorboard=False,
                checkpoint_batches=2,
                progress=StopAt(3),
            )
            break
        except StopError:
            interruptions += 1
    assert interruptions >= recipe.epochs
    assert_same_run(tmp_path / "resumed", tmp_path / "undisturbed")


@pytest.mark.parametrize("seconds", [1e-9, 1e9], ids=["after every step", "at the end alone"])
def test_checkpoints_by_the_clock(tmp_path: Path, seconds: float) -> None:
    run(TINY, tmp_path / "undisturbed", tensorboard=False)
    options: dict[str, Any] = {"resume": True, "tensorboard": False, "checkpoint_seconds": seconds}
    with pytest.raises(StopError):
        run(TINY, tmp_path / "resumed", progress=StopAt(8), **options)  # the third of five steps of an epoch
    assert (tmp_path / "resumed" / "last.pt").exists() == (seconds < 1)
    if seconds < 1:
        state = load_checkpoint(tmp_path / "resumed" / "last.pt")["state"]
        assert (len(state["rows"]), len(state["sums"])) == (1, 2)
    run(TINY, tmp_path / "resumed", **options)
    assert_same_run(tmp_path / "resumed", tmp_path / "undisturbed")


def killed_after(calls: int, folder: Path, settings: TrainingSettings) -> None:
    """Train, and kill this process with SIGKILL at a call of a Python or C function, whichever it is."""
    left = calls

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    sys.setprofile(count)
    run(settings, folder, resume=True, checkpoint_batches=2, tensorboard=False)
    sys.setprofile(None)
    (folder / "calls").write_text(str(calls - left))


def in_a_process(calls: int, folder: Path) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["drsl_kernels.robustness.engine", __name__])
    process = context.Process(target=killed_after, args=(calls, folder, TINY))
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    """Moments are function calls, of Python or C, drawn at random: in a step, between two files, inside of a write."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    never = 10**12
    assert in_a_process(never, undisturbed) == 0
    calls = int((undisturbed / "calls").read_text())
    moments = random.Random(20230312)
    for _ in range(10):
        assert in_a_process(moments.randrange(1, calls // 4), killed) == -signal.SIGKILL
    assert in_a_process(never, killed) == 0
    assert_same_run(killed, undisturbed)
    assert not list(killed.glob(".unfinished-*"))


@pytest.mark.parametrize("name", ["settings.json", "best.pt", "metrics.csv", "last.pt"])
def test_killed_between_a_file_and_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As if the machine had stopped with the new file written beside the old one."""
    run(TINY, tmp_path / "undisturbed", tensorboard=False)
    folder, seen = tmp_path / "killed", 0

    def replace_or_stop(source: Path, target: Path) -> None:
        nonlocal seen
        seen += target.name == name
        if target.name == name and seen == (2 if name in ("metrics.csv", "last.pt") else 1):
            raise StopError
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("drsl_kernels.robustness.storage.os.replace", replace_or_stop)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process cleans nothing up
        with pytest.raises(StopError):
            run(TINY, folder, tensorboard=False)
    (left,) = folder.glob(".unfinished-*")
    left.rename(left.with_name(".unfinished-1-of-another-process"))
    (folder / ".unfinished-notes").touch()
    run(TINY, folder, resume=True, tensorboard=False)
    assert [path.name for path in folder.glob(".unfinished-*")] == [".unfinished-notes"]
    assert_same_run(folder, tmp_path / "undisturbed")


def drsl_train(*options: str) -> list[str]:
    return [sys.executable, "-m", "drsl_kernels.robustness", "train", *options]


@pytest.mark.slow
def test_the_command_killed(tmp_path: Path) -> None:
    """From outside, once a few epochs are done; resumed with no option but the folder."""
    options = ("--epochs", "24", "--samples", "64", "--batch-size", "8", "--no-tensorboard")
    folder = tmp_path / "killed"
    with subprocess.Popen(drsl_train(*options, "--out", str(folder)), stdout=subprocess.DEVNULL) as process:
        give_up = time.monotonic() + 60
        while not (folder / "metrics.csv").exists() and time.monotonic() < give_up:
            time.sleep(0.01)
        process.kill()
    rows = len(load_checkpoint(folder / "last.pt")["state"]["rows"]) if (folder / "last.pt").exists() else 0
    assert rows < 24
    subprocess.run(drsl_train("--resume", "--out", str(folder)), check=True, stdout=subprocess.DEVNULL)
    settings = engine.read_settings(folder)
    assert settings is not None
    run(settings, tmp_path / "undisturbed", tensorboard=False)
    assert_same_run(folder, tmp_path / "undisturbed")


class TestResuming:
    @pytest.fixture
    def begun(self, tmp_path: Path) -> Path:
        with pytest.raises(StopError):
            run(TINY, tmp_path, tensorboard=False, progress=StopAt(7))
        return tmp_path

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seed": 1}, "seed was 0 and is now 1"),
            ({"loss": TrainingLoss("kl", 0.3)}, "loss.name was 'non_target_logits' and is now 'kl'"),
            ({"loss": TrainingLoss("non_target_logits", 0.4)}, "loss.tau was 0.3 and is now 0.4"),
            ({"recipe": replace(TINY.recipe, epochs=4)}, "recipe.epochs was 3 and is now 4"),
            ({"recipe": replace(TINY.recipe, adversarial=None)}, "recipe.adversarial was {.*} and is now None"),
            (
                {"recipe": replace(TINY.recipe, adversarial=Adversarial(eps=0.1, alpha=0.03, steps=2))},
                "recipe.adversarial.eps was 0.05 and is now 0.1",
            ),
            ({"threads": 2}, "threads was 1 and is now 2"),
        ],
    )
    def test_other_settings(self, begun: Path, change: dict[str, Any], message: str) -> None:
        before = (begun / "last.pt").read_bytes()
        with pytest.raises(ValueError, match=f"cannot resume .* with other settings: {message}$"):
            run(replace(TINY, **change), begun, resume=True)
        assert (begun / "last.pt").read_bytes() == before

    def test_another_number_of_processes(self, begun: Path) -> None:
        with pytest.raises(ValueError, match="processes was 1 and is now 2"):
            run(TINY, begun, resume=True, world=engine.World(0, 2))

    def test_data_may_have_moved(self, begun: Path) -> None:
        run(replace(TINY, data_dir=Path("elsewhere")), begun, resume=True, tensorboard=False)

    def test_not_by_mistake(self, begun: Path) -> None:
        with pytest.raises(FileExistsError, match="holds a training run: resume it, or choose another folder"):
            run(TINY, begun)
        (begun / "settings.json").unlink()
        with pytest.raises(FileExistsError, match=r"but no settings\.json"):
            run(TINY, begun, resume=True)

    def test_settings_that_are_none(self, begun: Path) -> None:
        (begun / "settings.json").write_text('{"settings": {"loss": 1}}')
        with pytest.raises(ValueError, match="does not hold the settings of a training run"):
            run(TINY, begun, resume=True)

    def test_finished(self, begun: Path) -> None:
        assert not run(TINY, begun, resume=True, tensorboard=False).was_finished
        before = (begun / "last.pt").read_bytes()
        outcome = run(TINY, begun, resume=True, tensorboard=False)
        assert outcome.was_finished
        assert len(outcome.rows) == 3
        assert (begun / "last.pt").read_bytes() == before

    def test_other_software_is_told(self, begun: Path) -> None:
        content = json.loads((begun / "settings.json").read_text())
        content["software"]["torch"] = "1.0"
        (begun / "settings.json").write_text(json.dumps(content))
        notes: list[str] = []
        listener = Silent()
        listener.note = notes.append  # type: ignore[method-assign]
        run(TINY, begun, resume=True, tensorboard=False, progress=listener)
        assert len(notes) == 1
        assert "'torch': '1.0'" in notes[0]
        assert "the last digits may differ" in notes[0]

    def test_metrics_have_each_epoch_once(self, begun: Path) -> None:
        """Also where the file is ahead of the checkpoint, or broken."""
        with (begun / "metrics.csv").open("a") as file:
            file.write("2,0.05,7,7")
        run(TINY, begun, resume=True, tensorboard=False)
        assert [row["epoch"] for row in metrics(begun)] == ["1", "2", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(replace(TINY, seed=4), folder, tensorboard=False)
    return folder


class TestCheckpoints:
    def test_content(self, folder: Path) -> None:
        best, last = load_checkpoint(folder / "best.pt"), load_checkpoint(folder / "last.pt")
        assert best.keys() == {"format", "about", "model"}
        assert last.keys() == {"format", "about", "model", "state"}
        about = last["about"]
        assert about["loss"] == {"name": "non_target_logits", "tau": 0.3}
        assert (about["dataset"], about["model"], about["seed"], about["data_dir"]) == ("digits", "small_cnn", 4, None)
        assert (about["shape"], about["classes"]) == ([1, 8, 8], 10)
        assert Recipe.from_json(about["recipe"]) == TINY.recipe
        assert about["torch"] == torch.__version__
        assert about["drsl_kernels"]
        assert len(about["mean"]) == len(about["std"]) == 1
        assert about["epoch"] == 3

    def test_load_model(self, folder: Path) -> None:
        loaded = load_model(folder / "last.pt")
        assert not loaded.model.training
        assert loaded.about["seed"] == 4
        assert equal(dict(loaded.model.state_dict()), load_checkpoint(folder / "last.pt")["model"])
        assert loaded.model(torch.rand(2, 1, 8, 8)).shape == (2, 10)

    def test_no_code_is_run(self, tmp_path: Path) -> None:
        torch.save({"format": 1, "about": Path("x"), "model": {}}, tmp_path / "code.pt")
        with pytest.raises(ValueError, match=r"code\.pt is no checkpoint of drsl train: Unsupported global"):
            load_checkpoint(tmp_path / "code.pt")

    def test_no_checkpoint(self, tmp_path: Path, folder: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*absent\.pt"):
            load_checkpoint(tmp_path / "absent.pt")
        whole = (folder / "last.pt").read_bytes()
        for content in (b"", b"text", whole[: len(whole) // 2]):
            (tmp_path / "part.pt").write_bytes(content)
            message = r"part\.pt is no checkpoint of drsl train: it is damaged, or a file of another kind$"
            with pytest.raises(ValueError, match=message):
                load_checkpoint(tmp_path / "part.pt")
        torch.save([1], tmp_path / "list.pt")
        with pytest.raises(ValueError, match="it must be a dict with about, format, model"):
            load_checkpoint(tmp_path / "list.pt")

    def test_a_flipped_byte(self, tmp_path: Path) -> None:
        """Wherever it is, the file is refused or tells the same."""
        path = tmp_path / "a.pt"
        content = {"format": 1, "about": {"seed": 1}, "model": {"weight": torch.arange(4.0)}}
        save_checkpoint(path, content)
        whole, refused = path.read_bytes(), 0
        for i, byte in enumerate(whole):
            path.write_bytes(whole[:i] + bytes([byte ^ 0xFF]) + whole[i + 1 :])
            try:
                assert equal(load_checkpoint(path), content)
            except ValueError:
                refused += 1
        assert refused > len(whole) / 3

    @pytest.mark.parametrize("model", [None, [1], {1: torch.ones(1)}, {"weight": 1}])
    def test_a_model_of_another_kind(self, tmp_path: Path, model: object) -> None:
        save_checkpoint(tmp_path / "a.pt", {"format": 1, "about": {}, "model": model})
        with pytest.raises(ValueError, match=r"a\.pt is no checkpoint .*'model' must be a dict of tensors"):
            load_model(tmp_path / "a.pt")

    def test_a_later_format(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "later.pt", {"format": 2, "about": {}, "model": {}})
        with pytest.raises(ValueError, match="has format 2, and this version of drsl_kernels reads 1"):
            load_checkpoint(tmp_path / "later.pt")

    def test_other_weights(self, tmp_path: Path, folder: Path) -> None:
        content = load_checkpoint(folder / "best.pt")
        save_checkpoint(tmp_path / "other.pt", content | {"model": small_cnn(0, classes=3).state_dict()})
        with pytest.raises(RuntimeError, match="size mismatch"):
            load_model(tmp_path / "other.pt")

    def test_a_failure_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.pt"
        save_checkpoint(path, {"format": 1, "about": {"seed": 1}, "model": {}})

        def fail(content: object, file: Any) -> None:
            file.write(b"PK half")
            raise OSError("the disk is full")

        monkeypatch.setattr(checkpoint.torch, "save", fail)
        with pytest.raises(OSError, match="the disk is full"):
            save_checkpoint(path, {"format": 1, "about": {"seed": 2}, "model": {}})
        assert load_checkpoint(path)["about"] == {"seed": 1}
        assert os.listdir(tmp_path) == ["a.pt"]

    def test_is_on_the_disk_before_it_has_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        order: list[str] = []
        fsync, rename = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd))[1])
        monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), rename(a, b))[1])
        save_checkpoint(tmp_path / "a.pt", {"format": 1, "about": {}, "model": {}})
        assert order == ["fsync", "replace", "fsync"]
