"""Detection of abnormal images: scores, attacks that know of them, strangers, and what a comparison reports."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from drsl_kernels.robustness import compare_command, detection, detection_report, detection_run, train
from drsl_kernels.robustness.commands import drsl
from drsl_kernels.robustness.data import Split
from drsl_kernels.robustness.detection import ATTACKS, SCORES, Detection, detect, strangers_to
from drsl_kernels.robustness.detection_report import DetectionMeans
from drsl_kernels.robustness.detection_run import DETECTED, Detector
from drsl_kernels.robustness.losses import TrainingLoss
from drsl_kernels.robustness.mean_std import MeanStd
from drsl_kernels.robustness.models import make_model
from drsl_kernels.robustness.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


class TestScores:
    def test_formulas(self) -> None:
        z = 3 * torch.randn(50, 6, dtype=torch.float64)
        sure = z.softmax(1).amax(1)
        expected = {"softmax": (sure / (1 - sure)).log(), "logsumexp": z.exp().sum(1).log(), "logit": z.amax(1)}
        for name, score in SCORES.items():
            torch.testing.assert_close(score(z, None), expected[name])

    def test_a_softmax_of_1_is_told_from_a_larger_one(self) -> None:
        z = torch.tensor([[100.0, 0.0], [200.0, 0.0]])
        assert (z.softmax(1)[:, 0] == 1).all()
        less, more = SCORES["softmax"](z, None)
        assert less < more

    def test_what_the_wrong_classes_give(self) -> None:
        """The joint attack looks at these: the label can be as large as it will."""
        z, y = torch.tensor([[9.0, 1.0, 2.0]]), torch.tensor([0])
        assert SCORES["logit"](z, y).item() == 2
        assert SCORES["logsumexp"](z, y).item() == pytest.approx(math.log(math.e + math.e**2))
        p = z.softmax(1)[0, 2].item()
        assert SCORES["softmax"](z, y).item() == pytest.approx(math.log(p / (1 - p)))

    def test_what_the_joint_attack_ascends(self) -> None:
        """Log-odds of 1 - p_y against p_y, in nats and at most 0.5, and ten times the largest wrong logit."""
        z, y = torch.tensor([[1.0, 0.0], [0.0, 0.25], [0.0, 5.0]]), torch.tensor([0, 0, 0])
        found = detection._Joint(SCORES["logit"], 10.0)(z, y)
        torch.testing.assert_close(found, torch.tensor([-1.0 + 0.0, 0.25 + 2.5, 0.5 + 50.0]))

    def test_with_a_gaussian_mixture(self) -> None:
        model = make_model("mlp", shape=(1, 8, 8), classes=5, seed=0, head="gaussian")
        x = torch.rand(7, 1, 8, 8)
        z, likely = model(x), model.head.log_likelihood(model.features(x))  # type: ignore[operator]
        torch.testing.assert_close(SCORES["logsumexp"](z, None), likely + math.log(5))


@pytest.fixture(scope="module")
def trained(split: Split) -> nn.Module:
    model = make_model("small_cnn", shape=(1, 8, 8), classes=10, seed=0, head="gaussian")
    recipe = Recipe(epochs=15, batch_size=10)
    train(model, split.train_x, split.train_y, TrainingLoss("gm", 1.0), recipe, generator=torch.Generator())
    return model.eval()


class Two(nn.Module):
    """Logits (x, -x) of the first pixel: both scores are those of |x|, but for constants."""

    def forward(self, x: Tensor) -> Tensor:
        first = 10 * (x.flatten(1)[:, 0] - 0.5)
        return torch.stack([first, -first], 1)


def pixels(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


class TestDetect:
    def test_strangers_by_hand(self) -> None:
        """Two normal images with |x| of 4 and 2: the first stranger has less of the score, the second a tie."""
        x, y = pixels(0.9, 0.3), torch.tensor([0, 1])
        strangers = {"less": pixels(0.5), "between": pixels(0.8), "tie": pixels(0.9), "more": pixels(1.0)}
        for found in detect(Two(), x, y, strangers, eps=0, steps=1, seed=0):
            assert found.strangers == {"less": 1.0, "between": 0.5, "tie": 0.25, "more": 0.0}
            assert (found.plain, found.joint, found.broken_by_plain, found.broken_by_joint) == (None, None, 0, 0)

    def test_attacked_by_hand(self) -> None:
        """0.55 is broken and goes to 0.45 whatever is ascended, 0.9 is not; 0.3 was wrong before."""
        x, y = pixels(0.55, 0.9, 0.3), torch.tensor([0, 0, 0])
        for found in detect(Two(), x, y, {}, eps=0.1, steps=10, seed=0):
            assert (found.broken_by_plain, found.broken_by_joint) == (1, 1)
            assert found.plain == found.joint == pytest.approx((0.5 + 2) / 3, abs=0.2)

    def test_an_attack_that_knows_is_the_harder_one(self, trained: nn.Module, split: Split) -> None:
        seen: list[str] = []
        found = detect(
            trained,
            split.held_out_x,
            split.held_out_y,
            {"noise": torch.rand(70, 1, 8, 8)},
            eps=0.2,
            steps=10,
            seed=0,
            on_attack=seen.append,
        )
        assert [one.score for one in found] == list(SCORES)
        assert len(seen) == ATTACKS
        for one in found:
            assert one.plain is not None
            assert one.joint is not None
            assert one.broken_by_joint >= one.broken_by_plain > 10
        by_name = {one.score: one for one in found}
        assert by_name["logit"].joint < by_name["logit"].plain - 0.05  # type: ignore[operator]
        assert by_name["softmax"].joint < by_name["softmax"].plain - 0.02  # type: ignore[operator]

    def test_the_same_seed_gives_the_same(self, trained: nn.Module, split: Split) -> None:
        def found(seed: int) -> tuple[Detection, ...]:
            torch.rand(1)
            return detect(trained, split.held_out_x[:20], split.held_out_y[:20], {}, eps=0.2, steps=2, seed=seed)

        assert found(1) == found(1)
        assert found(1) != found(2)


class TestStrangers:
    def nothing_installed(self, *_: object, **__: object) -> Any:
        raise FileNotFoundError

    def test_without_another_data_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(detection, "load", self.nothing_installed)
        x = torch.rand(5, 3, 4, 4)
        found = strangers_to("cifar10", x, data_dir=None, seed=0)
        assert list(found) == ["noise", "shuffled"]
        assert all(images.shape == x.shape for images in found.values())
        assert torch.equal(found["shuffled"].flatten(2).sort(2).values, x.flatten(2).sort(2).values)
        assert not torch.equal(found["shuffled"], x)
        pairs = found["shuffled"].flatten(2).transpose(1, 2)  # the channels of a pixel stay together
        assert all((pairs[0] == pixel).all(1).any() for pixel in x[0].flatten(1).T)
        assert 0 <= found["noise"].min() < 0.1 < 0.9 < found["noise"].max() <= 1
        again = strangers_to("cifar10", x, data_dir=None, seed=0)
        assert all(torch.equal(found[name], again[name]) for name in found)

    def test_the_first_that_is_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the folder that is named or, where that holds another data set, in its usual place; resized."""
        asked: list[tuple[str, Path | None]] = []

        def fake(name: str, *, data_dir: Path | None, held_out: str) -> Any:
            asked.append((name, data_dir))
            if name == "fashion_mnist":
                raise ValueError("these are the labels of mnist") if data_dir else FileNotFoundError
            return SimpleNamespace(held_out_x=torch.full((9, 1, 28, 28), 0.25))

        monkeypatch.setattr(detection, "load", fake)
        found = strangers_to("digits", torch.rand(5, 1, 8, 8), data_dir=Path("here"), seed=0)
        assert asked == [("fashion_mnist", Path("here")), ("fashion_mnist", None), ("mnist", Path("here"))]
        torch.testing.assert_close(found["mnist"], torch.full((5, 1, 8, 8), 0.25))

    def test_digits_are_always_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = detection.load

        def only_digits(name: str, **options: Any) -> Split:
            return real(name, **options) if name == "digits" else self.nothing_installed()

        monkeypatch.setattr(detection, "load", only_digits)
        found = strangers_to("mnist", torch.rand(5, 1, 28, 28), data_dir=None, seed=0)
        assert list(found) == ["noise", "shuffled", "digits"]
        assert found["digits"].shape == (5, 1, 28, 28)
        assert 0 <= found["digits"].min() < 0.1 < 0.9 < found["digits"].max() <= 1


