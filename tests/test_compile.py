"""Under `torch.compile` the loss is one operator of the backend's own kernels; exported, it is made of PyTorch's."""

from __future__ import annotations

import io
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import DTYPES, random_labels, random_logits
from torch import Tensor
from torch._dynamo.testing import CompileCounter, EagerAndRecordGraphs
from truth import DISTANCES, loss_and_gradient

from drsl_kernels import DRSLLoss, backends, fused_drsl_loss, ops, softmax_loss
from drsl_kernels.spec import loss_spec
from drsl_kernels.targets import soft_target

pytestmark = [
    pytest.mark.filterwarnings("error:Dynamo"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),  # torch's own, inside functorch
]

ROWS, CLASSES = 4, 5


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    return random_logits(rows, CLASSES, dtype=dtype), random_labels(rows, classes=CLASSES)


def graph_of(function: Callable[..., Any], *arguments: Any) -> set[str]:
    """The operators that the compiler is given."""
    recorder = EagerAndRecordGraphs()
    torch.compile(function, backend=recorder, fullgraph=True)(*arguments)
    (graph,) = recorder.graphs
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return {str(target) for target in targets if target is not operator.getitem}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_value_and_gradient(compiler: str) -> None:
    z, y = inputs()
    z.requires_grad_()

    @torch.compile(backend=compiler, fullgraph=True)
    def step(z: Tensor, y: Tensor) -> Tensor:
        return 2 * fused_drsl_loss(1.5 * z, y, 0.5, distance="kl", label_smoothing=0.1, reduction="sum")

    loss = step(z, y)
    upstream = torch.tensor(2.0)
    want, grad, _ = loss_and_gradient(
        1.5 * z, y, 0.5, distance="kl", label_smoothing=0.1, reduction="sum", upstream=upstream
    )
    torch.testing.assert_close(loss.detach(), 2 * want, check_dtype=False)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], 1.5 * grad, check_dtype=False)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_loss_on_every_backend(distance: Any, reduction: Any, backend: str) -> None:
    z, y = inputs(torch.float64)
    z.requires_grad_()
    tau = torch.linspace(0.1, 1.0, ROWS, dtype=torch.float64).requires_grad_()
    weight = torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64)
    arguments: Any = {"distance": distance, "reduction": reduction, "weight": weight}

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(z: Tensor, y: Tensor, tau: Tensor) -> Tensor:
        return fused_drsl_loss(z, y, tau, backend=backend, **arguments)  # type: ignore[arg-type]

    loss = step(z, y, tau)
    upstream = torch.rand_like(loss)
    want, grad, tau_grad = loss_and_gradient(z, y, tau, upstream=upstream, **arguments)
    torch.testing.assert_close(loss.detach(), want)
    got = torch.autograd.grad(loss, (z, tau), upstream)
    torch.testing.assert_close(got, (grad, tau_grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_what_it_gives_uncompiled(dtype: str) -> None:
    """To the last bit, statistics included, for images and for a transposed matrix."""
    images = random_logits(2, CLASSES, 3, 2, dtype=DTYPES[dtype])
    for z, y in (
        (images, random_labels(2, 3, 2, classes=CLASSES)),
        (random_logits(CLASSES, 8, dtype=DTYPES[dtype]).t(), random_labels(8, classes=CLASSES)),
        (random_logits(CLASSES, dtype=DTYPES[dtype]), random_labels(classes=CLASSES)),
    ):
        leaf = z.detach().requires_grad_()

        def step(z: Tensor, y: Tensor = y) -> Any:
            return softmax_loss(z, y, distance="conditional", tau=0.5, return_stats=True)

        want, want_stats = step(leaf)
        got, stats = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)(leaf)
        torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)
        torch.testing.assert_close(tuple(stats), tuple(want_stats), rtol=0.0, atol=0.0)
        got_grad, want_grad = torch.autograd.grad(got, leaf)[0], torch.autograd.grad(want, leaf)[0]
        torch.testing.assert_close(got_grad, want_grad, rtol=0.0, atol=0.0)
        assert got_grad.stride() == want_grad.stride()


def test_class_probabilities() -> None:
    z, _ = inputs()
    z.requires_grad_()
    q = random_logits(ROWS, CLASSES, seed=2).softmax(1)
    weight = torch.linspace(0.5, 2.0, CLASSES)

    def step(z: Tensor, q: Tensor) -> Tensor:
        return fused_drsl_loss(z, q, 0.5, distance="kl", weight=weight, label_smoothing=0.1)

    got, want = torch.compile(step, backend="aot_eager", fullgraph=True)(z, q), step(z, q)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, z), torch.autograd.grad(want, z))


