"""What `pgd` says to arguments that it cannot use: the error names the argument and its value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from test_attacks import Convolutional, convolutional, images
from torch import Tensor, nn

from drsl_kernels.robustness import pgd

__all__ = ["convolutional", "images"]  # fixtures

LABELS = torch.tensor([0, 1])


class TestBadInput:
    GOOD: ClassVar = {"eps": 0.1, "alpha": 0.05, "steps": 2}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"eps": -0.1}, "eps must be 0 or more and finite, got -0.1"),
            ({"eps": math.nan}, "eps must be 0 or more and finite, got nan"),
            ({"eps": math.inf}, "eps must be 0 or more and finite, got inf"),
            ({"alpha": 0}, "alpha must be above 0 and finite, got 0"),
            ({"alpha": math.nan}, "alpha must be above 0 and finite, got nan"),
            ({"steps": -1}, "steps must be 0 or more, got -1"),
            ({"norm": "l1"}, "norm must be one of 'linf', 'l2', got 'l1'"),
            ({"restarts": 0}, "restarts must be 1 or more, got 0"),
            ({"restarts": 2, "random_start": False}, "restarts must be 1 without a random start"),
            ({"bounds": (1, 0)}, r"bounds must be \(smallest, largest\).*got \(1.0, 0.0\)"),
            ({"bounds": (0, 0.5)}, r"x must lie within bounds=\(0.0, 0.5\), got values from 0"),
            ({"loss": "hinge"}, "loss must be one of 'log_odds', 'ce', 'margin', 'dlr' or a callable, got 'hinge'"),
            ({"loss": lambda logits, y: logits.sum()}, r"per sample, shape \(N,\) = \(9,\), got \(\)"),
        ],
    )
    def test_arguments(
        self,
        convolutional: Convolutional,
        images: tuple[Tensor, Tensor],
        change: dict[str, object],
        message: str,
    ) -> None:
        with pytest.raises(ValueError, match=message):
            pgd(convolutional, *images, **(self.GOOD | change))

    @pytest.mark.parametrize(
        ("argument", "values"),
        [
            ("eps", [None, "a", torch.ones(4)]),
            ("alpha", ["a"]),
            ("steps", [None, 1.5]),
            ("restarts", [1.5]),
            ("bounds", [None, "01", (0, 1, 2)]),
            ("random_start", ["no", None, 0]),
            ("generator", [3, "cpu"]),
            ("x", [[[0.5]], None]),
            ("y", [[0], None]),
        ],
    )
    def test_types(self, argument: str, values: list[object]) -> None:
        good = {"x": torch.zeros(2, 4), "y": LABELS} | self.GOOD
        for value in values:
            with pytest.raises(TypeError, match=rf"^{argument}(\[0\])? must be "):
                pgd(nn.Linear(4, 2), **(good | {argument: value}))

    def test_what_model_and_loss_return(self) -> None:
        x, model = torch.zeros(2, 4), nn.Linear(4, 2)
        with pytest.raises(TypeError, match="model must be callable, got None"):
            pgd(None, x, LABELS, **self.GOOD)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="model must return a Tensor, got tuple"):
            pgd(lambda points: (model(points),), x, LABELS, **self.GOOD)
        with pytest.raises(TypeError, match="loss must return a Tensor, got float"):
            pgd(model, x, LABELS, **self.GOOD, loss=lambda logits, y: 1.0)

    @pytest.mark.parametrize("cut", [Tensor.detach, lambda values: values.detach().requires_grad_()])
    def test_no_gradient_reaches_x(self, cut: Callable[[Tensor], Tensor]) -> None:
        x, model = torch.zeros(2, 4), nn.Linear(4, 2)
        with pytest.raises(RuntimeError, match="the gradient of the loss does not reach x"):
            pgd(lambda points: cut(model(points)), x, LABELS, **self.GOOD)
        with pytest.raises(RuntimeError, match="the gradient of the loss does not reach x"):
            pgd(model, x, LABELS, **self.GOOD, loss=lambda logits, y: cut(logits).sum(1))

    @pytest.mark.parametrize(
        ("x", "y", "error", "message"),
        [
            (torch.full((2, 4), math.nan), LABELS, ValueError, "x must lie within bounds"),
            (torch.zeros(2, 4).long(), LABELS, TypeError, "floating dtype, got torch.int64"),
            (torch.zeros(2), LABELS, ValueError, r"at least two dimensions, got \(2,\)"),
            (torch.zeros(2, 4), LABELS.float(), TypeError, "dtype int64, got torch.float32"),
            (torch.zeros(3, 4), LABELS, ValueError, r"y must have shape \(N,\) = \(3,\), got \(2,\)"),
            (torch.zeros(2, 4), -100 * LABELS, ValueError, "classes 0 or more, got -100"),
        ],
    )
    def test_samples(self, x: Tensor, y: Tensor, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            pgd(nn.Linear(4, 2), x, y, **self.GOOD)

    @pytest.mark.parametrize("loss", ["log_odds", "ce", "margin"])
    def test_label_out_of_range(self, loss: str) -> None:
        with pytest.raises(IndexError, match="y holds label 2, outside"):
            pgd(nn.Linear(4, 2), torch.zeros(2, 4), torch.tensor([0, 2]), **self.GOOD, loss=loss)

    @pytest.mark.parametrize("classes", [1, None])
    def test_logits_of_a_wrong_shape(self, classes: int | None) -> None:
        model = nn.Linear(4, 1) if classes == 1 else nn.Sequential(nn.Linear(4, 2), nn.Flatten(0))
        with pytest.raises(ValueError, match=r"logits of shape \(N, C\) = \(2, 2 or more\)"):
            pgd(model, torch.zeros(2, 4), torch.tensor([0, 0]), **self.GOOD)

    @pytest.mark.parametrize("steps", [0, 3])
    def test_a_loss_that_is_nan_for_one_sample(self, steps: int) -> None:
        """Its gradient is as it should be, or zero; the sample must not come back as one that survived."""

        def nan_for_class_one(logits: Tensor, y: Tensor) -> Tensor:
            return logits.sum(1) + torch.where(y == 1, math.nan, 0.0)

        model = nn.Linear(4, 2)
        with torch.no_grad():
            model.weight.zero_()
            model.bias.copy_(torch.tensor([0.0, 1.0]))
        with pytest.raises(FloatingPointError, match=r"not finite.* sample 1 of 2"):
            pgd(model, torch.zeros(2, 4), LABELS, eps=0.1, alpha=0.05, steps=steps, loss=nan_for_class_one)

    @pytest.mark.parametrize("steps", [0, 2])
    def test_a_model_that_returns_nan(self, steps: int) -> None:
        model = nn.Linear(4, 2)
        with torch.no_grad():
            model.weight[0, 0] = math.nan
        with pytest.raises(FloatingPointError, match="not finite"):
            pgd(model, torch.zeros(2, 4), torch.tensor([0, 1]), eps=0.1, alpha=0.05, steps=steps)
