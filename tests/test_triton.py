"""What is the Triton backend's own: every path between its kernels, in the interpreter, against the float64 truth.

The tests that run on all backends are elsewhere; here are the edges of the launch tables, rows cut into slices,
statistics that are kept for a later gradient, and tasks that the public functions do not make on a CPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import DTYPES, assert_true, random_labels, random_logits, run
from torch import Tensor
from truth import loss_and_gradient

from drsl_kernels import softmax_loss
from drsl_kernels.spec import cached_loss_spec

pytest.importorskip("triton")
from drsl_kernels.backends.triton import launch, layouts, shapes

WEIGHTED: dict[str, Any] = {"distance": "non_target_logits", "label_smoothing": 0.1}
INF, NAN = math.inf, math.nan


def checked(z: Tensor, y: Tensor, tau: float = 0.3, **arguments: Any) -> None:
    assert_true(z, y, tau, backend="triton", **arguments)


# 4 processors are assumed on a CPU, so fewer than 4 long rows are cut into slices.
@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("classes", [16, 17, 64, 65, 2047, 2049, 4097, 8192, 8193, 16384, 16385, 32771])
def test_edges_of_the_tables(classes: int, rows: int) -> None:
    z, y = random_logits(rows, classes), random_labels(rows, classes=classes)
    y[-1] = classes - 1
    checked(z, y, distance="uniform")
    checked(z, y, weight=torch.linspace(0.1, 2.0, classes), **WEIGHTED)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("classes", [10, 100, 3000])
def test_programs_that_go_on_to_further_rows(classes: int, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a batch that would need hundreds of thousands of programs: here 4 or fewer have to do."""
    monkeypatch.setattr(launch, "WARPS_PER_PROCESSOR", 1)
    monkeypatch.setattr(launch, "WARPS_TO_SKIP", 1)
    shape = shapes.few_classes_shape(classes, 10**6, 4, 2)
    assert shape is not None
    rows = 9 * shape.rows + 1
    z, y = random_logits(rows, classes), random_labels(rows, classes=classes)
    y[rows // 2] = -100
    upstream = torch.linspace(-1.0, 1.0, rows) if reduction == "none" else torch.tensor(2.0)
    checked(z, y, distance="uniform", reduction=reduction)
    checked(z, y, distance="uniform", reduction=reduction, upstream=upstream)
    checked(z, y, reduction=reduction, weight=torch.linspace(0.1, 2.0, classes), **WEIGHTED)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 5])
def test_long_rows_in_every_dtype(rows: int, dtype: str) -> None:
    z, y = random_logits(rows, 9001, dtype=DTYPES[dtype]), random_labels(rows, classes=9001)
    checked(z, y, distance="uniform")
    checked(z, y, distance="kl", reduction="none")


@pytest.mark.parametrize("weighted", [False, True])
def test_programs_that_go_on_to_further_long_rows(weighted: bool) -> None:
    """Two programs to each of 4 processors, and nearly two rows for each."""
    rows, classes = 15, 9001
    assert shapes.rows_at_work(torch.empty(0), classes) == 2
    z, y = random_logits(rows, classes), random_labels(rows, classes=classes)
    y[11] = -100
    z[13, 300:5000] = -INF
    if weighted:
        checked(z, y, reduction="none", weight=torch.linspace(0.1, 2.0, classes), **WEIGHTED)
    else:
        checked(z, y, distance="uniform")


@pytest.mark.parametrize("label", [0, 8191, 8192, 16383, 16384, 20000])
def test_masked_classes_are_not_counted(label: int) -> None:
    """In whole tiles they are counted only where there are some, in the last part always; the label in neither."""
    z, y = random_logits(5, 20001, dtype=torch.float64), torch.full((5,), label)
    z[1, 7] = z[2, 20000 if label < 20000 else 19999] = z[3, label] = -INF
    z[4, ::2] = -INF
    z[4, label] = 1.0
    for distance in ("uniform", "conditional"):
        got, want = (
            softmax_loss(z, y, distance=distance, tau=0.3, return_stats=True, backend=backend)[1].distance  # type: ignore[call-overload]
            for backend in ("triton", "reference")
        )
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("rows", [1, 5])
def test_beyond_2_to_the_18_classes(rows: int) -> None:
    classes = 2**18 + 3
    z, y = random_logits(rows, classes), random_labels(rows, classes=classes)
    checked(z, y, distance="uniform")


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("distance", ["conditional", "non_target_logits", "kl"])
@pytest.mark.parametrize("masked", ["first tile", "all but the last", "whole slices", "every other"])
def test_masked_tiles_of_long_rows(masked: str, distance: str, rows: int) -> None:
    classes = 20000
    z, y = random_logits(rows, classes), torch.full((rows,), classes - 2)
    where = {
        "first tile": slice(0, 4096),
        "all but the last": slice(0, classes - 5),
        "whole slices": slice(9000, 19000),
        "every other": slice(0, classes - 4, 2),
    }[masked]
    z[:, where] = -INF
    checked(z, y, distance=distance)
    checked(z, y, distance=distance, label_smoothing=0.1, weight=torch.linspace(0.1, 2.0, classes))