class TestKept:
    def detector(self, eps: float = 0.1, pixel: float = 0.0) -> Detector:
        return Detector({"noise": torch.full((2, 1, 8, 8), pixel)}, eps, 3)

    def test_what_was_made_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = (Detection("logit", 0.5, None, 3, 0, {"noise": 1.0}),)
        monkeypatch.setattr(detection_run, "detect", lambda *_, **__: made)
        progress: Any = SimpleNamespace(step=lambda _: None)
        x, y = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)
        assert self.detector().made(tmp_path, {"weights": "a"}) is None
        assert self.detector().make(tmp_path, {"weights": "a"}, Two(), x, y, seed=0, progress=progress) == made
        assert self.detector().made(tmp_path, {"weights": "a"}) == made
        assert self.detector().made(tmp_path, {"weights": "b"}) is None
        assert self.detector(0.2).made(tmp_path, {"weights": "a"}) is None
        assert self.detector(pixel=0.5).made(tmp_path, {"weights": "a"}) is None
        content = json.loads((tmp_path / DETECTED).read_text())
        for damaged in ({"detections": 3}, {"detections": [{"score": "logit"}]}, {"detections": None}):
            (tmp_path / DETECTED).write_text(json.dumps(content | damaged))
            assert self.detector().made(tmp_path, {"weights": "a"}) is None
        (tmp_path / DETECTED).write_text("[")
        assert self.detector().made(tmp_path, {"weights": "a"}) is None


