"""`drsl lm`: what it prints and writes, goes on with and refuses."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from drsl_kernels.robustness.commands import drsl
from drsl_kernels.robustness.lm import ByteTokens, LanguageLoss, Score, Text, command, experiment, load_corpus
from drsl_kernels.robustness.lm.experiment import LanguageComparison, LanguageSetup
from drsl_kernels.robustness.lm.judging import LanguageJudging, LanguageResult, Point
from drsl_kernels.robustness.lm.report import cautions
from drsl_kernels.robustness.lm.settings import LanguageSettings

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (
    *("--context", "16", "--layers", "1", "--heads", "2", "--width", "16", "--steps", "8", "--batch-size", "4"),
    *("--evaluate-every", "4", "--validation-windows", "8", "--sequences", "3", "--attack-steps", "2"),
    *("--restarts", "1", "--substitutions", "1,2", "--candidates", "4", "--threads", "1"),
)


def invoke(*options: str) -> Result:
    return CliRunner().invoke(drsl, ["lm", *options])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "kjv.txt"
    path.write_text("".join(f"{i}:{i % 7} And there were {i * i} of them.\n" for i in range(900)))
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A penalty, a mixture, two seeds of them, on the default text."""
    out = tmp_path_factory.mktemp("lm") / "out"
    result = invoke(
        "--losses", "drsl,mixture_of_softmax,ce", "--tau", "uniform=3", "--seeds", "2", *SMALL, "--out", str(out)
    )
    assert result.exit_code == 0, result.output
    return out, result