@pytest.mark.parametrize("rows", [2, 5])
def test_long_rows_around_a_large_offset(rows: int) -> None:
    """The mean of a row that lies at 1e4 is not known to better than 1e-3; its depth below the maximum is."""
    z, y = random_logits(rows, 9001), random_labels(rows, classes=9001)
    far = z.double() + 1e4
    far[:, :4500] -= 100.0
    checked(far.float(), y, distance="non_target_logits")
    checked(far.float(), y, distance="kl")


@pytest.mark.parametrize("rows", [2, 5])
def test_rows_of_long_ones_may_hold_anything(rows: int) -> None:
    """NaN stays in its row, and ignored rows are not read."""
    classes = 9001
    z, y = random_logits(rows, classes), random_labels(rows, classes=classes)
    z[0, 7000] = NAN
    loss, grad, _ = run(z, y, 0.3, distance="kl", reduction="none", backend="triton")
    assert loss.isnan().tolist() == [True] + [False] * (rows - 1)
    assert grad.isnan().any(1).tolist() == [True] + [False] * (rows - 1)
    y[0] = -100
    checked(z, y, distance="kl")
    z[0] = 0.0
    checked(z, y, distance="kl", reduction="none", upstream=torch.linspace(0.5, 2.0, rows))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [100, 3000])
def test_what_the_mean_divides_by(rows: int, weighted: bool) -> None:
    """By few rows each program sums the labels' weights itself; by many, a kernel of their own does."""
    z, y = random_logits(rows, 10), random_labels(rows, classes=10)
    y[::3] = -100
    checked(z, y, distance="uniform", weight=torch.linspace(0.1, 2.0, 10) if weighted else None)


@pytest.mark.parametrize("classes", [10, 1000, 9001])
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_rows_at_any_address(offset: int, classes: int) -> None:
    rows, pitch = 3, classes + 3
    memory = random_logits(offset + rows * pitch)
    z = memory.as_strided((rows, classes), (pitch, 1), offset)
    y = random_labels(rows, classes=classes)
    got = run(z, y, 0.3, distance="kl", backend="triton")
    torch.testing.assert_close(got, run(z.contiguous(), y, 0.3, distance="kl", backend="triton"))


def test_long_rows_more_than_2_to_the_31_elements_apart() -> None:
    classes, far = 9001, 2**31 + 4096
    z = torch.empty(far + classes, dtype=torch.bfloat16).as_strided((2, classes), (far, 1))  # pages come when touched
    near = random_logits(2, classes, dtype=torch.bfloat16)
    z.copy_(near)
    y = random_labels(2, classes=classes)
    got = run(z, y, 0.5, distance="kl", backend="triton")
    torch.testing.assert_close(got, run(near, y, 0.5, distance="kl", backend="triton"))


def test_more_dimensions_than_the_kernels_know() -> None:
    z = random_logits(2, 3, 4, 5, 6).permute(3, 1, 4, 2, 0)  # rows step unevenly in three places
    y = random_labels(5, 6, 4, 2, classes=3)
    got = run(z, y, 0.3, distance="uniform", backend="triton")
    torch.testing.assert_close(got, run(z.contiguous(), y, 0.3, distance="uniform", backend="triton"))