@pytest.mark.parametrize(
    ("plain", "joint", "said"),
    [
        (None, None, ["no attack broke an image"]),
        (None, 0.7, []),
        (0.9, 0.89, []),
        (0.9, 0.8, ["finds attacked images with 0.90, and with 0.80 once"]),
        (0.9, 0.4, ["finds attacked images with 0.90, and it finds none once"]),
        (0.4, 0.1, ["does not find attacked images (0.40)"]),
    ],
)
def test_verdicts(plain: float | None, joint: float | None, said: list[str]) -> None:
    plain_mean, joint_mean = (None if value is None else MeanStd(value, None) for value in (plain, joint))
    means = DetectionMeans("logit", plain_mean, joint_mean, MeanStd(1, None), MeanStd(1, None), {})
    found = list(detection_report._verdict(TrainingLoss("gm", 1.0), means))
    assert len(found) == len(said)
    for words, expected in zip(found, said, strict=True):
        assert words.startswith("gm tau=1, log-likelihood, class: ")
        assert expected in words


TINY = ["--losses", "ce,gm", "--seeds", "2", "--epochs", "2", "--samples", "40", "--eps", "0.2", "--steps", "2"]
TINY += ["--restarts", "1", "--check-images", "0"]


def invoke(out: Path, *options: str) -> str:
    done = CliRunner().invoke(drsl, ["compare", *TINY, *options, "--out", str(out)], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    return done.output


class TestComparison:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        draw: Callable[..., None] = lambda _, out: [  # noqa: E731
            (out / name).write_bytes(b"") for name in compare_command.PICTURES
        ]
        monkeypatch.setattr(compare_command, "draw_pictures", draw)
        monkeypatch.setattr("drsl_kernels.robustness.timing.ROUNDS", 1)
        images = SimpleNamespace(held_out_x=torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
        monkeypatch.setattr(detection, "load", lambda *_, **__: images)

    def test_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the terminal, in both pages, in results.json; and a second time nothing is attacked."""
        said = invoke(tmp_path, "--detect")
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["settings"]["detect"] is True
        for run in results["runs"]:
            assert [found["score"] for found in run["detection"]] == list(SCORES)
        for loss, summary in enumerate(results["summary"]):
            runs = results["runs"][2 * loss : 2 * loss + 2]
            for i, means in enumerate(summary["detection"]):
                noise = [run["detection"][i]["strangers"]["noise"] for run in runs]
                assert means["strangers"]["noise"]["mean"] == pytest.approx(sum(noise) / 2)
        assert "fashion_mnist" in results["runs"][0]["detection"][0]["strangers"]
        for text in (said, (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()):
            assert "Are abnormal images found?" in text
            assert "log-likelihood, class" in text
            assert "attacked, score too" in text
            assert "knows nothing of the score" in text
        markdown = (tmp_path / "report.md").read_text()
        rows = markdown.partition("Are abnormal images found?")[2].split("\n")[2:]
        table = rows[: rows.index("")]
        assert len(table) == 2 + 2 * len(SCORES)
        assert len({row.count("|") for row in table}) == 1

        monkeypatch.setattr(detection_run, "detect", None)
        invoke(tmp_path, "--detect")
        again = json.loads((tmp_path / "results.json").read_text())
        assert again["runs"] == results["runs"]

        invoke(tmp_path)  # not asked for: as if there were none
        without = json.loads((tmp_path / "results.json").read_text())
        assert "detection" not in without["runs"][0]
        assert "detection" not in without["summary"][0]
        assert "Are abnormal" not in (tmp_path / "report.md").read_text()
