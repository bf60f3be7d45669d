"""What the head and the loss of a large language model need on 8, 64 and 1,024 GPUs: `python benchmarks/scale.py`.

Nothing is measured here. Bytes follow from the code (tests/test_scale.py holds them to it), times from data sheets and
assumed shares of them. Prints the tables of docs/scale.md, which `readme.py` fills in. Relies on
benchmarks/results/gpu_prediction.json for what the loss's kernels take of a copy's time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

CLASSES, TOKENS = 1 << 18, 1 << 20
WIDTHS, GPUS, PER_NODE = (4096, 8192), (8, 64, 1024), 8
BUDGET = 512 << 20  # bytes of logits at a time, see drsl_kernels/linear_chunks.py
STATS = 8  # float32 numbers of a row and part; with the label's logit, nine are gathered
ADAM = 12  # bytes per weight: float32 weight and two moments
OPERATORS, SHARD_OPERATORS = 12, 60  # of a chunk, fewer; each is a launch or a few
MERGE_ERROR = 2e-7  # of a row's loss, relative to float64, with 64 and 1,024 parts: less
PREDICTIONS = Path(__file__).parent / "results" / "gpu_prediction.json"

# Assumed shares of what the data sheets say, and seconds of a step of a ring (NCCL's src/graph/tuning.cc, "Simple").
MATMUL, MEMORY, NVLINK, NETWORK = 0.7, 0.9, 0.8, 0.9
RING_BASE, RING_NVLINK, RING_NETWORK = 8.4e-6, 3.4e-6, 9.6e-6


class Chip(NamedTuple):
    """Per GPU: operations per second, bytes, bytes per second (of NVLink and network in one direction)."""

    name: str
    flops: float
    memory: float
    bandwidth: float
    nvlink: float
    network: float


H100 = Chip("H100", 989e12, 80e9, 3.35e12, 450e9, 50e9)
H200 = Chip("H200", 989e12, 141e9, 4.8e12, 450e9, 50e9)
B200 = Chip("B200", 2250e12, 180e9, 8.0e12, 900e9, 50e9)
CHIPS = (H100, H200, B200)


@dataclass(frozen=True)
class Layout:
    """`gpus` of which each `group` of neighbours shares classes and rows; the groups divide the tokens."""

    gpus: int
    group: int
    width: int

    @property
    def rows(self) -> int:
        return TOKENS * self.group // self.gpus

    @property
    def classes(self) -> int:
        return CLASSES // self.group

    @property
    def weights(self) -> int:
        """Weights at work on a GPU."""
        return self.classes * self.width


class Wire(NamedTuple):
    """Bytes that one GPU sends within its node, and to other nodes."""

    nvlink: float
    network: float

    def __add__(self, other: Wire) -> Wire:  # type: ignore[override]
        return Wire(self.nvlink + other.nvlink, self.network + other.network)

    def times(self, factor: float) -> Wire:
        return Wire(self.nvlink * factor, self.network * factor)


class Seconds(NamedTuple):
    """Of one step, on each GPU; nothing overlaps."""

    products: float
    loss: float
    scaling: float
    wire: float
    latency: float


def materialised_bytes(rows: int, classes: int, of_each: int = 4) -> int:
    """Whole logits: bfloat16 and a gradient beside them (4 bytes each), or float32 `F.cross_entropy` (12).

    The 12 are the tensors at the peak of its backward pass: log-probabilities, the gradient that reaches them, and the
    one that leaves.
    """
    return rows * classes * of_each


def packed_bytes(rows: int) -> int:
    """What a rank gives to one gather of `ClassShard`: nine float32 per row, and a row that says which classes."""
    return (rows + 1) * (STATS + 1) * 4


def gathered_bytes(rows: int, parts: int) -> int:
    """At the end of a gather: what was given, what everybody gave, and their statistics without the labels' logits."""
    return packed_bytes(rows) * (1 + parts) + rows * parts * STATS * 4 if parts > 1 else 0


