"""What trains around the loss: data parallelism, micro-batches, checkpoints, data loaders, threads and processes.

Each must give what one plain call in one process gives. Checkpoints and micro-batches of the logits alone are in
test_autograd.py, single calls from several threads in test_threads.py.
"""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, random_labels, random_logits, run
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import drsl_kernels
from drsl_kernels import DRSLLoss, softmax_loss

FEATURES, CLASSES = 6, 5
SECONDS = 100  # more than any child process takes; one that hangs fails its test


def classifier() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES)).double()


def batch(rows: int) -> tuple[Tensor, Tensor]:
    return random_logits(rows, FEATURES, dtype=torch.float64, seed=2), random_labels(rows, classes=CLASSES)


class ModelWithLoss(nn.Module):
    """A model whose forward pass ends in the loss, as trainers like it. `unused` gets no gradient."""

    def __init__(self, loss: DRSLLoss, logits_dtype: torch.dtype = torch.float64, unused: bool = False) -> None:
        super().__init__()
        self.model, self.loss, self.logits_dtype = classifier(), loss, logits_dtype
        self.unused = nn.Linear(2, 2) if unused else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.model(x).to(self.logits_dtype), y)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By parameter, under the names that the module has without its wrapper."""
    return {n.removeprefix("module."): p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


# Data parallelism


def learned_tau(**arguments: Any) -> DRSLLoss:
    return DRSLLoss(nn.Parameter(torch.tensor(0.5, dtype=torch.float64)), **arguments)


# Per case: the module, and the arguments that DistributedDataParallel gets.
PARALLEL: dict[str, tuple[Callable[[str], nn.Module], dict[str, Any]]] = {
    "learned_tau": (lambda backend: ModelWithLoss(learned_tau(backend=backend)), {}),
    "unused_parameters": (
        lambda backend: ModelWithLoss(learned_tau(distance="kl", backend=backend), unused=True),
        {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    ),
    "float16_logits": (lambda backend: ModelWithLoss(learned_tau(backend=backend), torch.float16), {}),
    "class_weights": (  # buffers are sent from rank 0 before each forward pass
        lambda backend: ModelWithLoss(DRSLLoss(torch.tensor(0.5), torch.ones(CLASSES), backend=backend)),
        {},
    ),
    "accumulated": (lambda backend: ModelWithLoss(learned_tau(backend=backend)), {}),
    "checkpointed": (lambda backend: Checkpointed(learned_tau(backend=backend)), {"static_graph": True}),
    "probabilities": (lambda backend: ModelWithLoss(learned_tau(backend=backend)), {}),
}


class Checkpointed(ModelWithLoss):
    """Keeps nothing of the forward pass, the loss included."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = checkpoint(super().forward, x, y, use_reentrant=False)
        return loss


def train(case: str, module: nn.Module, rows: slice) -> dict[str, Tensor]:
    """Gradients of the mean loss over some rows of the joint batch, in two micro-batches if the case says so."""
    x, y = batch(16)
    if case == "probabilities":
        y = random_logits(16, CLASSES, dtype=torch.float64, seed=3).softmax(1)
    parts = [(x[rows], y[rows])]
    if case == "accumulated":
        parts = list(zip(x[rows].chunk(2), y[rows].chunk(2), strict=True))
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        quiet: AbstractContextManager[Any] = nullcontext()
        if isinstance(module, DistributedDataParallel) and not last:
            quiet = module.no_sync()
        with quiet:
            (module(*part) / len(parts)).backward()
    return gradients(module)


