"""The classifiers: their parameters, the functions of the papers, first weights, normalisation inside of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drsl_kernels.robustness.models import (
    MODELS,
    Classifier,
    Normalize,
    ResNet18,
    SmallCNN,
    WideResNet,
    make_model,
    small_cnn,
)

DIGITS, MNIST, CIFAR = (1, 8, 8), (1, 28, 28), (3, 32, 32)
QUICK = [name for name in MODELS if name != "wideresnet28_10"]  # to run, not only to build


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images(shape: tuple[int, int, int], samples: int = 2) -> Tensor:
    return torch.rand(samples, *shape, generator=torch.Generator().manual_seed(1))


def test_names() -> None:
    assert MODELS == ("small_cnn", "mlp", "resnet18", "wideresnet28_10")


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters"),
    [
        ("small_cnn", DIGITS, 10, 53_002),
        ("small_cnn", MNIST, 10, 421_642),
        ("small_cnn", CIFAR, 10, 545_098),
        ("mlp", DIGITS, 10, 85_002),
        ("mlp", MNIST, 10, 269_322),
        ("mlp", CIFAR, 10, 855_050),
        ("resnet18", CIFAR, 10, 11_173_962),
        ("resnet18", CIFAR, 100, 11_173_962 + 90 * 513),
        ("wideresnet28_10", CIFAR, 10, 36_479_194),
    ],
)
def test_parameters(name: str, shape: tuple[int, int, int], classes: int, parameters: int) -> None:
    model = make_model(name, shape=shape, classes=classes, seed=0)
    assert count(model) == parameters
    if classes == 10:
        assert f"{parameters:,}" in " ".join((type(model).__doc__ or "").split())


@pytest.mark.parametrize("shape", [DIGITS, MNIST, CIFAR, (2, 5, 9)], ids=str)
@pytest.mark.parametrize("name", QUICK)
def test_features_and_head_make_the_logits(name: str, shape: tuple[int, int, int]) -> None:
    model = make_model(name, shape=shape, classes=7, seed=0, mean=(0.3,), std=(0.2,)).eval()
    x = images(shape)
    features = model.features(x)
    assert features.shape == (2, {"small_cnn": 128, "mlp": 256, "resnet18": 512}[name])
    assert isinstance(model.head, nn.Linear)
    assert model(x).shape == (2, 7)
    assert torch.equal(model(x), model.head(features))


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    """At 32x32 but for the largest, which is to be quick."""
    shape = DIGITS if name == "wideresnet28_10" else CIFAR
    model = make_model(name, shape=shape, classes=10, seed=0)
    F.cross_entropy(model(images(shape)), torch.tensor([3, 8])).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


class TestSmallCNN:
    def test_for_digits_it_is_what_it_was(self) -> None:
        """Logits of the first version, whose results are committed."""
        x = torch.linspace(0, 1, 128).view(2, *DIGITS)
        expected = [
            -0.010919,
            0.008062,
            0.024852,
            0.01184,
            -0.051709,
            0.014856,
            -0.076295,
            0.103929,
            -0.03141,
            0.071023,
        ]
        for model in (small_cnn(0), make_model("small_cnn", shape=DIGITS, classes=10, seed=0)):
            assert model(x)[0].tolist() == pytest.approx(expected, abs=2e-6)

    def test_weights_for_a_seed(self) -> None:
        torch.manual_seed(5)
        layers = [nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3), nn.Linear(256, 128), nn.Linear(128, 10)]
        expected = [parameter for layer in layers for parameter in layer.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(small_cnn(5).parameters(), expected, strict=True))

    def test_without_normalisation_pixels_are_left_alone(self) -> None:
        x = images(DIGITS, 64)
        assert torch.equal(small_cnn(0).features[0](x), x)  # type: ignore[index]

    def test_too_small(self) -> None:
        make_model("small_cnn", shape=(1, 4, 4), classes=2, seed=0)(images((1, 4, 4)))
        with pytest.raises(
            ValueError, match=r"shape must be .* 4 or more pixels each way for small_cnn, got \(1, 4, 3\)"
        ):
            make_model("small_cnn", shape=(1, 4, 3), classes=2, seed=0)


def jittered(model: Classifier) -> Classifier:
    """Batch normalisations that are no longer the identity, so that their place is seen."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.running_var, module.bias, module.running_mean):
                assert values is not None
                values.data.copy_(torch.rand(values.shape, generator=generator) + 0.3)
    return model.eval()


