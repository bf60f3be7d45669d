"""Training runs on the device: mixed precision with a scaled loss, and resuming bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from drsl_kernels.robustness.checkpoint import load_checkpoint
from drsl_kernels.robustness.engine import Silent, run
from drsl_kernels.robustness.losses import TrainingLoss
from drsl_kernels.robustness.recipe import Adversarial, Recipe
from drsl_kernels.robustness.settings import TrainingSettings

pytestmark = pytest.mark.gpu


class StopError(Exception):
    pass


class StopAt(Silent):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def batch(self) -> None:
        self.left -= 1
        if not self.left:
            raise StopError


@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
@pytest.mark.parametrize("method", ["madry", "trades", None])
@pytest.mark.parametrize("amp", ["none", "bfloat16", "float16"])
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    tmp_path: Path, device: torch.device, amp: str, method: str | None
) -> None:
    if device.type == "cpu" and amp == "float16":
        pytest.skip("float16 needs a GPU")
    recipe = Recipe(
        epochs=10,
        batch_size=32,
        amp=amp,
        clip_norm=5.0,
        augmentation="none",
        adversarial=None if method is None else Adversarial(method, eps=0.05, alpha=0.03, steps=2),
    )
    settings = TrainingSettings(
        loss=TrainingLoss("kl", 0.1), recipe=recipe, device=device.type, samples=100, robust_images=50
    )
    outcome = run(settings, tmp_path / "undisturbed", tensorboard=False)
    assert outcome.rows[-1].train_accuracy > 0.5 > outcome.rows[0].train_accuracy
    with pytest.raises(StopError):
        run(settings, tmp_path / "resumed", tensorboard=False, checkpoint_batches=2, progress=StopAt(7))
    run(settings, tmp_path / "resumed", resume=True, tensorboard=False)
    found, expected = (load_checkpoint(tmp_path / name / "last.pt") for name in ("resumed", "undisturbed"))
    assert all(torch.equal(found["model"][name], value) for name, value in expected["model"].items())
    assert found["state"]["scaler"] == expected["state"]["scaler"]
    assert bool(expected["state"]["scaler"]) == (amp == "float16")