def one_of_two(rank: int, folder: Path, backends: list[str], sent: DRSLLoss) -> None:
    """The work of one process, which writes its gradients to a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", world_size=2, rank=rank)
    results: dict[str, Any] = {"sent": sent(*logits_of_batch())}
    for backend, case in itertools.product(backends, PARALLEL):
        make, arguments = PARALLEL[case]
        module = DistributedDataParallel(make(backend), **arguments)
        results[f"{backend}, {case}"] = train(case, module, slice(8 * rank, 8 * rank + 8))
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def logits_of_batch() -> tuple[Tensor, Tensor]:
    return random_logits(8, CLASSES), random_labels(8, classes=CLASSES)


def usable() -> list[str]:
    return [b.name for b in drsl_kernels.info().backends if b.usable and b.name != "cuda"]


@pytest.mark.slow
def test_two_processes_are_one_on_the_joint_batch(tmp_path: Path) -> None:
    """DistributedDataParallel over gloo. One test for all cases: each would have to start the processes anew."""
    sent = DRSLLoss(torch.tensor(0.25), torch.rand(CLASSES), distance="kl", label_smoothing=0.1)
    processes = multiprocessing.start_processes(
        one_of_two, (tmp_path, usable(), sent), nprocs=2, join=False, start_method="spawn"
    )
    join(processes)
    got = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for backend, case in itertools.product(usable(), PARALLEL):
        want = train(case, PARALLEL[case][0](backend), slice(0, 16))
        assert want
        tolerance = 1e-3 if case == "float16_logits" else 1e-9
        for rank in range(2):
            torch.testing.assert_close(got[rank][f"{backend}, {case}"], want, rtol=tolerance, atol=tolerance)
    assert torch.equal(got[0]["sent"], sent(*logits_of_batch()))


def join(processes: multiprocessing.ProcessContext) -> None:
    """Wait for spawned processes. An error in one is raised here, and none outlives the test."""
    end = time.monotonic() + SECONDS
    try:
        while not processes.join(SECONDS):  # returns whenever one of them has ended
            assert time.monotonic() < end, "a process hangs"
    finally:
        for process in processes.processes:
            process.kill()


# Micro-batches


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_uneven_micro_batches_are_one_batch(reduction: str, backend: str) -> None:
    """With ignored rows among them, and one micro-batch in which no row counts."""
    x, y = batch(13)
    y[2], y[8:11] = -100, -100

    def accumulate(sizes: list[int]) -> dict[str, Tensor]:
        module = ModelWithLoss(learned_tau(reduction=reduction, backend=backend))
        for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
            loss = module(part_x, part_y)
            if reduction == "mean":
                loss = (loss * (part_y != -100).sum()).nan_to_num()
            loss.sum().backward()
        return gradients(module)

    for sizes in ([1, 7, 3, 2], [5, 5, 3]):
        torch.testing.assert_close(accumulate(sizes), accumulate([13]))


# Activation checkpoints


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("around", ["model", "loss", "both", "each"])
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_checkpoints(dtype: str, around: str, use_reentrant: bool, backend: str) -> None:
    """The same bits as without, with dropout before the loss and a learned tau in it."""
    x, y = batch(9)
    x.requires_grad_()  # reentrant checkpoints want that

    def train(kept: bool) -> dict[str, Tensor]:
        module = ModelWithLoss(learned_tau(backend=backend))
        torch.manual_seed(5)

        def through(wrapped: bool, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
            if kept or not wrapped:
                return function(*inputs)
            result: Tensor = checkpoint(function, *inputs, use_reentrant=use_reentrant)
            return result

        def logits_of(x: Tensor) -> Tensor:
            return nn.functional.dropout(module.model(x), 0.3).to(DTYPES[dtype])

        def whole(x: Tensor) -> Tensor:
            logits = through(around in ("model", "each"), logits_of, x)
            return through(around in ("loss", "each"), module.loss, logits, y)

        x.grad = None
        (3 * through(around == "both", whole, x)).backward()
        assert x.grad is not None
        return {"x": x.grad, **gradients(module)}

    torch.testing.assert_close(train(kept=False), train(kept=True), rtol=0, atol=0)


# Data loaders and processes


class Losses(Dataset[tuple[Tensor, Tensor]]):
    """Item i is the loss of batch i and its gradient, computed where the item is asked for."""

    def __init__(self, losses: list[DRSLLoss], rows: int) -> None:
        self.losses, self.rows = losses, rows

    def __len__(self) -> int:
        return 2 * len(self.losses)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        z = random_logits(self.rows, 10, seed=item).requires_grad_()
        loss = self.losses[item // 2](z, random_labels(self.rows, classes=10))
        loss.backward()
        assert z.grad is not None
        return loss.detach(), z.grad


def compare_with_workers(losses: list[DRSLLoss], rows: int, workers: int, context: str) -> None:
    """The bits that this process gets. It runs first, so that its threads exist when a worker is forked."""
    data = Losses(losses, rows)
    want = [data[i] for i in range(len(data))]
    loader = DataLoader(
        data, batch_size=None, num_workers=workers, multiprocessing_context=context, timeout=SECONDS, prefetch_factor=1
    )
    for _ in range(2):
        assert_same(list(map(tuple, loader)), want)


def assert_same(got: list[tuple[Tensor, ...]], want: list[tuple[Tensor, ...]]) -> None:
    assert len(got) == len(want)
    for a, b in zip(itertools.chain(*got), itertools.chain(*want), strict=True):
        assert torch.equal(a, b)


def test_workers_that_fork_after_use(two_threads: None, backend: str) -> None:
    """OpenMP's threads do not live on in a forked process: a worker must not wait for them."""
    rows = 50 if backend == "triton" else 1000 if backend == "cuda" else 20000  # many enough for two threads
    compare_with_workers([DRSLLoss(0.5, torch.rand(10), backend=backend)], rows, 2, "fork")


def test_workers_that_are_spawned() -> None:
    losses = [DRSLLoss(torch.tensor(0.5), torch.rand(10), distance="kl", backend=name) for name in usable()]
    data = Losses(losses, 50)
    got = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="spawn", timeout=SECONDS)
    assert_same(list(map(tuple, got)), [data[i] for i in range(len(data))])


