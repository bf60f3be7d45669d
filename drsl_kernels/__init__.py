"""Fused softmax losses for robust classification.

The public names of the library. `fused_drsl_loss` is the one to start with; `info()` says what runs here.
"""

from . import reference
from ._version import __version__
from .backends import Info, info
from .functional import fused_drsl_loss, softmax_loss
from .modules import DRSLLoss
from .regularizers import L1, Absum, absum_penalty, absum_step, l1_penalty, l1_step
from .spec import LossStats

__all__ = [
    "L1",
    "Absum",
    "DRSLLoss",
    "Info",
    "LossStats",
    "__version__",
    "absum_penalty",
    "absum_step",
    "fused_drsl_loss",
    "info",
    "l1_penalty",
    "l1_step",
    "reference",
    "softmax_loss",
]
