"""Fused softmax losses for robust classification.

The public names of the library. `fused_drsl_loss` is the one to start with; `info()` says what runs here.
"""

from . import reference
from ._version import __version__
from .activations import log_sigsoftmax, sigsoftmax
from .backends import Info, info
from .functional import fused_drsl_loss, softmax_loss
from .mixtures import MixtureOfSigsoftmax, MixtureOfSoftmax
from .modules import DRSLLoss
from .spec import LossStats

__all__ = [
    "DRSLLoss",
    "Info",
    "LossStats",
    "MixtureOfSigsoftmax",
    "MixtureOfSoftmax",
    "__version__",
    "fused_drsl_loss",
    "info",
    "log_sigsoftmax",
    "reference",
    "sigsoftmax",
    "softmax_loss",
]