def chunk_rows(layout: Layout, budget: int = BUDGET) -> int:
    """Rows at a time whose logits, and what is gathered for them, fit; `linear_chunks.chunk_rows` without a softcap."""
    parts = layout.group
    per_row = 2 * layout.classes + (gathered_bytes(1, parts) - gathered_bytes(0, parts))
    most = max(1, budget // per_row)
    chunks = max(1, -(-layout.rows // most))
    return max(1, min(most, -(-layout.rows // (16 * chunks)) * 16))


def chunk_count(layout: Layout, budget: int = BUDGET) -> int:
    return -(-layout.rows // chunk_rows(layout, budget))


def chunk_bytes(layout: Layout, budget: int = BUDGET) -> int:
    """Logits of a chunk, and what is gathered for them."""
    rows = chunk_rows(layout, budget)
    return rows * layout.classes * 2 + gathered_bytes(rows, layout.group)


def accumulator_bytes(layout: Layout) -> int:
    """The float32 gradient of the weights, from the forward pass to the backward pass of the head."""
    return 4 * layout.weights


def hidden_bytes(layout: Layout) -> int:
    """bfloat16 hidden states or their gradient, of the rows of the group."""
    return 2 * layout.rows * layout.width


def peak_bytes(layout: Layout, budget: int = BUDGET) -> int:
    """Weight, hidden states, the gradients of both, and the larger of a chunk and the gradient's bfloat16 copy."""
    weight = 2 * layout.weights
    return weight + accumulator_bytes(layout) + 2 * hidden_bytes(layout) + max(weight, chunk_bytes(layout, budget))


def gather_wire(size: float, ranks: int, per_node: int = PER_NODE) -> Wire:
    """All-gather (or reduce-scatter) of `size` bytes in all, in a node and then across nodes on all their adapters.

    Within a node (n - 1) / n of the size per GPU, as NCCL's bus bandwidth counts it; of the rest each adapter brings
    its part. An all-reduce is twice that.
    """
    local = min(ranks, per_node)
    nodes = ranks // local
    return Wire(size * (local - 1) / local, size * (nodes - 1) / nodes / local)


def weight_wire(layout: Layout) -> Wire:
    """The bfloat16 gradient of the weights, summed over the groups.

    FSDP sends as much: the weight is gathered once, the gradient scattered once.
    """
    groups = layout.gpus // layout.group
    per_node = max(1, PER_NODE // layout.group)
    return gather_wire(2 * layout.weights, groups, per_node).times(2)


def group_wire(layout: Layout) -> Wire:
    """Hidden states brought together, their gradient summed, and nine numbers per row and rank."""
    if layout.group == 1:
        return Wire(0, 0)
    hidden = gather_wire(hidden_bytes(layout), layout.group).times(3)
    per_chunk = packed_bytes(chunk_rows(layout)) * layout.group
    return hidden + gather_wire(per_chunk, layout.group).times(chunk_count(layout))


def gather_seconds(ranks: int) -> float:
    """Latency of a ring: its start, and a step to every other rank."""
    nodes = -(-ranks // PER_NODE)
    return RING_BASE + (ranks - nodes) * RING_NVLINK + (nodes - 1) * RING_NETWORK


def weight_product_seconds(rows: float, layout: Layout, chip: Chip) -> tuple[float, float]:
    """Of a chunk's share of the weight's gradient: arithmetic, and memory, as the sum is read and written each time."""
    traffic = 2 * accumulator_bytes(layout) + 2 * rows * (layout.classes + layout.width)
    return 2 * rows * layout.weights / (MATMUL * chip.flops), traffic / (MEMORY * chip.bandwidth)


def scaling_seconds(layout: Layout, chip: Chip) -> float:
    """The backward pass: the sums times the upstream gradient, float32 to bfloat16, and the hidden states' in place."""
    return (6 * layout.weights + 2 * hidden_bytes(layout)) / (MEMORY * chip.bandwidth)


def loss_copies(classes: int, *, sharded: bool) -> float:
    """Time of the loss's kernels over that of a copy of the logits, at worst, as predicted for the nearest shape.

    Statistics of a shard are a pass of their own: one more reading, which is half a copy.
    """
    rows = [row for row in json.loads(PREDICTIONS.read_text())["predictions"] if row["dtype"] == "bf16"]
    nearest = min(rows, key=lambda row: abs(row["classes"] - classes))
    return float(nearest["at_worst"]) + (0.5 if sharded else 0.0)


def seconds(layout: Layout, chip: Chip) -> Seconds:
    """What a step takes; matrix products at MATMUL of the peak, unless the float32 sum is what is waited for."""
    chunks = chunk_count(layout)
    arithmetic, memory = weight_product_seconds(layout.rows / chunks, layout, chip)
    products = chunks * (2 * arithmetic + max(arithmetic, memory))
    parts = layout.group
    logits = 2 * layout.rows * layout.classes
    copy = 2 * logits / (MEMORY * chip.bandwidth)
    statistics = layout.rows * parts * (36 + 32 + 32) if parts > 1 else 0  # gathered, rearranged, read by the kernel
    loss = loss_copies(layout.classes, sharded=parts > 1) * copy + statistics / (MEMORY * chip.bandwidth)
    sent = weight_wire(layout) + group_wire(layout)
    wire = sent.nvlink / (NVLINK * chip.nvlink) + sent.network / (NETWORK * chip.network)
    latency = chunks * gather_seconds(parts) if parts > 1 else 0.0
    return Seconds(products, loss, scaling_seconds(layout, chip), wire, latency)


def layouts(gpus: int, width: int) -> dict[str, Layout]:
    """The ways to lay out a head on so many GPUs, for rows and classes alike."""
    found = {"data parallel": Layout(gpus, 1, width), "classes in a node": Layout(gpus, PER_NODE, width)}
    return found if gpus == PER_NODE else found | {"classes everywhere": Layout(gpus, gpus, width)}


# ---------------------------------------------------------------------------------------------------------
# Tables


def chip_table() -> str:
    """What the data sheets say."""
    heads = ["", "bf16, TFLOP/s", "memory, GB", "memory, TB/s", "NVLink, GB/s", "network, GB/s", "FLOP per byte"]
    lines = []
    for chip in CHIPS:
        rates = (chip.nvlink / 1e9, chip.network / 1e9, chip.flops / chip.bandwidth)
        memory = [f"{chip.memory / 1e9:.0f}", f"{chip.bandwidth / 1e12:.2f}"]
        lines.append([chip.name, f"{chip.flops / 1e12:.0f}", *memory, *(f"{rate:.0f}" for rate in rates)])
    return _table(heads, lines)


def logits_table() -> str:
    """Whole logits of one GPU's rows."""
    heads = ["GPUs", "rows per GPU", "logits, bf16", "with gradient", "float32 `F.cross_entropy`", "elements / 2^31"]
    lines = []
    for gpus in GPUS:
        rows = TOKENS // gpus
        sizes = [materialised_bytes(rows, CLASSES, of_each) for of_each in (2, 4, 12)]
        lines.append([str(gpus), f"{rows:,}", *map(_gigabytes, sizes), f"{rows * CLASSES / 2**31:g}"])
    return _table(heads, lines)


def memory_table() -> str:
    """Bytes per GPU for each layout."""
    heads = [
        "GPUs",
        "H",
        "layout",
        "rows",
        "classes",
        "chunk",
        "float32 sum",
        "hidden",
        "peak",
        "Adam",
        "Adam, sharded",
    ]
    lines = []
    for gpus in GPUS:
        for width in WIDTHS:
            for name, layout in layouts(gpus, width).items():
                sizes = [chunk_bytes(layout), accumulator_bytes(layout), 2 * hidden_bytes(layout), peak_bytes(layout)]
                cells = [str(gpus), str(width), name, f"{layout.rows:,}", f"{layout.classes:,}"]
                lines.append([*cells, *map(_gigabytes, [*sizes, ADAM * layout.weights, ADAM * CLASSES * width / gpus])])
    return _table(heads, lines, words=3)


def wire_table() -> str:
    """What each GPU sends per step."""
    heads = [
        "GPUs",
        "H",
        "layout",
        "weights: NVLink",
        "network",
        "rows: NVLink",
        "network",
        "gathers",
        "latency of one",
    ]
    lines = []
    for gpus in GPUS:
        for width in WIDTHS:
            for name, layout in layouts(gpus, width).items():
                sent = [*weight_wire(layout), *group_wire(layout)]
                gathers = chunk_count(layout) if layout.group > 1 else 0
                latency = f"{gather_seconds(layout.group) * 1e6:.0f} us" if gathers else ""
                lines.append([str(gpus), str(width), name, *map(_gigabytes, sent), str(gathers), latency])
    return _table(heads, lines, words=3)


def time_table() -> str:
    """Milliseconds of a step on H200, term by term."""
    heads = ["GPUs", "H", "layout", "chunks", "products", "loss", "scaling", "wire", "latency", "sum"]
    lines = []
    for gpus in GPUS:
        for width in WIDTHS:
            for name, layout in layouts(gpus, width).items():
                found = seconds(layout, H200)
                chunks = f"{chunk_count(layout):,}"
                lines.append([str(gpus), str(width), name, chunks, *map(_milliseconds, [*found, sum(found)])])
    return _table(heads, lines, words=3)


def chips_table() -> str:
    """The sum of a step on every chip, H = 4096."""
    lines = []
    for gpus in GPUS:
        for name, layout in layouts(gpus, WIDTHS[0]).items():
            fits = [peak_bytes(layout) < chip.memory for chip in CHIPS]
            sums = [_milliseconds(sum(seconds(layout, chip))) for chip in CHIPS]
            lines.append([str(gpus), name, *(s if fit else "too large" for s, fit in zip(sums, fits, strict=True))])
    return _table(["GPUs", "layout", *(f"{chip.name}, ms" for chip in CHIPS)], lines, words=2)


def budget_table() -> str:
    """Of the weight's gradient: memory over arithmetic, by budget; above 1 the float32 sum is what is waited for."""
    names = [chip.name for chip in CHIPS]
    heads = ["budget", "rows of 262,144 classes", *names, "rows of 32,768", *names]
    lines = []
    for budget in (64 << 20, 128 << 20, 256 << 20, 512 << 20, 1 << 30, 2 << 30):
        cells = [f"{budget >> 20:,} MiB"]
        for group in (1, PER_NODE):
            layout = Layout(GPUS[0], group, WIDTHS[0])
            rows = chunk_rows(layout, budget)
            times = [weight_product_seconds(rows, layout, chip) for chip in CHIPS]
            cells += [f"{rows:,}", *(f"{memory / arithmetic:.2f}" for arithmetic, memory in times)]
        lines.append(cells)
    return _table(heads, lines)


def tables() -> dict[str, str]:
    """Every table of the page, by its name there."""
    return {
        "chips": chip_table(),
        "logits": logits_table(),
        "memory": memory_table(),
        "wire": wire_table(),
        "budget": budget_table(),
        "time": time_table(),
        "every_chip": chips_table(),
    }


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], words: int = 1) -> str:
    """The first columns are words, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *lines))


def _gigabytes(size: float) -> str:
    return "0" if size == 0 else f"{size / 1e9:.2f}" if size < 99.5e9 else f"{size / 1e9:.0f}"


def _milliseconds(time: float) -> str:
    return "0" if time == 0 else f"{time * 1e3:.2f}" if time < 0.01 else f"{time * 1e3:.1f}"


if __name__ == "__main__":
    for name, table in tables().items():
        print(f"{name}\n\n{table}")