@pytest.mark.parametrize("seed", range(12))
def test_any_view(seed: int) -> None:
    """Sliced, expanded, permuted: the gradient's layout is not always that of the logits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    dims = 2 + draw(2)
    z = random_logits(*(1 if draw(3) == 1 else draw(3) + 1 for _ in range(dims)), seed=seed)
    z = z[..., : max(1, z.shape[-1] - 1)].expand([n if n > 1 else draw(3) for n in z[..., :-1].shape[:-1]] + [-1])
    z = z.permute(*torch.randperm(dims, generator=generator).tolist())
    y = random_labels(z.shape[0], *z.shape[2:], classes=z.shape[1])
    got = run(z, y, 0.3, distance="kl", reduction="sum", backend="triton")
    torch.testing.assert_close(got, run(z.contiguous(), y, 0.3, distance="kl", reduction="sum", backend="triton"))


@pytest.mark.parametrize("stride", [(3, 6, 1, 0, 6), (18, 0, 6, 1, 2)])
def test_overlapping_views(stride: tuple[int, ...]) -> None:
    z = random_logits(3000).as_strided((2, 2, 3, 2, 1), stride)
    y = random_labels(2, 3, 2, 1, classes=2)
    got = run(z, y, 0.3, distance="uniform", backend="triton")
    torch.testing.assert_close(got, run(z.contiguous(), y, 0.3, distance="uniform", backend="triton"))


def test_second_derivative() -> None:
    z, y = random_logits(3, 4, dtype=torch.float64).requires_grad_(), random_labels(3, classes=4)

    def loss(z: Tensor) -> Tensor:
        return softmax_loss(z, y, distance="uniform", tau=0.6, backend="triton")

    assert torch.autograd.gradcheck(loss, z)
    assert torch.autograd.gradgradcheck(loss, z)


# Tasks


def task_of(z: Tensor, y: Tensor, *, reduction: str = "mean") -> launch.Task:
    spec = cached_loss_spec("ce", 0.7, "uniform", 1.0, 0.0, -100, reduction, 0.0)
    task = launch.Task(z, y, None, None, 0.3, spec, spec.distance_code)
    task.grad = torch.full_like(z, 7.0)
    if reduction == "none":
        task.row_losses = z.new_full(y.shape, 7.0)
    else:
        task.loss = z.new_full((), 7.0)
        task.denominator = torch.full((), 7.0, dtype=torch.float64)
    return task


@pytest.mark.parametrize("classes", [10, 9001])
@pytest.mark.parametrize("label", [-1, "classes", 2**40])
def test_label_out_of_range_is_never_an_index(label: int | str, classes: int) -> None:
    """On a device nobody can raise an error: loss and gradient of that row are NaN, the others are right."""
    z, y = random_logits(3, classes), random_labels(3, classes=classes)
    y[1] = classes if label == "classes" else label
    task = task_of(z, y, reduction="none")
    launch.run(task)
    assert task.row_losses is not None
    assert task.grad is not None
    assert task.row_losses.isnan().tolist() == [False, True, False]
    assert task.grad.isnan().any(1).tolist() == [False, True, False]
    assert task.grad[1].isnan().all()
    kept = [0, 2]
    loss, grad, _ = loss_and_gradient(z[kept], y[kept], 0.3, distance="uniform", reduction="none")
    torch.testing.assert_close(task.row_losses[kept].double(), loss, atol=0, rtol=1e-6)
    torch.testing.assert_close(task.grad[kept].double(), grad, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("classes", [3, 10, 12, 100, 9001, 9004])
def test_nothing_is_written_beside_a_row(classes: int) -> None:
    z, y = random_logits(3, classes), random_labels(3, classes=classes)
    y[2] = -100
    task = task_of(z, y)
    memory = torch.full((4, classes + 16), 7.0)
    task.grad = memory[:3, :classes]
    launch.run(task)
    assert (memory[:, classes:] == 7.0).all()
    assert (memory[3] == 7.0).all()
    torch.testing.assert_close(task.grad.double(), loss_and_gradient(z, y, 0.3, distance="uniform")[1])


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("classes", [10, 9001])
def test_a_gradient_that_is_right_is_left_alone(classes: int, rows: int) -> None:
    z, y = random_logits(rows, classes), random_labels(rows, classes=classes)
    for saved in (False, True):
        task = task_of(z, y)
        if saved and launch.saved_slices(task):
            task.grad = None
            task.saved = z.new_empty(rows, launch.saved_slices(task), launch.SAVED)
        launch.run(task)
        task.saved_known = task.saved is not None
        task.loss = None
        task.denominator_known = True
        task.skip_unit_upstream = True
        task.grad = torch.full_like(z, 7.0)
        task.upstream = torch.tensor(1.0)
        launch.run(task)
        assert (task.grad == 7.0).all()
        task.upstream = torch.tensor(0.5)
        launch.run(task)
        want = 0.5 * loss_and_gradient(z, y, 0.3, distance="uniform")[1]
        torch.testing.assert_close(task.grad.double(), want, atol=1e-7, rtol=1e-5)


def test_slices_are_not_read_again_where_the_gradient_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    skips = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            def start(*arguments: Any, **keywords: Any) -> None:
                skips.append(keywords["SKIP"])
                self.kernel[grid](*arguments, **keywords)

            return start

    for name in ("stats_kernel", "gradient_kernel"):
        monkeypatch.setattr(launch, name, Recorder(getattr(launch, name)))
    z, y = random_logits(2, 40000).requires_grad_(), random_labels(2, classes=40000)
    softmax_loss(z, y, distance="uniform", tau=0.3, backend="triton").backward()
    assert skips == [False, False, True, True]


def test_width_of_words() -> None:
    """How many classes make a word: what divides the row, its stride and its address, 16 bytes at most."""
    memory = torch.zeros(4096)

    def width(rows: int, classes: int, pitch: int, offset: int = 0, dtype: torch.dtype = torch.float32) -> int:
        z = memory.view(dtype).as_strided((rows, classes), (pitch, 1), offset)
        layout = layouts.rows_of(z)
        assert layout is not None
        return layouts.width((z,), (layout,), classes)

    assert memory.data_ptr() % 16 == 0
    assert width(4, 1000, 1000) == 4
    assert width(4, 1000, 1000, dtype=torch.bfloat16) == 8
    assert width(4, 100, 100, dtype=torch.bfloat16) == 4
    assert width(4, 10, 10) == 2
    assert width(4, 8, 9) == 1
    assert width(4, 8, 12) == 4
    assert width(4, 8, 8, offset=2) == 2
    assert width(4, 7, 8) == 1
    strided = memory.as_strided((4, 8), (64, 2))
    layout = layouts.rows_of(strided)
    assert layout is not None
    assert layouts.width((strided,), (layout,), 8) == 0
