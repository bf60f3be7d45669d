"""Fused softmax losses for robust classification.

The public names of the library. `fused_drsl_loss` is the one to start with; `info()` says what runs here.
"""

from . import reference
from ._version import __version__
from .backends import Info, info
from .functional import fused_drsl_loss, softmax_loss
from .members import GCELoss, ISCELoss, LogOddsLoss, MAELoss, gce_loss, isce_loss, log_odds_loss, mae_loss
from .modules import DRSLLoss
from .spec import LossStats

__all__ = [
    "DRSLLoss",
    "GCELoss",
    "ISCELoss",
    "Info",
    "LogOddsLoss",
    "LossStats",
    "MAELoss",
    "__version__",
    "fused_drsl_loss",
    "gce_loss",
    "info",
    "isce_loss",
    "log_odds_loss",
    "mae_loss",
    "reference",
    "softmax_loss",
]
