"""The pages of docs/, with the packages that people train and attack with: each runs as it stands.

What it leaves behind is then checked: losses fall, gradients are those of the textbook formula, attacks work. Nothing
needs a network. Relies on code_blocks.py and truth.py.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import re
import shlex
import socket
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from code_blocks import DOCS, Outcome, blocks, python_of, run
from torch import Tensor, nn
from truth import loss_and_gradient

from drsl_kernels import fused_drsl_loss

pytestmark = [  # what other packages say of each other
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec"),
    pytest.mark.filterwarnings("ignore:Please import .gaussian_filter"),
]

PENALTY: dict[str, Any] = {"tau": 0.3, "distance": "non_target_logits"}


@pytest.fixture(autouse=True)
def _elsewhere_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object, address: object) -> None:
        raise AssertionError(f"a page wants to connect to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)


def page(name: str) -> Outcome:
    return run(DOCS / f"{name}.md")


def losses(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss (\d+\.\d+)", printed)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the parameters, taken out."""
    found = {name: p.grad for name, p in model.named_parameters()}
    assert None not in found.values()
    model.zero_grad()
    return found


def textbook_gradients(model: nn.Module, logits: Tensor, y: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Those of the textbook formula in float64, led through the model."""
    logits.backward(loss_and_gradient(logits, y, **arguments)[1].to(logits.dtype))
    return gradients(model)


def assert_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Compare each parameter's gradient, by the length of the difference."""
    assert got.keys() == want.keys()
    scale = torch.stack([g.norm() for g in want.values()]).norm()
    assert scale > 0
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= tolerance * scale, name


def test_every_page_with_python_is_run_here() -> None:
    pages = {path.stem for path in DOCS.glob("*.md") if python_of(path)}
    assert pages
    assert all(f"test_{name}" in globals() for name in pages), pages


@pytest.mark.slow
def test_training_loop() -> None:
    with torch._inductor.config.patch(compile_threads=1):  # a pool of compilers is slower for two small graphs
        outcome = page("training_loop")
        variables = outcome.variables
        model, x, y = variables["model"], variables["x"][:128], variables["y"][:128]
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = variables["loss_of"](x, y)
        loss.backward()
    falls = losses(outcome.printed)
    assert len(falls) == 10
    assert falls[-1] < 0.5 * falls[0]
    assert variables["accuracy"] > 0.85
    assert loss.dtype == torch.float32
    assert_gradients(gradients(model), textbook_gradients(model, model(x), y, **PENALTY), tolerance=0.06)  # bfloat16


def test_the_changes_for_float16() -> None:
    """Those that the page of the training loop shows as a diff, applied to it."""
    path = DOCS / "training_loop.md"
    code = python_of(path)
    (diff,) = blocks(path, "diff")
    for hunk in diff[1].split("...\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[2:] for line in lines if line[0] != "+")
        assert old in code
        code = code.replace(old, "".join(line[2:] for line in lines if line[0] != "-"))
    with torch.compiler.set_stance("force_eager"):
        variables, printed = run(path, code)
    assert variables["scaler"].get_scale() >= 2.0**10
    assert losses(printed)[-1] < 0.5 * losses(printed)[0]
    assert variables["accuracy"] > 0.85


def test_hugging_face() -> None:
    variables = page("hugging_face").variables
    trainer, model = variables["trainer"], variables["model"].eval()
    falls = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(falls) == 4
    assert falls[-1] < 0.7 * falls[0]

    held_out = {"input_ids": variables["tokens"][192:], "labels": variables["labels"][192:]}
    want, _, _ = loss_and_gradient(model(held_out["input_ids"]).logits, held_out["labels"], **PENALTY)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want.item(), rel=1e-5)

    # Two halves of a batch, as Trainer accumulates them, have the gradient of the whole.
    model.zero_grad()
    for half in (slice(0, 24), slice(24, 64)):
        part = {name: values[half] for name, values in held_out.items()}
        trainer.compute_loss(model, part, num_items_in_batch=torch.tensor(64)).backward()
    got = gradients(model)
    assert_gradients(got, textbook_gradients(model, model(held_out["input_ids"]).logits, held_out["labels"], **PENALTY))

    # What the page says of num_items_in_batch
    counts = []

    def watched(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        counts.append(int(num_items_in_batch))
        return variables["drsl"](outputs, labels, num_items_in_batch)

    trainer.compute_loss_func, trainer.args.max_steps = watched, 1
    trainer.train()
    assert counts == [64, 64]
    trainer.evaluate()
    assert counts[2:] == [8] * 8


def test_language_model_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = page("language_model_heads").variables
    trainer, model, tokens = variables["trainer"], variables["model"].eval(), variables["tokens"][:8].clone()
    falls = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(falls) == 4
    assert falls[-1] < 0.7 * falls[0]

    labels = tokens.clone()
    labels[:, :5] = -100
    batch = {"input_ids": tokens, "labels": labels}
    model.zero_grad()
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert outputs.logits.shape[1] == 0
    loss.backward()
    # Of two processes each has a half of the labels that are counted; their gradients are averaged.
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    count = 2 * (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(trainer.compute_loss(model, batch, num_items_in_batch=count), loss)
    got = gradients(model)
    logits, y = model(tokens).logits[:, 4:-1].flatten(0, 1), labels[:, 5:].flatten()
    want, _, _ = loss_and_gradient(logits, y, tau=0.1, distance="uniform")
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert_gradients(got, textbook_gradients(model, logits, y, tau=0.1, distance="uniform"))


def test_lightning() -> None:
    import lightning

    variables = page("lightning").variables
    x, y = variables["x"], variables["y"]

    def mean_loss(model: nn.Module) -> float:
        return loss_and_gradient(model(x), y, **PENALTY)[0].item()

    classifier = variables["classifier"]
    assert variables["trainer"].callback_metrics.keys() == {"loss", "accuracy", "distance"}
    assert mean_loss(classifier) < 0.5 * mean_loss(variables["Classifier"]())
    assert (classifier(x[1297:]).argmax(1) == y[1297:]).float().mean() > 0.85

    class Check(lightning.Callback):
        """Holds each training step against the textbook formula on the batch that it saw."""

        def __init__(self, tolerance: float) -> None:
            self.tolerance, self.steps = tolerance, 0

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_index: int) -> None:
            self.batch = batch

        def on_after_backward(self, trainer: Any, module: Any) -> None:
            images, labels = self.batch
            kept = gradients(module)
            assert_gradients(kept, textbook_gradients(module, module(images), labels, **PENALTY), self.tolerance)
            for name, parameter in module.named_parameters():
                parameter.grad = kept[name]
            self.steps += 1

    for precision, tolerance in (("32-true", 1e-4), ("bf16-mixed", 0.06)):
        check = Check(tolerance)
        trainer = lightning.Trainer(
            max_steps=3, precision=precision, callbacks=[check], logger=False, enable_checkpointing=False
        )
        trainer.fit(variables["Classifier"](), variables["train"])
        assert check.steps == 3


def test_foolbox() -> None:
    import eagerpy
    import foolbox

    variables = page("foolbox").variables
    target, images, labels = variables["target"], variables["images"], variables["labels"]
    clean = foolbox.accuracy(target, images, labels)
    assert clean > 0.85
    for robust in (variables["robust"], variables["robust_log_odds"]):
        assert clean > robust[0] > robust[1] > robust[2]
        assert robust[2] < 0.5 * clean
    for eps, adversarial in zip(variables["epsilons"], variables["adversarial"], strict=True):
        assert (adversarial - images).abs().max() <= eps + 1e-6
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1

    # The attack on the log-odds ascends what the textbook says; and it finds what the cross-entropy hides.
    attack = variables["LogOddsPGD"](steps=20)
    loss_of = attack.get_loss_fn(target, eagerpy.astensor(labels))
    _, gradient = attack.value_and_grad(loss_of, eagerpy.astensor(images))
    leaf = images.clone().requires_grad_()
    logits = variables["model"](leaf)
    logits.backward(loss_and_gradient(logits, labels, truth="log_odds", reduction="sum")[1].float())
    torch.testing.assert_close(gradient.raw, leaf.grad, rtol=1e-4, atol=1e-4)

    class Sure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1000 * variables["model"](x)

    sure = foolbox.PyTorchModel(Sure().eval(), bounds=(0, 1), device="cpu")
    found = [
        one(sure, images, labels, epsilons=[0.2])[2].float().mean()
        for one in (foolbox.attacks.LinfPGD(steps=20), attack)
    ]
    assert found[1] > found[0] + 0.1


def test_attacking() -> None:
    outcome = page("attacking")
    table = outcome.variables["table"]
    worst = table.worst_case()
    assert table.clean_accuracy() > 0.85
    assert worst[0.05] > worst[0.1] > worst[0.2]
    assert all(worst[eps] <= table.of(name, eps).accuracy() for name in table.attacks for eps in worst)
    assert [check.outcome for check in outcome.variables["checks"]][:4] == ["passed"] * 4
    assert "worst case" in outcome.printed


def test_mixup() -> None:
    variables = page("mixup").variables
    falls, one_hot, images = variables["losses"], variables["one_hot"], variables["x"][:64]
    assert sum(falls[-20:]) / 20 < 0.65 * falls[0]
    assert variables["accuracy"] > 0.8
    for blend in (variables["mixup"], variables["cutmix"]):
        mixed, probabilities = blend(images, one_hot[:64])
        assert mixed.shape == images.shape
        assert not torch.equal(mixed, images)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(64))
    # The loss of a blend is the blend of two cross-entropies, and one penalty.
    y, other, logits = variables["y"][:64], variables["y"][64:128], variables["model"](images).detach()
    loss = fused_drsl_loss(logits, 0.25 * one_hot[:64] + 0.75 * one_hot[64:128], tau=0.3, distance="kl")
    log_p = logits.double().log_softmax(1)
    divergence = nn.functional.kl_div(log_p, torch.full_like(log_p, 0.1), reduction="batchmean")
    want = 0.25 * nn.functional.nll_loss(log_p, y) + 0.75 * nn.functional.nll_loss(log_p, other) + 0.3 * divergence
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)


