"""The Gaussian-mixture head and its loss, against the explicit N x C x D formula in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from truth import DISTANCES, row_losses

from drsl_kernels import GaussianMixtureHead, gaussian_mixture_loss, softmax_loss
from drsl_kernels.heads import COVARIANCES

both = pytest.mark.parametrize("covariance", COVARIANCES)
LEAST = 1e-4


def head(covariance: Any, features: int = 6, classes: int = 4, spread: float = 1.0) -> GaussianMixtureHead:
    made = GaussianMixtureHead(features, classes, covariance, dtype=torch.float64)
    with torch.no_grad():
        made.means.normal_(0.3, spread)
        if made.log_variances is not None:
            made.log_variances.normal_(0, 1)
    return made


def variances(of: GaussianMixtureHead) -> Tensor:
    ones = torch.ones_like(of.means, dtype=torch.float64)
    return ones if of.log_variances is None else LEAST + of.log_variances.double().exp()


def naive(of: GaussianMixtureHead, f: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and distances (N, C) by the definition."""
    v = variances(of)
    distances = ((f.double().unsqueeze(1) - of.means.double()) ** 2 / v).sum(2) / 2
    return -distances - v.log().sum(1) / 2, distances


def naive_rows(of: GaussianMixtureHead, f: Tensor, y: Tensor, alpha: float, likelihood: float, **more: Any) -> Tensor:
    z, distances = naive(of, f)
    counted = y != -100
    one_hot = F.one_hot(torch.where(counted, y, 0), z.shape[1])
    rows = row_losses(z - alpha * one_hot * distances, y, **more)
    return rows + torch.where(counted, -likelihood * (one_hot * z).sum(1), 0.0)


def sample(rows: int = 5, features: int = 6, classes: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, features, dtype=torch.float64), torch.randint(classes, (rows,))


