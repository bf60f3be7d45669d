"""The byte formulas of benchmarks/scale.py are those of the tensors that the code makes.

Relies on scale.py; its times are assumptions, which nothing here can test.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
from code_blocks import ROOT
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(ROOT / "benchmarks"))
import scale

from drsl_kernels import fused_linear_softmax_loss, linear_chunks, shards
from drsl_kernels.backends import choose_pieces
from drsl_kernels.backends.pieces import Pieces, Shard
from drsl_kernels.linear_chunks import Layer
from drsl_kernels.shards import ClassShard
from drsl_kernels.spec import loss_spec

SPEC = loss_spec("ce", 0.7, "uniform", 1.0, 0.0, -100, "none", 0.0, 0.0, "softmax", False)


class Made(TorchDispatchMode):
    """Operators that ran, but for views, and bytes of what they returned."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        size = result.nbytes if isinstance(result, Tensor) else 0
        schema = function._schema
        if schema.is_mutable or all(given.alias_info is None for given in schema.returns):
            self.operators.append((function.overloadpacket.__name__, size))
        return result

    def count(self, size: int, *names: str) -> int:
        return sum(bytes_ == size and (not names or name in names) for name, bytes_ in self.operators)


def _pieces(monkeypatch: pytest.MonkeyPatch) -> Pieces:
    """The compiled ones, which an operator that watches others would have replaced by the reference."""
    pieces = choose_pieces(torch.empty(1, 1), "cpp")
    monkeypatch.setattr(linear_chunks, "choose_pieces", lambda *_: pieces)
    monkeypatch.setattr(linear_chunks, "shard_pieces", lambda *_: pieces)
    return pieces


def _three_alike(monkeypatch: pytest.MonkeyPatch, classes: int) -> dict[str, int]:
    """Three processes that all hold the same logits, without processes; what the gather was given."""
    seen: dict[str, int] = {}

    def all_gather(everywhere: Tensor, packed: Tensor, group: Any) -> None:
        seen.update(packed=packed.nbytes, everywhere=everywhere.nbytes)
        parts = everywhere.view(3, *packed.shape)
        parts.copy_(packed.expand_as(parts))
        parts[:, -1, 0] = torch.arange(3.0) * classes

    monkeypatch.setattr(shards.dist, "get_world_size", lambda group: 3)
    monkeypatch.setattr(shards.dist, "all_gather_single", all_gather, raising=False)
    monkeypatch.setattr(shards.dist, "all_gather_into_tensor", all_gather)
    monkeypatch.setattr(linear_chunks.dist, "all_reduce", lambda tensor, group: seen.update(hidden=tensor.nbytes))
    return seen


def test_rows_of_a_chunk_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scale.BUDGET == linear_chunks.GPU_BUDGET
    layouts = [layout for gpus in scale.GPUS for layout in scale.layouts(gpus, 8).values()]
    for layout, budget in product(layouts, (1, 2**21, 2**29)):
        sizes = (layout.rows, layout.classes)
        hidden, weight = (torch.empty(n, 8, device="meta", dtype=torch.bfloat16) for n in sizes)
        monkeypatch.setattr(shards.dist, "get_world_size", lambda group, parts=layout.group: parts)
        shard = ClassShard(None, 0, even=True) if layout.group > 1 else None  # type: ignore[arg-type]
        expected = linear_chunks.chunk_rows(Layer(hidden, weight, None, 1.0, None, shard), budget, True)
        assert scale.chunk_rows(layout, budget) == expected, (layout, budget)
        assert expected == 1 or scale.chunk_bytes(layout, budget) <= budget + scale.gathered_bytes(0, layout.group)


def test_tensors_of_the_fused_linear_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk, float32 sum, gradient of the hidden states, and the bfloat16 gradient of the backward pass."""
    monkeypatch.setattr(scale, "TOKENS", 96)
    monkeypatch.setattr(scale, "CLASSES", 640)
    layout, budget = scale.Layout(1, 1, 24), 32 * 640 * 2
    hidden = torch.randn(96, 24, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(640, 24, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randint(640, (96,))
    fused_linear_softmax_loss(hidden, weight, y, memory_budget=budget).backward()
    assert weight.grad is not None
    assert weight.grad.nbytes == 2 * layout.weights
    _pieces(monkeypatch)
    spec = loss_spec("ce", 0.7, None, 1.0, 0.0, -100, "mean", 0.0, 0.0, "softmax", False)
    layer = Layer(hidden.detach(), weight.detach(), None, 1.0, None)
    target = linear_chunks.Target(y, 0.0, None, None, spec)
    needs = linear_chunks.Needs(True, True, False, False)
    rows = scale.chunk_rows(layout, budget)
    with Made() as made:
        found = linear_chunks.run(
            layer, target, torch.ones(1), needs, with_reports=False, rows_at_a_time=rows, backend=None
        )
    assert scale.chunk_count(layout, budget) == 3
    assert made.count(scale.chunk_bytes(layout, budget), "new_empty") == 1, "one buffer for all chunks"
    assert made.count(scale.accumulator_bytes(layout), "empty_like") == 1
    assert made.count(scale.hidden_bytes(layout), "empty_like") == 1
    assert found.weight is not None
    assert found.weight.nbytes == scale.accumulator_bytes(layout) == 4 * weight.numel()
    assert scale.peak_bytes(layout, budget) == 2 * 96 * 24 * 2 + 640 * 24 * (2 + 4) + max(640 * 24 * 2, 32 * 640 * 2)


@pytest.mark.parametrize("sharded", [False, True])
def test_operators_of_a_chunk(sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than the page says, of which each is a launch or a few; and one gather where there is a group."""
    seen = _three_alike(monkeypatch, 50)
    _pieces(monkeypatch)
    shard = ClassShard(None, 0) if sharded else None  # type: ignore[arg-type]
    hidden, weight = torch.randn(16, 8), torch.randn(50, 8)
    layer = Layer(hidden, weight, None, 1.0, None, shard)
    target = linear_chunks.Target(torch.randint(50, (16,)), 0.3, None, None, SPEC)
    counts = []
    for rows in (16, 8):
        with Made() as made:
            linear_chunks.run(
                layer,
                target,
                torch.ones(1),
                linear_chunks.Needs(True, True, False, False),
                with_reports=False,
                rows_at_a_time=rows,
                backend=None,
            )
        counts.append(len(made.operators))
    assert counts[1] - counts[0] < (scale.SHARD_OPERATORS if sharded else scale.OPERATORS)
    assert seen.get("hidden", 0) == (hidden.nbytes if sharded else 0)