def test_per_sample_gradients() -> None:
    variables = page("per_sample_gradients").variables
    model, x, y = variables["model"], variables["x"], variables["y"]
    for i in range(len(x)):
        image = x[i : i + 1].clone().requires_grad_()
        want = textbook_gradients(model, model(image), y[i : i + 1], tau=0.3, distance="kl")
        assert_gradients({name: g[i] for name, g in variables["by_sample"].items()}, want)
        torch.testing.assert_close(variables["to_input"][i], image.grad[0], rtol=1e-4, atol=1e-6)


def test_gaussian_mixture() -> None:
    """Digits are classified, and noise is farther from every mean."""
    outcome = page("gaussian_mixture")
    falls = losses(outcome.printed)
    assert falls[-1] < 0.3 * falls[0]
    variables = outcome.variables
    logits, y = variables["logits"], variables["y"][1297:]
    assert (logits.argmax(1) == y).float().mean() > 0.85
    assert logits.amax(1).median() > variables["strange"].amax(1).median() + 0.5
    one_hot = nn.functional.one_hot(y, 10)
    want = nn.functional.cross_entropy(logits * (1 + 0.3 * one_hot), y) - (one_hot * logits).sum(1).mean()
    found = variables["head"].loss(variables["body"](variables["x"][1297:]), y, alpha=0.3, likelihood=1.0)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_language_models() -> None:
    outcome = page("language_models")
    falls = losses(outcome.printed)
    assert len(falls) == 6
    assert falls[-1] < 0.8 * falls[0]
    variables = outcome.variables
    score, sequences, exchanged = (variables[name] for name in ("score", "sequences", "exchanged"))
    assert variables["moved"].nats.sum() > 1.05 * score.nats
    assert exchanged.nats[3].sum() > exchanged.nats[0].sum()
    assert torch.equal(exchanged.sequences[:, 16:], sequences[:, 16:])


def test_distributed(tmp_path: Path) -> None:
    path = DOCS / "distributed.md"
    (command,) = blocks(path, "console")
    program, *arguments = shlex.split(command[1])
    (tmp_path / "train.py").write_text(python_of(path))
    with (
        (tmp_path / "errors").open("w+") as errors,
        subprocess.Popen(
            [str(Path(sys.executable).parent / program), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as training,
    ):
        assert training.stdout is not None
        deadline = threading.Timer(120, training.terminate)
        deadline.start()
        printed = "".join(islice(training.stdout, 5))
        deadline.cancel()
        # Not waited for: whatever the loss, gloo may deadlock or abort a process that ends (pytorch issue 190489).
        training.terminate()
        errors.seek(0)
        falls = losses(printed)
        assert len(falls) == 5, errors.read()
    assert falls[-1] < 0.7 * falls[0]