class TestLogits:
    @both
    def test_definition(self, covariance: str) -> None:
        model, (f, _) = head(covariance), sample()
        torch.testing.assert_close(model(f), naive(model, f)[0])

    def test_identity_is_a_linear_layer_with_biases(self) -> None:
        """The same softmax, and the same class, as weights mu and biases -|mu|^2 / 2."""
        model, (f, _) = head("identity"), sample()
        linear = F.linear(f, model.means, -model.means.square().sum(1) / 2)
        torch.testing.assert_close(model(f).softmax(1), linear.softmax(1))

    def test_variances_of_1_are_the_identity(self) -> None:
        model = GaussianMixtureHead(6, 4, "diagonal", dtype=torch.float64)
        torch.testing.assert_close(variances(model), torch.ones(4, 6, dtype=torch.float64))
        same = GaussianMixtureHead(6, 4, dtype=torch.float64)
        same.load_state_dict({"means": model.means})
        f, _ = sample()
        torch.testing.assert_close(model(f), same(f))

    @both
    @pytest.mark.parametrize("shift", [0.0, 100.0])
    @pytest.mark.parametrize("near", [1e-3, 1.0, 30.0])
    def test_float32_is_as_exact_as_the_explicit_formula(self, covariance: str, shift: float, near: float) -> None:
        """To ten times its error and a last digit, as far from 0 as all means may be."""
        model = head(covariance, 128, 10).float()
        with torch.no_grad():
            model.means.add_(shift)
        y = torch.randint(10, (200,))
        f = (model.means[y] + near * torch.randn(200, 128)).detach()
        exact, distances = naive(model, f)
        v = variances(model).float()
        explicit = -(((f.unsqueeze(1) - model.means) ** 2 / v).sum(2) / 2) - v.log().sum(1) / 2
        allowed = 10 * (explicit.double() - exact).abs().max() + 1e-6 * distances.max()
        assert (model(f).double() - exact).abs().max() <= allowed

    @both
    def test_no_distance_below_0(self, covariance: str) -> None:
        model = head(covariance, 128, 10, spread=30.0).float()
        z = model(model.means.detach())
        own = z.diagonal() + variances(model).log().sum(1) / 2
        assert (own <= 1e-4).all()  # the sum rounds, too
        if covariance == "identity":
            assert (z <= 0).all()

    def test_the_gradient_where_a_distance_rounds_to_0(self) -> None:
        """Close to one mean and far from the others the square is lost; its gradient is not."""
        model = head("identity", 64, 3, spread=100.0).float()
        f = model.means.detach()[:1] + 0.01 * torch.randn(200, 64)
        f.requires_grad_()
        z = model(f)[:, 0]
        (gradient,) = torch.autograd.grad(z.sum(), f)
        assert (z == 0).any()
        torch.testing.assert_close(gradient, (model.means[:1] - f).detach(), rtol=0, atol=1e-3)

    def test_first_means(self) -> None:
        means = GaussianMixtureHead(200, 100).means
        assert means.std().item() == pytest.approx(0.1, rel=0.03)
        assert abs(means.mean().item()) < 0.003

    @both
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("classes", [1, 2, 5])
    def test_far_features(self, covariance: str, dtype: torch.dtype, classes: int) -> None:
        """Finite, in value and gradient (which float16 may be too small for), and of the dtype that the losses have."""
        model = head(covariance, 16, classes).to(dtype)
        for size in (0.0, 1.0, 1e4):
            f = torch.full((3, 16), size, dtype=dtype, requires_grad=True)
            z, y = model(f), torch.zeros(3, dtype=torch.int64)
            assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert z.isfinite().all()
            loss = model.loss(f, y, alpha=0.3, likelihood=0.1)
            gradients = torch.autograd.grad(loss, [f, *model.parameters()])
            assert loss.isfinite()
            representable = 3 if dtype != torch.float16 else 2  # of a variance it is 1e8
            assert all(gradient.isfinite().all() for gradient in gradients[:representable])

    def test_half_precision_is_that_of_its_input(self) -> None:
        model = head("diagonal").bfloat16()
        f = torch.randn(5, 6).bfloat16()
        torch.testing.assert_close(model(f).double(), naive(model, f)[0], rtol=1e-5, atol=1e-5)

    @both
    def test_autocast_changes_nothing(self, covariance: str) -> None:
        model, f, y = head(covariance).float(), torch.randn(5, 6), torch.randint(4, (5,))
        expected = model(f), model.loss(f, y, alpha=0.3, likelihood=0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(f), model.loss(f, y, alpha=0.3, likelihood=0.1)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))

    @both
    def test_no_large_tensor_forward_or_backward(self, covariance: str) -> None:
        rows, classes, features = 64, 50, 40

        class Largest(TorchDispatchMode):
            seen = 0

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                tensors = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
                self.seen = max([self.seen, *(t.numel() for t in tensors)])
                return out

        model = head(covariance, features, classes).float()
        f, y = torch.randn(rows, features, requires_grad=True), torch.randint(classes, (rows,))
        with Largest() as largest:
            (model(f).sum() + model.loss(f, y, alpha=0.3, likelihood=0.1, backend="reference")).backward()
        assert largest.seen <= max(rows * classes, rows * 2 * features, 2 * classes * features)

    def test_a_variance_has_a_bound(self) -> None:
        """However small s is; there its gradient is small, and just above it is not 0."""
        model = GaussianMixtureHead(3, 2, "diagonal", dtype=torch.float64)
        with torch.no_grad():
            model.log_variances.copy_(torch.tensor([-1000.0, -20.0, -9.0]).expand(2, 3))
        f = model.means.detach()
        z = model(f)
        assert z[0, 0].item() == pytest.approx(-variances(model)[0].log().sum().item() / 2)
        assert (variances(model) >= LEAST).all()
        (gradient,) = torch.autograd.grad(z[0, 0], model.log_variances)
        torch.testing.assert_close(gradient[0], -0.5 * (1 - LEAST / variances(model)[0]).detach())
        assert gradient[0, 2] < -0.2

    def test_log_likelihood(self) -> None:
        """Of torch.distributions, but for the constant."""
        for covariance in COVARIANCES:
            model, (f, _) = head(covariance), sample()
            mixture = torch.distributions.MixtureSameFamily(
                torch.distributions.Categorical(torch.ones(4, dtype=torch.float64)),
                torch.distributions.Independent(torch.distributions.Normal(model.means, variances(model).sqrt()), 1),
            )
            expected = mixture.log_prob(f) + 3 * math.log(2 * math.pi)
            torch.testing.assert_close(model.log_likelihood(f), expected)


