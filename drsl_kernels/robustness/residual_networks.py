"""ResNet-18 for 32x32 images and wide residual networks.

First weights as in the code of both papers (facebook/fb.resnet.torch, szagoruyko/wide-residual-networks): those of
convolutions normal with variance 2 / (kernel area * output channels), no bias before a batch normalisation, biases
of the linear layer 0. Relies on `classifier`; `models` relies on it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .classifier import Classifier, Normalize, Shape

__all__ = ["ResNet18", "WideResNet"]


class ResNet18(Classifier):
    """ResNet-18 in its form for 32x32 images: a 3x3 convolution with stride 1 in front, and no max pooling.

    He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385): table 1, 18 layers, with
    projection shortcuts where the shape changes (option B). `features` maps (N, channels, height, width) to (N, 512).
    11,173,962 parameters for three channels and ten classes.
    """

    def __init__(
        self,
        classes: int = 10,
        shape: Shape = (3, 32, 32),
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        features = nn.Sequential(
            OrderedDict(
                normalize=Normalize(shape[0], mean, std),
                conv=_convolution(shape[0], 64),
                norm=nn.BatchNorm2d(64),
                relu=nn.ReLU(),
                stage1=nn.Sequential(_BasicBlock(64, 64, 1), _BasicBlock(64, 64, 1)),
                stage2=nn.Sequential(_BasicBlock(64, 128, 2), _BasicBlock(128, 128, 1)),
                stage3=nn.Sequential(_BasicBlock(128, 256, 2), _BasicBlock(256, 256, 1)),
                stage4=nn.Sequential(_BasicBlock(256, 512, 2), _BasicBlock(512, 512, 1)),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
            )
        )
        super().__init__(features, nn.Linear(512, classes))
        _initialize(self)


class WideResNet(Classifier):
    """A wide residual network of basic blocks, by default WRN-28-10.

    Zagoruyko, Komodakis, "Wide Residual Networks" (arXiv 1605.07146), table 1, without dropout: three groups of
    (depth - 4) / 6 blocks with 16, 32 and 64 times `widen_factor` channels, activated before each convolution.
    `features` maps (N, channels, height, width) to (N, 64 * widen_factor). 36,479,194 parameters for three channels
    and ten classes.

    Raises:
        ValueError: depth is not 4 more than a positive multiple of 6.
    """

    def __init__(
        self,
        classes: int = 10,
        shape: Shape = (3, 32, 32),
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        *,
        depth: int = 28,
        widen_factor: int = 10,
    ) -> None:
        blocks, rest = divmod(depth - 4, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth must be 6n + 4 with n 1 or more, got {depth!r}")
        channels = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        features = nn.Sequential(
            OrderedDict(
                normalize=Normalize(shape[0], mean, std),
                conv=_convolution(shape[0], channels[0]),
                group1=_group(channels[0], channels[1], blocks, 1),
                group2=_group(channels[1], channels[2], blocks, 2),
                group3=_group(channels[2], channels[3], blocks, 2),
                norm=nn.BatchNorm2d(channels[3]),
                relu=nn.ReLU(),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
            )
        )
        super().__init__(features, nn.Linear(channels[3], classes))
        _initialize(self)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions, each normalised, and the shortcut around them; activated after the sum."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(channels_in, channels_out, stride=stride)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = _convolution(channels_out, channels_out)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            projection = _convolution(channels_in, channels_out, kernel=1, stride=stride)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class _WideBlock(nn.Module):
    """Two 3x3 convolutions, each after normalisation and activation, and the shortcut around them.

    A projection, where the number of channels changes, takes the activated input, as the convolutions do.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = _convolution(channels_in, channels_out, stride=stride)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.conv2 = _convolution(channels_out, channels_out)
        self.projection: nn.Module | None = None
        if channels_in != channels_out:
            self.projection = _convolution(channels_in, channels_out, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        shortcut = x if self.projection is None else self.projection(activated)
        inner = F.relu(self.norm2(self.conv1(activated)))
        total: Tensor = self.conv2(inner) + shortcut
        return total


def _group(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    rest = [_WideBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)]
    return nn.Sequential(_WideBlock(channels_in, channels_out, stride), *rest)


def _convolution(channels_in: int, channels_out: int, *, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, bias=False)


def _initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