class TestPapers:
    """The networks written down a second time, as functions of their weights."""

    @staticmethod
    def conv(x: Tensor, weights: dict[str, Tensor], name: str, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=(weight.shape[-1] - 1) // 2)

    @staticmethod
    def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
        scale = weights[f"{name}.weight"] / (weights[f"{name}.running_var"] + 1e-5).sqrt()
        shift = weights[f"{name}.bias"] - weights[f"{name}.running_mean"] * scale
        return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

    def test_resnet18(self) -> None:
        """Figure 2 and table 1 of He et al., with the stem of their section 4.2."""
        model = jittered(ResNet18(10, (3, 16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))).double()
        weights: dict[str, Tensor] = {
            name.removeprefix("features."): value for name, value in model.state_dict().items()
        }
        x = images((3, 16, 16)).double()
        mean, std = (torch.tensor(values).view(3, 1, 1).double() for values in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
        z = F.relu(self.norm(self.conv((x - mean) / std, weights, "conv"), weights, "norm"))
        for stage in (1, 2, 3, 4):
            for block in (0, 1):
                name = f"stage{stage}.{block}"
                stride = 2 if stage > 1 and block == 0 else 1
                inner = F.relu(self.norm(self.conv(z, weights, f"{name}.conv1", stride), weights, f"{name}.norm1"))
                inner = self.norm(self.conv(inner, weights, f"{name}.conv2"), weights, f"{name}.norm2")
                if stride == 2:
                    z = self.norm(self.conv(z, weights, f"{name}.shortcut.0", 2), weights, f"{name}.shortcut.1")
                z = F.relu(inner + z)
        assert z.shape == (2, 512, 2, 2)
        expected = z.mean((2, 3)) @ weights["head.weight"].T + weights["head.bias"]
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(("depth", "widen_factor"), [(10, 2), (16, 1)])
    def test_wide_resnet(self, depth: int, widen_factor: int) -> None:
        """Table 1 of Zagoruyko & Komodakis; blocks BN-ReLU-conv."""
        model = jittered(WideResNet(10, (3, 8, 8), depth=depth, widen_factor=widen_factor)).double()
        weights: dict[str, Tensor] = {
            name.removeprefix("features."): value for name, value in model.state_dict().items()
        }
        x = images((3, 8, 8)).double()
        z = self.conv(x, weights, "conv")
        for group in (1, 2, 3):
            for block in range((depth - 4) // 6):
                name = f"group{group}.{block}"
                stride = 2 if group > 1 and block == 0 else 1
                active = F.relu(self.norm(z, weights, f"{name}.norm1"))
                inner = F.relu(self.norm(self.conv(active, weights, f"{name}.conv1", stride), weights, f"{name}.norm2"))
                if f"{name}.projection.weight" in weights:
                    z = self.conv(active, weights, f"{name}.projection", stride)
                z = self.conv(inner, weights, f"{name}.conv2") + z
        assert z.shape == (2, 64 * widen_factor, 2, 2)
        pooled = F.relu(self.norm(z, weights, "norm")).mean((2, 3))
        torch.testing.assert_close(
            model(x), pooled @ weights["head.weight"].T + weights["head.bias"], rtol=1e-6, atol=1e-6
        )

    @pytest.mark.parametrize("depth", [4, 27, -2])
    def test_depth(self, depth: int) -> None:
        with pytest.raises(ValueError, match=f"depth must be 6n [+] 4 with n 1 or more, got {depth}"):
            WideResNet(depth=depth)

    @pytest.mark.parametrize("name", ["resnet18", "wideresnet28_10"])
    def test_first_weights(self, name: str) -> None:
        """Variance 2 / (k^2 * channels out) for convolutions: He et al., arXiv 1502.01852, equation 14."""
        model = make_model(name, shape=CIFAR, classes=10, seed=0)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                weight = module.weight
                expected = math.sqrt(2 / (weight.shape[0] * weight.shape[2] * weight.shape[3]))
                assert weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * weight.numel()))
                assert module.bias is None
            if isinstance(module, nn.BatchNorm2d):
                assert (module.weight == 1).all()
                assert (module.bias == 0).all()
        assert (model.head.bias == 0).all()


@pytest.mark.parametrize("name", QUICK)
class TestSeeds:
    def make(self, name: str, seed: int) -> Tensor:
        model = make_model(name, shape=CIFAR, classes=10, seed=seed)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def test_weights_depend_on_the_seed_alone(self, name: str) -> None:
        first = self.make(name, 0)
        torch.rand(1)
        before = torch.get_rng_state()
        assert torch.equal(self.make(name, 0), first)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(self.make(name, 1), first)

    def test_whatever_the_default_device(self, name: str) -> None:
        with torch.device("meta"):
            weights = self.make(name, 0)
        assert torch.equal(weights, self.make(name, 0))

    def test_channels_last(self, name: str) -> None:
        model = make_model(name, shape=CIFAR, classes=10, seed=0)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.is_contiguous(memory_format=torch.channels_last)


class TestNormalisation:
    MEAN, STD = (0.5, 0.4, 0.3), (0.1, 0.2, 0.4)

    def test_per_channel(self) -> None:
        x = images(CIFAR)
        y = Normalize(3, self.MEAN, self.STD)(x)
        for channel in range(3):
            torch.testing.assert_close(y[:, channel], (x[:, channel] - self.MEAN[channel]) / self.STD[channel])

    @pytest.mark.parametrize("name", QUICK)
    def test_inside_of_the_model(self, name: str) -> None:
        x = images(CIFAR)
        inside = make_model(name, shape=CIFAR, classes=10, seed=0, mean=self.MEAN, std=self.STD).eval()
        without = make_model(name, shape=CIFAR, classes=10, seed=0).eval()
        torch.testing.assert_close(inside(x), without(Normalize(3, self.MEAN, self.STD)(x)))
        assert not torch.allclose(inside(x), without(x))

    @pytest.mark.parametrize("name", QUICK)
    def test_saved_with_the_weights(self, name: str) -> None:
        saved = make_model(name, shape=CIFAR, classes=10, seed=0, mean=self.MEAN, std=self.STD).eval()
        loaded = make_model(name, shape=CIFAR, classes=10, seed=1).eval()
        loaded.load_state_dict(saved.state_dict())
        assert torch.equal(loaded(images(CIFAR)), saved(images(CIFAR)))

    def test_buffers(self) -> None:
        model = make_model("mlp", shape=CIFAR, classes=10, seed=0, mean=(0.5,), std=self.STD)
        buffers = {name.rpartition(".")[2]: buffer.flatten().tolist() for name, buffer in model.named_buffers()}
        assert buffers == {"mean": [0.5] * 3, "std": pytest.approx(self.STD)}

    @pytest.mark.parametrize("name", QUICK)
    @pytest.mark.parametrize("shape", [(1, 32, 32), (4, 32, 32)], ids=str)
    def test_another_number_of_channels(self, name: str, shape: tuple[int, int, int]) -> None:
        model = make_model(name, shape=CIFAR, classes=10, seed=0)
        with pytest.raises(ValueError, match=r"x must have shape \(N, 3, height, width\), got \(2, ., 32, 32\)"):
            model(images(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vgg"}, "name must be one of small_cnn, mlp, resnet18, wideresnet28_10, got 'vgg'"),
        ({"shape": (28, 28)}, r"shape must be \(channels, height, width\) .* for mlp, got \(28, 28\)"),
        ({"shape": (0, 28, 28)}, r"shape must be .* 1 or more channels .* got \(0, 28, 28\)"),
        ({"shape": (1, 28, 0)}, r"shape must be .* 1 or more pixels each way for mlp, got \(1, 28, 0\)"),
        ({"classes": 1}, "classes must be 2 or more, got 1"),
        ({"mean": (0.1, 0.2)}, r"mean must have one value for each of 3 channels or one, got \(0.1, 0.2\)"),
        ({"std": ()}, r"std must have one value for each of 3 channels or one, got \(\)"),
        ({"std": (1.0, 0.0, 1.0)}, r"std must be above 0, got \(1.0, 0.0, 1.0\)"),
        ({"mean": (math.nan,)}, r"mean must be finite, got \(nan,\)"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"name": "mlp", "shape": CIFAR, "classes": 10, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        make_model(arguments.pop("name"), **arguments)


def test_a_small_cnn_keeps_its_type() -> None:
    assert isinstance(small_cnn(0, classes=3), SmallCNN)
    assert small_cnn(0, classes=3)(images(DIGITS)).shape == (2, 3)