class TestLoss:
    @both
    @pytest.mark.parametrize("distance", [None, *DISTANCES])
    @pytest.mark.parametrize(("alpha", "likelihood"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.1), (0.3, 0.1)])
    def test_definition(self, covariance: str, distance: str | None, alpha: float, likelihood: float) -> None:
        """Value, and gradients to features, means and variances."""
        model, (f, y) = head(covariance), sample()
        tau = 0.0 if distance is None else 0.7
        inputs = [f.requires_grad_(), *model.parameters()]
        more: Any = {"distance": distance, "tau": tau}
        loss = model.loss(f, y, alpha=alpha, likelihood=likelihood, **more)
        expected = naive_rows(model, f, y, alpha, likelihood, **more).mean()
        torch.testing.assert_close(loss, expected)
        found = torch.autograd.grad(loss, inputs, materialize_grads=True)
        for mine, theirs in zip(found, torch.autograd.grad(expected, inputs, materialize_grads=True), strict=True):
            torch.testing.assert_close(mine, theirs)
        if covariance == "identity":
            alone = gaussian_mixture_loss(model(f), y, alpha=alpha, likelihood=likelihood, **more)
            torch.testing.assert_close(alone, expected)

    def test_without_margin_and_likelihood_it_is_cross_entropy(self) -> None:
        model, (f, y) = head("diagonal"), sample()
        expected = F.cross_entropy(naive(model, f)[0], y)
        torch.testing.assert_close(model.loss(f, y, alpha=0.0, likelihood=0.0), expected)
        torch.testing.assert_close(gaussian_mixture_loss(model(f), y, alpha=0.0, likelihood=0.0), expected)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @both
    def test_reductions_and_ignored_rows(self, covariance: str, reduction: Any) -> None:
        model, (f, y) = head(covariance), sample(6)
        y[1] = y[4] = -100
        rows = naive_rows(model, f, y, 0.3, 0.1, label_smoothing=0.2)
        expected = {"mean": rows.sum() / 4, "sum": rows.sum(), "none": rows}[reduction]
        options: Any = {"alpha": 0.3, "likelihood": 0.1, "reduction": reduction, "label_smoothing": 0.2}
        torch.testing.assert_close(model.loss(f, y, **options), expected)
        if covariance == "identity":
            torch.testing.assert_close(gaussian_mixture_loss(model(f), y, **options), expected)

    @both
    def test_derivatives(self, covariance: str) -> None:
        model, (f, y) = head(covariance, 3, 3), sample(3, 3, 3)
        names = [name for name, _ in model.named_parameters()]

        def loss(f: Tensor, *parameters: Tensor) -> Tensor:
            calls = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(_Loss(model), {f"head.{n}": p for n, p in calls.items()}, (f, y))

        inputs = (f.requires_grad_(), *(p.detach().clone().requires_grad_() for p in model.parameters()))
        assert torch.autograd.gradcheck(loss, inputs)
        assert torch.autograd.gradgradcheck(loss, inputs)

    def test_derivatives_of_the_logits_alone(self) -> None:
        z = -torch.rand(3, 4, dtype=torch.float64).requires_grad_()
        y = torch.randint(4, (3,))

        def loss(z: Tensor) -> Tensor:
            return gaussian_mixture_loss(z, y, alpha=0.3, likelihood=0.2, distance="kl", tau=0.5)

        assert torch.autograd.gradcheck(loss, (z,))
        assert torch.autograd.gradgradcheck(loss, (z,))

    def test_far_features_lose_no_digits(self) -> None:
        """At 8e4 from all means a distance is 3e9, whose last digit in float32 is 256."""
        model, y = head("identity", 64, 5).float(), torch.randint(5, (50,))
        f = torch.full((50, 64), 1e4) + torch.randn(50, 64)
        found = model.loss(f, y, alpha=0.0, likelihood=0.0, reduction="none").double()
        torch.testing.assert_close(found, naive_rows(model, f, y, 0.0, 0.0), rtol=1e-5, atol=1e-2)

    def test_one_class(self) -> None:
        model, f, y = head("identity", 6, 1), sample()[0], torch.zeros(5, dtype=torch.int64)
        assert model.loss(f, y, alpha=0.3, likelihood=0.0) == 0
        expected = 0.1 * naive(model, f)[1].mean()
        torch.testing.assert_close(model.loss(f, y, alpha=0.3, likelihood=0.1), expected)
        torch.testing.assert_close(gaussian_mixture_loss(model(f), y, alpha=0.3, likelihood=0.1), expected)

    def test_it_is_the_fused_loss(self) -> None:
        z, y = -torch.rand(5, 4), torch.randint(4, (5,))
        assert torch.equal(
            gaussian_mixture_loss(z, y, alpha=0.3, likelihood=0.0, distance="uniform", tau=2.0),
            softmax_loss(z, y, scale=1.3, distance="uniform", tau=2.0),
        )

    def test_inside_a_compiled_function(self) -> None:
        model, (f, y) = head("diagonal"), sample()
        compiled = torch.compile(lambda f: model.loss(f, y, alpha=0.3, likelihood=0.1), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(f), model.loss(f, y, alpha=0.3, likelihood=0.1))