def test_what_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, classes, parts = 12, 40, 3
    seen = _three_alike(monkeypatch, classes)
    logits = torch.randn(rows, classes)
    pieces = _pieces(monkeypatch)
    gathered = ClassShard(None, 0).gather(pieces, logits, torch.randint(3 * classes, (rows,)), SPEC)  # type: ignore[arg-type]
    assert seen["packed"] == scale.packed_bytes(rows) == 36 * (rows + 1)
    assert gathered.shard.stats.shape == (rows, parts, scale.STATS)
    assert sum(seen.values()) + gathered.shard.stats.nbytes == scale.gathered_bytes(rows, parts)
    outweighs = [n for n in range(2, 1025) if scale.gathered_bytes(10**6, n) > 2 * 10**6 * scale.CLASSES / n]
    assert outweighs == list(range(88, 1025)), "as the page says"


def test_bytes_at_the_peak_of_whole_logits() -> None:
    z, y = torch.randn(8, 50, requires_grad=True), torch.randint(50, (8,))
    with Made() as made:
        F.cross_entropy(z, y).backward()
    names = ("_log_softmax", "nll_loss_backward", "_log_softmax_backward_data")
    assert made.count(z.nbytes, *names) == 3
    assert scale.materialised_bytes(8, 50, 12) == 3 * z.nbytes


@pytest.mark.parametrize(("ranks", "per_node"), [(4, 8), (8, 4), (6, 1), (12, 2)])
def test_bytes_of_a_gather_are_those_of_its_deliveries(ranks: int, per_node: int) -> None:
    """Counted piece by piece: each other node gets it over one adapter, and hands it on to the GPUs that lack it."""
    local, nodes = min(ranks, per_node), max(1, ranks // per_node)
    inside = outside = 0
    for piece, node in product(range(ranks), range(nodes)):
        outside += piece // local != node
        inside += local - 1
    sent = scale.gather_wire(ranks, ranks, per_node)
    assert sent.network * ranks == pytest.approx(outside)
    assert sent.nvlink * ranks == pytest.approx(inside)


@pytest.mark.parametrize("parts", [64, 1024])
def test_many_parts_merge_in_float32(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient of 262,144 classes in so many parts, against the textbook's in float64."""
    rows, classes = 3, scale.CLASSES
    generator = torch.Generator().manual_seed(parts)
    z = torch.randn(rows, classes, generator=generator) * 4
    y = torch.tensor([0, classes // 2, classes - 1])
    pieces = _pieces(monkeypatch)
    assert pieces.row_stats is not None
    own, each = z.split(classes // parts, dim=1), classes // parts
    local = [torch.where((y - i * each >= 0) & (y - i * each < each), y - i * each, -1) for i in range(parts)]
    stats = torch.stack([pieces.row_stats(part, at, SPEC) for part, at in zip(own, local, strict=True)], 1)
    shard = Shard(z.gather(1, y[:, None]).squeeze(1), stats.contiguous())
    losses, gradients = [], []
    for part, at in zip(own, local, strict=True):
        gradient = part.clone()
        found = pieces.over_logits(
            gradient, at, 0.3, None, None, SPEC, upstream=torch.ones(1), with_tau=False, with_reports=False, shard=shard
        )
        losses.append(found.rows)
        gradients.append(gradient)
    assert all(torch.equal(loss, losses[0]) for loss in losses), "every process computes the same bits"
    wide = z.double().requires_grad_()
    expected = _textbook(wide, y, 0.3)
    (gradient,) = torch.autograd.grad(expected.sum(), wide)
    assert ((losses[0] - expected).abs() / expected).max() < scale.MERGE_ERROR
    error = (torch.cat(gradients, 1) - gradient).abs().amax(1) / gradient.abs().amax(1)
    assert error.max() < scale.MERGE_ERROR


def _textbook(z: Tensor, y: Tensor, tau: float) -> Tensor:
    """Cross-entropy plus tau times the squared distance of the softmax from evenness."""
    p = torch.softmax(z, 1)
    distance = (p.square().sum(1) - 1 / z.shape[1]).clamp(min=0)
    return -torch.log_softmax(z, 1).gather(1, y[:, None]).squeeze(1) + tau * distance


def test_the_script() -> None:
    script = str(ROOT / "benchmarks" / "scale.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert all(table in done.stdout for table in scale.tables().values())
