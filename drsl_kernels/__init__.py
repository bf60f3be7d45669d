"""Fused softmax losses for robust classification.

The public names of the library. `fused_drsl_loss` is the one to start with; `info()` says what runs here.
"""

from . import reference
from ._version import __version__
from .backends import Info, info
from .functional import fused_drsl_loss, softmax_loss
from .heads import GaussianMixtureHead, gaussian_mixture_loss
from .modules import DRSLLoss
from .spec import LossStats

__all__ = [
    "DRSLLoss",
    "GaussianMixtureHead",
    "Info",
    "LossStats",
    "__version__",
    "fused_drsl_loss",
    "gaussian_mixture_loss",
    "info",
    "reference",
    "softmax_loss",
]
