"""The classifiers that are trained and attacked, by name.

All of them take images in [0, 1] and normalise them themselves, so that a radius of an attack means the same for
each. Relies on `residual_networks`, which holds the large ones, and `classifier`; `experiment` relies on it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import torch
from torch import nn

from .classifier import Classifier, Normalize, Shape
from .residual_networks import ResNet18, WideResNet

__all__ = [
    "HEADS",
    "MLP",
    "MODELS",
    "Classifier",
    "Normalize",
    "ResNet18",
    "SmallCNN",
    "WideResNet",
    "make_model",
    "small_cnn",
]

_C = TypeVar("_C", bound=Classifier)


class SmallCNN(Classifier):
    """Two convolutions and two linear layers, for images of any size from 4x4.

    `features` maps (N, channels, height, width) to (N, 128), `head` maps that to the logits (N, classes). No batch
    normalisation and no dropout: training and evaluation mode are the same function. Parameters, with ten classes:
    53,002 for 8x8 digits, 421,642 for 28x28 images of one channel, 545,098 for 32x32 images of three.
    """

    def __init__(
        self,
        classes: int = 10,
        shape: Shape = (1, 8, 8),
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        channels, height, width = shape
        features = nn.Sequential(
            OrderedDict(
                normalize=Normalize(channels, mean, std),
                conv1=nn.Conv2d(channels, 32, 3, padding=1),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(32, 64, 3, padding=1),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                linear=nn.Linear(64 * (height // 4) * (width // 4), 128),
                relu3=nn.ReLU(),
            )
        )
        super().__init__(features, nn.Linear(128, classes))


class MLP(Classifier):
    """Two hidden layers of 256 units.

    `features` maps (N, channels, height, width) to (N, 256), `head` maps that to the logits (N, classes). Parameters,
    with ten classes: 85,002 for 8x8 digits, 269,322 for 28x28 images of one channel, 855,050 for 32x32 images of three.
    """

    def __init__(
        self,
        classes: int = 10,
        shape: Shape = (1, 28, 28),
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        channels, height, width = shape
        features = nn.Sequential(
            OrderedDict(
                normalize=Normalize(channels, mean, std),
                flatten=nn.Flatten(),
                linear1=nn.Linear(channels * height * width, 256),
                relu1=nn.ReLU(),
                linear2=nn.Linear(256, 256),
                relu2=nn.ReLU(),
            )
        )
        super().__init__(features, nn.Linear(256, classes))


_MODELS: Final[dict[str, Callable[[int, Shape, Sequence[float], Sequence[float]], Classifier]]] = {
    "small_cnn": SmallCNN,
    "mlp": MLP,
    "resnet18": ResNet18,
    "wideresnet28_10": WideResNet,
}
MODELS: tuple[str, ...] = tuple(_MODELS)

HEADS: Final = ("linear", "gaussian")

# The pooling of the small CNN takes 4x4 pixels to one; the others work from one pixel on.
_SMALLEST: Final = {"small_cnn": 4}


def make_model(
    name: str,
    *,
    shape: Shape,
    classes: int,
    seed: int,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    head: str = "linear",
) -> Classifier:
    """A classifier whose first weights depend on `seed` alone; the global random state is left as it was.

    | name | what | source |
    |---|---|---|
    | `small_cnn` | two convolutions, two linear layers: `SmallCNN` | |
    | `mlp` | two hidden layers: `MLP` | |
    | `resnet18` | the form for 32x32 images: `ResNet18` | He et al., arXiv 1512.03385 |
    | `wideresnet28_10` | `WideResNet` of depth 28 and widening factor 10 | Zagoruyko & Komodakis, arXiv 1605.07146 |

    Args:
        name: one of `MODELS`.
        shape: of an image, (channels, height, width).
        classes: number of logits; 2 or more.
        seed: of the first weights.
        mean, std: what pixels in [0, 1] are normalised with, one value per channel or one for all.
        head: one of `HEADS`: "linear", or "gaussian" for a `drsl_kernels.GaussianMixtureHead` with identity
            covariance. The first weights of `features` are the same.

    Returns:
        A model on the CPU in training mode, float32, channels last. It maps x (N, channels, height, width) in [0, 1]
        to logits (N, classes); its `features` maps x to what its `head` takes.

    Raises:
        ValueError: an unknown name or head, images too small for the model, fewer than 2 classes, or mean or std of
            another length, std not above 0.
    """
    if name not in _MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}, got {name!r}")
    smallest = _SMALLEST.get(name, 1)
    if len(shape) != 3 or shape[0] < 1 or min(shape[1:]) < smallest:
        raise ValueError(
            f"shape must be (channels, height, width) with 1 or more channels and {smallest} or more pixels each way "
            f"for {name}, got {shape!r}"
        )
    if classes < 2:
        raise ValueError(f"classes must be 2 or more, got {classes!r}")
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(map(repr, HEADS))}, got {head!r}")

    def make() -> Classifier:
        model = _MODELS[name](classes, shape, mean, std)
        if head == "gaussian":
            model.make_gaussian()
        return model

    return _seeded(seed, make)


def small_cnn(seed: int, classes: int = 10) -> SmallCNN:
    """A `SmallCNN` for 8x8 digits, as from `make_model`, without normalisation."""
    return _seeded(seed, lambda: SmallCNN(classes))


def _seeded(seed: int, make: Callable[[], _C]) -> _C:
    # On the CPU whatever the default device, and with the CPU's generator only: torch.manual_seed would set those of
    # all GPUs, too.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = make()
    # Channels last: max pooling on the CPU is several times as fast.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