def answer(inbox: Any, outbox: Any) -> None:
    """In a forked process."""
    torch.set_num_threads(1)  # as DataLoader does: no process can go on with the OpenMP threads of its parent
    module, z, y = inbox.get()
    z.requires_grad_()
    loss = module(z, y)
    loss.backward()
    module.tau.fill_(2.0)
    outbox.put((loss.detach(), z.grad))
    inbox.get()  # what was sent is shared memory of this process until the other one has it


def test_a_module_goes_through_a_queue(two_threads: None, backend: str) -> None:
    module = DRSLLoss(torch.tensor(0.5), torch.rand(CLASSES), backend=backend).share_memory()
    z, y = logits_of_batch()
    want = run(z, y, 0.5, distance="uniform", weight=module.weight, backend=backend)
    context = multiprocessing.get_context("fork")
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=answer, args=(inbox, outbox))
    process.start()
    try:
        inbox.put((module, z, y))
        loss, grad = outbox.get(timeout=SECONDS)
        assert torch.equal(loss, want[0])
        assert torch.equal(grad, want[1])
        assert module.tau == 2.0  # shared, so that one process can change it for all
        inbox.put(None)
        process.join(SECONDS)
        assert process.exitcode == 0
    finally:
        process.kill()


# Threads

CALLS: list[dict[str, Any]] = [
    {"distance": "uniform"},
    {"distance": "kl", "label_smoothing": 0.1},
    {"distance": "non_target_logits", "reduction": "none"},
    {"distance": "conditional", "reduction": "sum"},
    {"distance": "non_target", "weight": random_logits(37, seed=4).exp()},
    {"truth": "gce", "q": 0.5},
    {"truth": "log_odds", "margin": 0.5, "scale": 2.0},
    {"distance": "uniform", "soft": True},
]


def job(i: int, rows: int, backend: str) -> tuple[Tensor, ...]:
    """Loss, gradient, gradient of tau and second derivative of the i-th of many different calls."""
    arguments = dict(CALLS[i % len(CALLS)])
    rows, dtype = rows + 7 * (i % 3), list(DTYPES.values())[i // 2 % 4]
    z = random_logits(rows, 37, dtype=dtype, seed=i).requires_grad_()
    y = random_labels(rows, classes=37, seed=i)
    if arguments.pop("soft", False):
        y = random_logits(rows, 37, seed=i).softmax(1)
    tau = torch.tensor(0.1 * i, requires_grad=True)
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16) if i % 3 else nullcontext():
            loss = softmax_loss(z, y, tau=tau, backend=backend, **arguments)
        first = torch.autograd.grad(3 * loss.sum(), (z, tau), retain_graph=True, materialize_grads=True)
    slope = torch.autograd.grad(loss.sum(), z, create_graph=True)[0]
    return loss.detach(), *first, *torch.autograd.grad(slope.float().square().sum(), z)


@pytest.mark.backends("cpp", "reference", "cuda")  # Triton's interpreter is for one thread
def test_different_calls_from_many_threads(backend: str) -> None:
    """Values, first and second derivatives, of every dtype, some of them under autocast: the bits of serial calls."""
    rows = {"cpp": 8000, "reference": 50, "cuda": 20}[backend]
    want = [job(i, rows, backend) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: job(i, rows, backend), range(24)))
    assert_same(got, want)


@pytest.mark.backends("cpp", "reference", "cuda")
def test_one_module_and_its_copies_in_many_threads(backend: str) -> None:
    """Threads share a module, copy it, and go backward through graphs that others have made."""
    module = DRSLLoss(nn.Parameter(torch.tensor(0.5)), torch.rand(CLASSES), distance="kl", backend=backend)
    z, y = logits_of_batch()
    graphs = [(leaf := (z + i).requires_grad_(), module(leaf, y)) for i in range(40)]
    want = [torch.autograd.grad(module(leaf, y), (leaf, module.tau)) for leaf, _ in graphs]

    def backward(graph: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        leaf, loss = graph
        twin = copy.deepcopy(module)
        theirs = torch.autograd.grad(twin(leaf, y), (leaf, twin.tau))
        ours = torch.autograd.grad(loss, (leaf, module.tau))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        return ours

    with ThreadPoolExecutor(8) as pool:
        assert_same(list(pool.map(backward, graphs)), want)


@pytest.mark.backends("cpp", "reference", "cuda")
def test_a_learned_tau_accumulates_from_many_threads(backend: str) -> None:
    """Each thread adds to the same .grad, which the engine guards."""
    module = DRSLLoss(nn.Parameter(torch.tensor(0.5)), backend=backend)
    z, y = logits_of_batch()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: module(z, y).backward(), range(64)))
    torch.testing.assert_close(module.tau.grad, 64 * torch.autograd.grad(module(z, y), module.tau)[0])