def test_module_with_a_learnt_tau() -> None:
    z, y = inputs()
    module = DRSLLoss(torch.nn.Parameter(torch.tensor(0.5)))
    loss = torch.compile(module, backend="aot_eager", fullgraph=True)(z, y)
    loss.backward()
    want, _, tau_grad = loss_and_gradient(z, y, torch.tensor(0.5), distance="uniform")
    torch.testing.assert_close(loss.detach(), want, check_dtype=False)
    torch.testing.assert_close(module.tau.grad, tau_grad, check_dtype=False)  # type: ignore[union-attr]


def test_one_operator_in_the_graph() -> None:
    assert graph_of(lambda z, y: fused_drsl_loss(z, y, 0.5), *inputs()) == {"drsl_kernels.loss.default"}


def test_the_reference_is_left_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is asked for, and where the device has no backend of its own."""
    assert "drsl_kernels.loss.default" not in graph_of(
        lambda z, y: fused_drsl_loss(z, y, 0.5, backend="reference"), *inputs()
    )
    torch._dynamo.reset()
    monkeypatch.setattr(backends, "PREFERENCE", {})
    assert "drsl_kernels.loss.default" not in graph_of(lambda z, y: fused_drsl_loss(z, y, 0.5), *inputs())


@pytest.mark.parametrize("dynamic", [None, True])
def test_batch_sizes_do_not_recompile(dynamic: bool | None) -> None:
    counter = CompileCounter()
    step = torch.compile(lambda z, y: fused_drsl_loss(z, y, 0.5), backend=counter, fullgraph=True, dynamic=dynamic)
    for rows in (4, 5, 6, 17, 100):
        z, y = inputs(rows=rows)
        torch.testing.assert_close(step(z, y), fused_drsl_loss(z, y, 0.5))
    assert counter.frame_count <= (1 if dynamic else 2)  # the first size is taken for a constant


def test_a_tensor_tau_does_not_recompile() -> None:
    counter = CompileCounter()
    step = torch.compile(lambda z, y, tau: fused_drsl_loss(z, y, tau), backend=counter, fullgraph=True)
    for tau in (0.1, 0.2, 0.5):
        step(*inputs(), torch.tensor(tau))
    assert counter.frame_count == 1


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_transposed_tau_that_requires_grad(compiler: str) -> None:
    z, y = random_logits(2, CLASSES, 3, 4), random_labels(2, 3, 4, classes=CLASSES)
    tau = torch.rand(2, 4, 3).requires_grad_()

    def step(tau: Tensor) -> Tensor:
        return fused_drsl_loss(z, y, tau.sigmoid().transpose(1, 2))

    got, want = torch.compile(step, backend=compiler, fullgraph=True)(tau), step(tau)
    torch.testing.assert_close(torch.autograd.grad(got, tau), torch.autograd.grad(want, tau))


def test_forward_mode_through_compiled_code() -> None:
    z, y = inputs(torch.float64)
    step = torch.compile(lambda z: fused_drsl_loss(z, y, 0.5), backend="aot_eager")
    step(z)
    tangents = []
    for function in (step, lambda z: fused_drsl_loss(z, y, 0.5)):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(z, torch.ones_like(z))
            tangents.append(torch.autograd.forward_ad.unpack_dual(function(dual)).tangent)
    torch.testing.assert_close(tangents[0], tangents[1])


def test_bad_arguments_are_refused() -> None:
    z, y = inputs()
    with pytest.raises(Exception, match="reduction must be one of"):
        torch.compile(lambda z, y: fused_drsl_loss(z, y, 0.5, reduction="avg"), backend="eager")(z, y)  # type: ignore[call-overload]
    with pytest.raises(Exception, match="y must have shape"):
        torch.compile(lambda z, y: fused_drsl_loss(z, y, 0.5), backend="eager")(z, y[:3].unsqueeze(1))


def test_a_label_out_of_range_is_found_when_it_runs() -> None:
    z, y = inputs()
    step = torch.compile(lambda z, y: fused_drsl_loss(z, y, 0.5), backend="aot_eager", fullgraph=True)
    step(z, y)
    y[2] = CLASSES
    with pytest.raises(IndexError, match="label 5 at row 2"):
        step(z, y)


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.func.hessian,
        torch.func.jacrev,
        lambda f: torch.func.vmap(torch.func.grad(f)),
    ],
    ids=["grad", "hessian", "jacrev", "per_sample_gradients"],
)
def test_function_transforms_inside(transform: Any) -> None:
    z, y = inputs(torch.float64)
    function = transform(lambda z, y: fused_drsl_loss(z, y, 0.5))
    got = torch.compile(function, backend="aot_eager", fullgraph=True)(z, y)
    torch.testing.assert_close(got, function(z, y))


class Criterion(torch.nn.Module):
    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return fused_drsl_loss(z, y, 0.5, reduction="none")


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """The program needs nothing of this package, and any number of rows will do."""
    rows = torch.export.Dim("rows")
    program = torch.export.export(Criterion(), inputs(), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    assert all("drsl" not in str(node.target) for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    z, y = inputs(rows=9)
    torch.testing.assert_close(torch.export.load(file).module()(z, y), Criterion()(z, y))


# ----------------------------------------------------------------------------------------------------------
# The operators themselves


def operator_arguments() -> dict[str, tuple[Any, ...]]:
    """logits, y, weight, margins, tau, tau_value, codes."""
    z, y = inputs(torch.float64)
    z.requires_grad_()
    q = random_logits(ROWS, CLASSES, dtype=torch.float64, seed=2).softmax(1)
    soft = soft_target(z, q, 0.5, None, 0.0)
    tau = torch.linspace(0.1, 1.0, ROWS, dtype=torch.float64)

    def codes(
        distance: str | None = "uniform",
        reduction: str = "mean",
        smoothing: float = 0.0,
        soft: bool = False,
        activation: str = "softmax",
    ) -> Any:
        return loss_spec("ce", 0.7, distance, 1.0, 0.0, -100, reduction, smoothing, 0.0, activation, soft).codes

    half = random_logits(ROWS, CLASSES, dtype=torch.bfloat16).requires_grad_()
    images = random_logits(2, CLASSES, 3, dtype=torch.float64).requires_grad_()
    return {
        "plain": (z, y, None, None, None, 0.0, *codes(None)),
        "number": (z, y, None, None, None, 0.5, *codes("kl")),
        "tensor tau": (z, y, None, None, tau[0].clone().requires_grad_(), 0.0, *codes()),
        "tau per row": (z, y, tau.new_ones(CLASSES), None, tau.clone().requires_grad_(), 0.0, *codes(reduction="none")),
        "tau transposed": (
            random_logits(2, CLASSES, 3, 2, dtype=torch.float64).requires_grad_(),
            random_labels(2, 3, 2, classes=CLASSES),
            None,
            None,
            torch.rand(2, 2, 3, dtype=torch.float64).transpose(1, 2).requires_grad_(),
            0.0,
            *codes(reduction="none"),
        ),
        "tau alone": (z.detach(), y, None, None, tau.clone().requires_grad_(), 0.0, *codes(reduction="sum")),
        "smoothing": (z, y, tau.new_ones(CLASSES), None, None, 0.5, *codes(smoothing=0.1)),
        "probabilities": (z, soft.labels, soft.weights, None, None, 0.5, *codes(soft=True)),
        "sigsoftmax": (z, y, None, tau.new_ones(CLASSES), None, 0.5, *codes(activation="sigsoftmax")),
        "bfloat16": (half, y, None, None, None, 0.5, *codes()),
        "images": (images, random_labels(2, 3, classes=CLASSES), None, None, None, 0.5, *codes(reduction="none")),
    }


@pytest.mark.backends("cpp", "reference")
@pytest.mark.parametrize("name", operator_arguments())
@pytest.mark.parametrize("return_stats", [False, True])
def test_opcheck(name: str, return_stats: bool, backend: str) -> None:
    arguments = operator_arguments()[name]
    torch.library.opcheck(ops.loss, (*arguments, return_stats, backend))


# To the last, which takes longest, what a backend does within the operator is out of sight: it checks derivatives and
# the fake operator, which no backend has a part in, and of the arguments only those that shape the results.
OPCHECKS = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}
SHAPING = {"tau per row", "tau transposed", "bfloat16", "images"}


@pytest.mark.backends("cpp", "reference")
@pytest.mark.parametrize("name", operator_arguments())
def test_opcheck_of_the_backward_operator(name: str, backend: str) -> None:
    arguments = operator_arguments()[name]
    z, y, _, _, tau, *_ = arguments
    upstream = torch.ones(y.shape if name in ("tau per row", "tau transposed", "images") else (), dtype=torch.float64)
    upstream = upstream.to(torch.float32) if name == "bfloat16" else upstream
    wanted = z.requires_grad, tau is not None and tau.requires_grad
    thorough = backend == "cpp" and name in SHAPING
    checks = list(OPCHECKS if thorough else OPCHECKS - {"test_aot_dispatch_dynamic"})
    torch.library.opcheck(
        ops.loss_backward, (upstream.requires_grad_(), *arguments, backend, *wanted), test_utils=checks
    )


@pytest.mark.parametrize("name", ["tau per row", "tensor tau", "smoothing", "probabilities", "sigsoftmax"])
def test_second_derivatives_of_the_operator(name: str) -> None:
    z, y, weight, margins, tau, *rest = operator_arguments()[name]

    def function(z: Tensor, tau: Tensor | None) -> Tensor:
        return ops.loss(z, y, weight, margins, tau, *rest, False, "")[0]

    assert torch.autograd.gradcheck(function, (z, tau))
    assert torch.autograd.gradgradcheck(function, (z, tau))