class TestFiles:
    def test_all_are_there(self, written: tuple[Path, Result]) -> None:
        out, result = written
        names = {*command.RESULTS, *command.PICTURES, *command.PAGES}
        assert names <= {path.name for path in out.iterdir()}
        assert all(name in result.output for name in names)
        assert len(list((out / "runs").iterdir())) == 3 * 2

    def test_numbers(self, written: tuple[Path, Result]) -> None:
        content = json.loads((written[0] / "results.json").read_text())
        assert [(run["loss"], run["tau"], run["seed"]) for run in content["runs"]] == [
            (name, tau, seed) for name, tau in (("uniform", 3), ("mixture_of_softmax", 0), ("ce", 0)) for seed in (0, 1)
        ]
        for run in content["runs"]:
            assert run["perplexity"] == pytest.approx(2 ** run["bits_per_byte"], rel=1e-6)  # of bytes they are one
            assert [point["size"] for point in run["substitution"]] == [0, 1, 2]
            for kind in ("embedding", "substitution"):
                perplexities = [point["perplexity"] for point in run[kind]]
                assert perplexities == sorted(perplexities)
            assert run["embedding"][-1]["perplexity"] > 1.01 * run["embedding"][0]["perplexity"]
        first, second = content["runs"][:2]
        assert first["perplexity"] != second["perplexity"]
        assert content["meaning"].keys() >= {"text", "model", "embedding", "substitution"}
        with (written[0] / "results.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 6 * (1 + 3 * 5 + 4 * 3)
        assert {row["attack"] for row in rows} == {
            *("none", "embedding", "substitution", "pgd:log_odds", "pgd:ce", "hotflip", "gcg", "random")
        }

    def test_pages(self, written: tuple[Path, Result]) -> None:
        html, markdown = ((written[0] / name).read_text() for name in ("report.html", "report.md"))
        assert html.count("data:image/png;base64,") == 3
        assert not re.findall(r'(?:src|href)="(?!data:)', html)
        for page in (html, markdown):
            for words in (
                *("bits per byte", "right %, radius 0.4", "perplexity, 2 exchanged", "ratio to F.cross_entropy"),
                *("uniform tau=3", "mixture_of_softmax", "2 seed(s) say little", "read substitution as sensitivity"),
                *("modules of Python", "standard library", "random, 2 exchanged", "What the models write"),
            ):
                assert words in page
        table = [line for line in markdown.splitlines() if line.startswith("|")]
        assert {line.count("|") for line in table} == {5}
        for picture in re.findall(r"\]\((.*?\.png)\)", markdown):
            assert (written[0] / picture).read_bytes().startswith(b"\x89PNG")


def without_pages(patch: pytest.MonkeyPatch) -> None:
    """They take longer than all that makes the numbers."""
    for name in ("draw_pictures", "write_pages"):
        patch.setattr(command, name, lambda *_: None)


def test_found_again_and_made_anew(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pages(monkeypatch)
    options = ("--text", str(text), "--tokens", "bpe", "--vocabulary", "300", "--losses", "ce", *SMALL)
    out = ("--out", str(tmp_path / "out"))
    first = invoke(*options, *out)
    assert first.exit_code == 0, first.output
    assert (tmp_path / "out" / "tokenizer.json").exists()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    moved = text.rename(tmp_path / "moved.txt")
    again = invoke("--text", str(moved), *options[2:], *out)
    assert "used again: 1 of 1 runs" in again.output
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"] == results["runs"]
    harder = invoke("--text", str(moved), *options[2:], "--attack-steps", "3", *out)
    assert "used again" not in harder.output
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert run["nats"] == results["runs"][0]["nats"]  # not trained again
    anew = invoke("--text", str(moved), *options[2:], "--lr", "0.01", *out)
    assert "is made anew: learning_rate was 0.002 and is now 0.01" in anew.output.replace("\n", "")
    (replaced,) = (tmp_path / "out" / "runs").glob("*/replaced-1")
    assert {"best.pt", "last.pt", "settings.json", "judged.json"} <= {path.name for path in replaced.iterdir()}
    monkeypatch.setattr(experiment, "_REVISION", experiment._REVISION + 1)
    again = invoke("--text", str(moved), *options[2:], "--lr", "0.01", *out)
    assert "used again" not in again.output
    assert again.exit_code == 0, again.output


def test_options_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[LanguageSetup] = []

    def stop(settings: LanguageSettings, *_: Any) -> None:
        raise ValueError("far enough")

    def keep(options: dict[str, Any]) -> LanguageSetup:
        seen.append(command_setup(options))
        return seen[-1]

    command_setup = command._setup
    monkeypatch.setattr(command, "prepared_corpus", stop)
    monkeypatch.setattr(command, "_setup", keep)
    out = ("--out", str(tmp_path / "out"))
    assert "Error: far enough" in invoke("--threads", "1", *out).output
    given = (
        *("--tokens", "bpe", "--vocabulary", "500", "--context", "64", "--positions", "learned", "--untied"),
        *("--lr", "0.01", "--warmup", "0.2", "--weight-decay", "0", "--eps", "1/4,0.1", "--norm", "linf"),
        *("--attack-losses", "margin", "--attack-steps", "4", "--restarts", "3", "--substitutions", "5,3"),
        *("--proposals", "gcg", "--candidates", "7", "--sequences", "9", "--held-out", "validation", "--threads", "1"),
    )
    assert "Error: far enough" in invoke(*given, *out).output
    plain, changed = seen
    assert plain == LanguageSetup()
    training = LanguageSettings(
        tokens="bpe",
        vocabulary=500,
        context=64,
        positions="learned",
        tied=False,
        learning_rate=0.01,
        warmup=0.2,
        weight_decay=0.0,
    )
    judging = LanguageJudging(
        radii=(0.1, 0.25),
        norm="linf",
        losses=("margin",),
        steps=4,
        restarts=3,
        budgets=(3, 5),
        proposals=("gcg",),
        candidates=7,
        sequences=9,
        held_out="validation",
    )
    assert changed == LanguageSetup(training, judging)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--losses", "gm"), "unknown loss 'gm'; choose from ce, uniform"),
        (("--tau", "kl=1"), "'kl' is not among --losses ce,non_target_logits"),
        (("--losses", "ce,kl", "--tau", "kl=-1"), "tau of kl must be 0 or more"),
        (("--text", "absent.txt"), "there is no text 'absent.txt': give a file, a folder, or 'stdlib'"),
        (("--width", "30"), "width must be a multiple of 8"),
        (("--vocabulary", "300"), "--vocabulary needs --tokens bpe"),
        (("--substitutions", "1,x"), "'1,x' must be whole numbers such as 1,2,4"),
        (("--substitutions", "100"), "budgets must be at most half of the context, 64, got 100 substitutions"),
        (("--eps", "0"), "radii must be above 0"),
        (("--sharding", "fsdp"), "needs several processes: start them with torchrun"),
        (("--device", "none"), "cannot use 'none' here"),
        (("--out", ""), "the name of the folder is empty"),
    ],
)
def test_errors_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*options)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def test_a_file_that_no_bpe_reads(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\n" * 5000)
    result = invoke("--text", str(tmp_path / "binary"), "--tokens", "bpe", *SMALL, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "BPE needs text in UTF-8" in result.output


def result(
    loss: LanguageLoss, perplexity: float, *, left: float = 0.1, random: float = 1.0, length: float = 1.0
) -> Any:
    """What a run might leave; `left` is the share of right predictions at the largest radius."""

    def points(kind: str, last: float) -> tuple[Point, ...]:
        sizes = (0.0, 0.4) if kind == "embedding" else (0.0, 8.0)
        worse = (100.0 * perplexity, 200.0 * perplexity * last)
        return tuple(
            Point(size, nats, int(100 * right), 100)
            for size, nats, right in zip(sizes, worse, (0.5, left), strict=True)
        )

    by_attack = {
        name: points("substitution", last) for name, last in (("hotflip", 1.0), ("gcg", 0.9), ("random", random))
    }
    score = Score(100.0 * perplexity, 50, 100, 100)
    kinds = {kind: points(kind, 1.0) for kind in ("embedding", "substitution")}
    return LanguageResult(
        loss=loss,
        seed=0,
        rows=(),
        best_step=1,
        score=score,
        embedding_norm=length,
        by_attack=by_attack,
        sample="",
        **kinds,
    )


def said(*runs: LanguageResult, held_out: Any = "test") -> str:
    setup = LanguageSetup(judging=LanguageJudging(radii=(0.4,), budgets=(8,), held_out=held_out))
    corpus = load_corpus(Text.of(b"a line\n" * 1000, "lines"), ByteTokens(), context=128)
    losses = tuple(run.loss for run in runs)
    return " ".join(cautions(LanguageComparison(setup, corpus, losses, (0,), runs, {}, 0)))


def test_what_to_keep_in_mind() -> None:
    ce, drsl = LanguageLoss("ce"), LanguageLoss("uniform", 1.0)
    good = said(result(ce, 2.0), result(drsl, 1.5))
    for words in ("costs", "no lower", "at random", "more than half", "times as long", "no baseline", "chose the best"):
        assert words not in good
    assert "uniform tau=1 costs perplexity without an attack: 12.18 where ce has 7.389" in said(
        result(ce, 2.0), result(drsl, 2.5)
    )
    no_gain = said(result(ce, 2.0), result(drsl, 2.0))
    assert "no lower perplexity than ce with: radius 0.4; 8 exchanged" in no_gain
    assert "There is no baseline here" in said(result(drsl, 2.0))
    assert "ce: exchanges drawn at random did more" in said(result(ce, 2.0, random=1.1))
    assert "ce: at the largest radius more than half of the right predictions are left" in said(
        result(ce, 2.0, left=0.3)
    )
    assert "0.50 times as long as those of ce" in said(result(ce, 2.0), result(drsl, 1.5, length=0.5))
    assert "This part chose the best step, too" in said(result(ce, 2.0), held_out="validation")
