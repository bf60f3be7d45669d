"""Classes that are spread over processes give the loss and the gradients of classes that are all in one place."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh
from torch.distributed.tensor import Shard as Placement
from torch.nn import functional as F

from drsl_kernels import fused_linear_softmax_loss, parallel_drsl_loss, parallel_softmax_loss, softmax_loss
from drsl_kernels.spec import DISTANCES

ROWS, WIDTH, CLASSES = 9, 6, 39
PROCESSES = 4
MEMBERS: tuple[dict[str, Any], ...] = (
    *({"distance": distance} for distance in DISTANCES),
    {"distance": None},
    {"truth": "gce", "distance": "uniform"},
    {"label_smoothing": 0.1, "distance": "kl"},
    {"activation": "sigsoftmax", "distance": "conditional", "scale": 1.2, "margin": 0.1},
)


def _case(label_classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Logits with masked classes, and labels among the first so many classes, one of them ignored."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(ROWS, CLASSES, generator=generator) * 3
    z[3, 1:30] = -torch.inf
    y = torch.randint(label_classes, (ROWS,), generator=generator)
    y[1], y[2], y[3] = label_classes - 1, -100, 0
    return z, y


def _own_range(parts: int, rank: int) -> tuple[int, int]:
    """Of uneven sizes."""
    return CLASSES * rank // parts, CLASSES * (rank + 1) // parts


def _close(found: Tensor, expected: Tensor) -> None:
    scale = expected[expected.isfinite()].abs().max().clamp(min=1e-6).item() if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6 * scale)


# Among all classes, and all of them the first process's: the others hold no label then.
LABELS = (CLASSES, CLASSES // PROCESSES)


def _logits(group: Any, parts: int, rank: int, label_classes: int) -> None:
    z, y = _case(label_classes)
    first, last = _own_range(parts, rank)
    for member in MEMBERS:
        for reduction in ("mean", "sum", "none"):
            upstream = torch.linspace(0.5, 2, ROWS) if reduction == "none" else torch.tensor(1.3)
            whole, own = z.clone().requires_grad_(), z[:, first:last].clone().requires_grad_()
            tau = torch.tensor(0.4, requires_grad=True)
            options = {**member, "tau": tau, "reduction": reduction, "return_stats": True}
            expected, expected_stats = softmax_loss(whole, y, **options)
            loss, stats = parallel_softmax_loss(own, y, group=group, first_class=first, **options)
            _close(loss, expected)
            for field, wanted in zip(stats[:3], expected_stats[:3], strict=True):
                _close(field, wanted)
            (wanted,) = torch.autograd.grad(expected, whole, upstream, retain_graph=True)
            (gradient,) = torch.autograd.grad(loss, own, upstream, retain_graph=True)
            _close(gradient, wanted[:, first:last])
            if member["distance"] is not None:
                _close(*(torch.autograd.grad(x, tau, upstream)[0] for x in (loss, expected)))


def _linear(group: Any, parts: int, rank: int, label_classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,))
    whole = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    _, y = _case(label_classes)
    first, last = _own_range(parts, rank)
    own = [whole[0].detach().clone(), *(x.detach()[first:last].clone() for x in whole[1:])]
    own = [x.requires_grad_() for x in own]
    for member in MEMBERS[:-1]:
        for reduction in ("mean", "none"):
            options = {**member, "tau": 0.4, "reduction": reduction}
            z = 5 * torch.tanh(F.linear(*whole) * 0.9 / 5)
            expected = softmax_loss(z, y, **options)
            loss = fused_linear_softmax_loss(
                own[0], own[1], y, bias=own[2], group=group, first_class=first, logit_scale=0.9, softcap=5.0,
                memory_budget=_budget(parts), **options,
            )  # fmt: skip
            _close(loss, expected)
            upstream = torch.ones_like(loss)
            wanted = torch.autograd.grad(expected, whole, upstream)
            gradients = torch.autograd.grad(loss, own, upstream)
            _close(gradients[0], wanted[0])
            _close(gradients[1], wanted[1][first:last])
            _close(gradients[2], wanted[2][first:last])


def _budget(parts: int) -> int:
    """Room for five rows where there are fewest classes, with a softcap, and for four where there is one more."""
    logits, gathered = 2 * 4 * (CLASSES // parts), 4 * ((1 + parts) * 9 + parts * 8)
    return 5 * (logits + gathered)


def _distributed_tensors() -> None:
    z, y = _case()
    expected = z.clone().requires_grad_()
    softmax_loss(expected, y, distance="uniform", tau=0.4).backward()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    spread = distribute_tensor(z, mesh, [Placement(1)]).requires_grad_()
    parallel_drsl_loss(spread, y, 0.4).backward()
    assert isinstance(spread.grad, DTensor)
    assert expected.grad is not None
    _close(spread.grad.full_tensor(), expected.grad)
    with _raises(ValueError, "group and first_class must be None for a DTensor"):
        parallel_drsl_loss(spread, y, 0.4, first_class=0)
    with _raises(ValueError, "placement Shard"):
        parallel_drsl_loss(distribute_tensor(z, mesh, [Placement(0)]), y, 0.4)


def _process_without_classes(rank: int) -> None:
    """Nine classes are three for each of three, and the fourth has none."""
    z, y = torch.randn(ROWS, 9, generator=torch.Generator().manual_seed(1)), torch.arange(ROWS) % 9
    expected = z.clone().requires_grad_()
    loss = softmax_loss(expected, y, distance="kl", tau=0.4)
    loss.backward()
    spread = distribute_tensor(z, init_device_mesh("cpu", (PROCESSES,)), [Placement(1)]).requires_grad_()
    found = parallel_drsl_loss(spread, y, 0.4, distance="kl")
    found.backward()
    _close(found, loss)
    _close(spread.grad.full_tensor(), expected.grad)  # type: ignore[union-attr, arg-type]
    # With hidden states that are unit vectors the weight is the logits, transposed.
    weight = z.t()[3 * rank : 3 * rank + 3].clone().requires_grad_()
    options = {"distance": "kl", "tau": 0.4, "group": dist.group.WORLD, "first_class": min(3 * rank, 9)}
    whole = fused_linear_softmax_loss(torch.eye(ROWS), weight, y, **options)
    whole.backward()
    _close(whole, loss)
    assert torch.allclose(weight.grad, expected.grad.t()[3 * rank : 3 * rank + 3], atol=1e-6)  # type: ignore


def _errors(rank: int) -> None:
    z, y = _case()
    first, last = _own_range(PROCESSES, rank)
    own = z[:, first:last]
    with _raises(ValueError, "first_class must make the classes of the processes follow one another"):
        parallel_drsl_loss(own, y, 0.4, first_class=0)
    with _raises(IndexError, "y holds label 39 at row 0"):
        parallel_drsl_loss(own, torch.full_like(y, CLASSES), 0.4, first_class=first)
    with _raises(ValueError, "ignore_index must be negative for classes of several processes, got 3"):
        parallel_drsl_loss(own, y, 0.4, ignore_index=3)
    with _raises(ValueError, r"logits must have shape \(N, C_own\)"):
        parallel_drsl_loss(own[0], y, 0.4)
    with _raises(RuntimeError, "need a compiled backend"):
        parallel_drsl_loss(own, y, 0.4, backend="reference")
    with _raises(RuntimeError, "have no second derivatives"):
        leaf = own.clone().requires_grad_()
        torch.autograd.grad(parallel_drsl_loss(leaf, y, 0.4, first_class=first), leaf, create_graph=True)
    with _raises(RuntimeError, "cannot be transformed by torch.func"):
        torch.func.grad(lambda z: parallel_drsl_loss(z, y, 0.4, first_class=first))(own)
    hidden = torch.randn(ROWS, WIDTH)
    weight = torch.randn(last - first, WIDTH, requires_grad=True)
    with _raises(ValueError, "first_class must make the classes of the processes follow one another"):
        fused_linear_softmax_loss(hidden, weight, y, group=dist.group.WORLD, softcap=5.0, memory_budget=_budget(4))
    with _raises(ValueError, "class_weight must not be of single classes with a group"):
        fused_linear_softmax_loss(hidden, weight, y, class_weight=torch.ones(CLASSES), group=dist.group.WORLD)
    with _raises(ValueError, "activation must be 'softmax' with a group"):
        fused_linear_softmax_loss(hidden, weight, y, activation="sigsoftmax", group=dist.group.WORLD)


@contextmanager
def _raises(error: type[Exception], message: str) -> Iterator[None]:
    with pytest.raises(error, match=message):
        yield


def _process(rank: int, folder: str, failures: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    try:
        for labels in LABELS:
            _logits(None, PROCESSES, rank, labels)
            _logits(pairs[rank // 2], 2, rank % 2, labels)
            _linear(dist.group.WORLD, PROCESSES, rank, labels)
            _linear(pairs[rank // 2], 2, rank % 2, labels)
        _distributed_tensors()
        _process_without_classes(rank)
        _errors(rank)
    except BaseException:
        failures.put(f"process {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # the others may wait for this one
    dist.destroy_process_group()


def test_two_and_four_processes(tmp_path: Path) -> None:
    """One set of processes for everything: they take longer to start than to work."""
    context = multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    processes = [context.Process(target=_process, args=(rank, str(tmp_path), failures)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        if process.exitcode != 0:
            break
    for process in processes:
        process.kill()
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in processes] == [0] * PROCESSES


def test_without_processes_the_error_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        parallel_drsl_loss(torch.zeros(2, 3), torch.tensor([0, 1]), 0.1)