class _Loss(torch.nn.Module):
    def __init__(self, head: GaussianMixtureHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return self.head.loss(f, y, alpha=0.3, likelihood=0.2, distance="uniform", tau=0.5) + self.head(f).sin().sum()


def test_training_pulls_features_to_their_means() -> None:
    """Two Gaussian clouds: the head finds their means and standard deviations."""
    y = torch.arange(400) % 2
    centres, spreads = torch.tensor([[2.0, 0.0], [-2.0, 1.0]]), torch.tensor([[0.5, 1.0], [1.0, 0.25]])
    f = centres[y] + spreads[y] * torch.randn(400, 2)
    model = GaussianMixtureHead(2, 2, "diagonal")
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        model.loss(f, y, alpha=0.0, likelihood=1.0).backward()
        optimizer.step()
    torch.testing.assert_close(model.means.detach(), centres, rtol=0, atol=0.25)
    torch.testing.assert_close(variances(model).sqrt().float().detach(), spreads, rtol=0.2, atol=0)
    likely = model.log_likelihood(torch.tensor([[2.0, 0.0], [-2.0, 1.0], [0.0, 10.0]]))
    assert (likely[:2] > likely[2] + 10).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GaussianMixtureHead(0, 2), ValueError, "features must be 1 or more, got 0"),
        (lambda: GaussianMixtureHead(3, 0), ValueError, "classes must be 1 or more, got 0"),
        (lambda: GaussianMixtureHead(3.5, 2), TypeError, "features must be an int, got 3.5"),
        (lambda: GaussianMixtureHead(3, 2, "full"), ValueError, "'identity', 'diagonal', got 'full'"),
        (lambda: GaussianMixtureHead(3, 2, least_variance=0.0), ValueError, "above 0 and below 1, got 0.0"),
        (lambda: GaussianMixtureHead(3, 2)(torch.zeros(4, 2)), ValueError, r"\(N, D\) = \(N, 3\), got \(4, 2\)"),
        (lambda: GaussianMixtureHead(3, 2)(torch.zeros(3)), ValueError, r"\(N, D\) = \(N, 3\), got \(3,\)"),
        (lambda: GaussianMixtureHead(3, 2)([1.0]), TypeError, "features must be a Tensor, got list"),
        (lambda: loss(alpha=-0.1), ValueError, "alpha must be 0 or more and finite, got -0.1"),
        (lambda: loss(likelihood=math.inf), ValueError, "likelihood must be 0 or more and finite, got inf"),
        (lambda: loss(y=torch.zeros(3, dtype=torch.int64)), ValueError, r"shape \(2,\), got \(3,\) of torch.int64"),
        (lambda: loss(y=torch.zeros(2)), ValueError, r"one class for each row.*got \(2,\) of torch.float32"),
        (lambda: loss(y=[0, 1]), TypeError, "y must be a Tensor, got list"),
        (lambda: loss(y=torch.tensor([0, 2])), IndexError, "label 2 at row 1"),
        (lambda: loss(reduction="max"), ValueError, "reduction must be one of"),
        (lambda: gaussian_mixture_loss(torch.zeros(3), None, alpha=0, likelihood=0), ValueError, r"\(N, C\), got"),  # type: ignore[arg-type]
        (lambda: gaussian_mixture_loss(0, None, alpha=0, likelihood=0), TypeError, "logits must be a Tensor, got int"),  # type: ignore[arg-type]
    ],
)
def test_bad_input(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def loss(**changed: Any) -> None:
    """Both losses must refuse the same; the second alone is reached where the first does not."""
    arguments = {"y": torch.zeros(2, dtype=torch.int64), "alpha": 0.1, "likelihood": 0.1} | changed
    with pytest.raises(Exception) as refused:  # noqa: PT011
        gaussian_mixture_loss(torch.zeros(2, 2), **arguments)
    with pytest.raises(type(refused.value)):
        GaussianMixtureHead(3, 2).loss(torch.zeros(2, 3), **arguments)
    raise refused.value


def test_in_words() -> None:
    assert repr(GaussianMixtureHead(3, 2)) == "GaussianMixtureHead(features=3, classes=2, covariance='identity')"
