"""What a comparison uses again, what it makes anew, and what it says of that."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_robustness_compare import FILES, RUNS, TINY, drsl_compare

from drsl_kernels.robustness import compare_command, engine, experiment
from drsl_kernels.robustness.judging import load_result
from drsl_kernels.robustness.losses import TrainingLoss

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def judged(folder: Path, run: str = RUNS[0]) -> dict[str, Any]:
    """What judging left, but for the seconds."""
    content: dict[str, Any] = json.loads((folder / "runs" / run / "judged.json").read_text())
    for row in content["result"]["epochs"]:
        del row["seconds"]
    return content


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """Drawing takes most of the time of a tiny comparison."""
    with pytest.MonkeyPatch.context() as patch:
        for drawing in ("draw_pictures", "write_pages"):
            patch.setattr(compare_command, drawing, lambda *_: None)
        yield


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "train_epoch", None)


@pytest.fixture(scope="module")
def finished(no_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    result = drsl_compare(*TINY, "--out", str(folder))
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    return tmp_path


@pytest.mark.usefixtures("no_training")
def test_second_run_uses_the_first(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("judge", "check_model"):
        monkeypatch.setattr(experiment, name, None)
    result = drsl_compare(*TINY, "--out", str(copy))
    assert result.exit_code == 0, result.output
    assert "used again: 2 of 2 runs" in " ".join(result.output.split())


def test_same_numbers_afresh(finished: Path, copy: Path) -> None:
    result = drsl_compare(*TINY, "--out", str(copy), "--fresh")
    assert result.exit_code == 0, result.output
    assert "used again" not in result.output
    assert (copy / "results.csv").read_bytes() == (finished / "results.csv").read_bytes()
    for run in RUNS:
        assert judged(copy, run) == judged(finished, run)
        checks = [(folder / "runs" / run / "checks.json").read_bytes() for folder in (copy, finished)]
        assert checks[0] == checks[1]


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    "options",
    [
        ["--restarts", "2"],
        ["--steps", "1"],
        ["--eps", "0.05"],
        ["--test-images", "30"],
        ["--held-out", "validation"],
        ["--attacks", "pgd:margin,pgd:ce"],
    ],
)
def test_other_attacks_on_the_same_weights(copy: Path, options: list[str]) -> None:
    result = drsl_compare(*TINY, *options, "--losses", "ce", "--out", str(copy))
    assert result.exit_code == 0, result.output
    assert "used again" not in result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--epochs", "1"], "recipe.epochs was 2 and is now 1"),
        (["--train-images", "41"], "samples was 40 and is now 41"),
        (["--lr", "0.01"], "recipe.learning_rate was 0.002 and is now 0.01"),
        (["--batch-size", "20"], "recipe.batch_size was 128 and is now 20"),
        (["--label-noise", "0.5"], "recipe.label_noise was 0.0 and is now 0.5"),
        (["--model", "mlp"], "model was 'small_cnn' and is now 'mlp'"),
        (["--adversarial", "madry", "--train-steps", "1"], "recipe.adversarial was None and is now {"),
    ],
)
def test_other_training_is_made_anew_and_says_so(copy: Path, options: list[str], said: str) -> None:
    before = judged(copy)["identity"]["weights"]
    result = drsl_compare(*TINY, *options, "--losses", "ce", "--out", str(copy))
    assert result.exit_code == 0, result.output
    assert "used again" not in result.output
    assert f"was made with other settings and is made anew: {said}" in result.output
    assert judged(copy)["identity"]["weights"] != before
    assert (copy / "runs" / RUNS[1] / "judged.json").exists()


def test_other_seeds_have_folders_of_their_own(copy: Path) -> None:
    result = drsl_compare(*TINY, "--seed", "1", "--losses", "ce", "--out", str(copy))
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(copy / "runs")) == [RUNS[0], "ce-tau0-seed1", RUNS[1]]


def test_what_is_cut_off_is_not_trusted(finished: Path, copy: Path) -> None:
    for run in RUNS:
        path = copy / "runs" / run / "judged.json"
        path.write_text(path.read_text()[:1000])
    (copy / "runs" / RUNS[0] / ".unfinished-1-judged.json").write_text("{}")
    result = drsl_compare(*TINY, "--out", str(copy))
    assert result.exit_code == 0, result.output
    assert "used again" not in result.output
    assert [judged(copy, run) for run in RUNS] == [judged(finished, run) for run in RUNS]
    assert [sorted(os.listdir(copy / "runs" / run)) for run in RUNS] == [FILES, FILES]


@pytest.mark.parametrize("judged_before", [True, False])
def test_a_run_with_damaged_weights_is_made_anew(finished: Path, copy: Path, judged_before: bool) -> None:
    folder = copy / "runs" / RUNS[0]
    content = bytearray((folder / "best.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "best.pt").write_bytes(content)
    if not judged_before:
        (folder / "judged.json").unlink()
    result = drsl_compare(*TINY, "--out", str(copy))
    assert result.exit_code == 0, result.output
    flat = " ".join(result.output.split())
    assert "has a damaged best.pt and is made anew. What was there is kept in" in flat
    assert "used again: 1 of 2 runs" in flat
    assert [judged(copy, run) for run in RUNS] == [judged(finished, run) for run in RUNS]


def test_weights_of_another_run_are_not_judged(finished: Path, copy: Path) -> None:
    shutil.copy(copy / "runs" / RUNS[1] / "best.pt", copy / "runs" / RUNS[0] / "best.pt")
    result = drsl_compare(*TINY, "--out", str(copy))
    assert result.exit_code == 0, result.output
    said = "has the best.pt of another run (loss.name was 'non_target_logits' and is now 'ce'"
    assert said in " ".join(result.output.split())
    assert judged(copy) == judged(finished)


@pytest.mark.parametrize(
    "change",
    [
        None,
        {},
        {"robust_accuracy": []},
        {"clean_accuracy": "x"},
        {"images": 41},
        {"epochs": [None, None]},
        {"epochs": []},
        {"best_epoch": 3},
        {"fell": [[0, 0, 1]]},
        {"second_largest_after": [0.1]},
    ],
)
def test_malformed_results_are_not_trusted(copy: Path, change: Any) -> None:
    path = copy / "runs" / RUNS[0] / "judged.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"result": content["result"] | change if change else change}))
    assert load_result(path, content["identity"]) is None
    path.write_text(json.dumps(content))
    assert load_result(path, content["identity"]) is not None


def test_nearly_equal_taus_have_folders_and_labels_of_their_own() -> None:
    losses = [TrainingLoss("uniform", tau) for tau in (0.3, 0.30000001, 30.0)]
    assert [str(loss) for loss in losses] == ["uniform tau=0.3", "uniform tau=0.30000001", "uniform tau=30"]
    assert len({experiment.run_folder(Path(), loss, 0) for loss in losses}) == 3


def test_an_interrupted_comparison_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    judge = experiment.judge

    def second_fails(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise FloatingPointError("the model's logits are NaN")
        return judge(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "judge", second_fails)
        result = drsl_compare(*TINY, "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "Error: the model's logits are NaN" in result.output
    assert os.listdir(tmp_path) == ["runs"]
    assert (tmp_path / "runs" / RUNS[0] / "judged.json").exists()
    assert not (tmp_path / "runs" / RUNS[1] / "judged.json").exists()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "runs" / RUNS[0]).mkdir(parents=True)
    (tmp_path / "runs" / RUNS[0] / "last.pt").write_bytes(b"someone's")
    result = drsl_compare(*TINY, "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "holds files of a training run, but no settings.json" in " ".join(result.output.split())
    assert (tmp_path / "runs" / RUNS[0] / "last.pt").read_bytes() == b"someone's"
