"""Fused softmax losses for robust classification.

The public names of the library. `fused_drsl_loss` is the one to start with; `info()` says what runs here.
"""

from . import reference
from ._version import __version__
from .activations import log_sigsoftmax, sigsoftmax
from .backends import Info, info
from .functional import fused_drsl_loss, softmax_loss
from .heads import GaussianMixtureHead, gaussian_mixture_loss
from .linear import fused_linear_drsl_loss, fused_linear_softmax_loss
from .members import GCELoss, ISCELoss, LogOddsLoss, MAELoss, gce_loss, isce_loss, log_odds_loss, mae_loss
from .mixtures import MixtureOfSigsoftmax, MixtureOfSoftmax
from .modules import DRSLLoss, FusedLinearDRSLLoss
from .parallel import parallel_drsl_loss, parallel_softmax_loss
from .regularizers import L1, Absum, absum_penalty, absum_step, l1_penalty, l1_step
from .spec import LossStats

__all__ = [
    "L1",
    "Absum",
    "DRSLLoss",
    "FusedLinearDRSLLoss",
    "GCELoss",
    "GaussianMixtureHead",
    "ISCELoss",
    "Info",
    "LogOddsLoss",
    "LossStats",
    "MAELoss",
    "MixtureOfSigsoftmax",
    "MixtureOfSoftmax",
    "__version__",
    "absum_penalty",
    "absum_step",
    "fused_drsl_loss",
    "fused_linear_drsl_loss",
    "fused_linear_softmax_loss",
    "gaussian_mixture_loss",
    "gce_loss",
    "info",
    "isce_loss",
    "l1_penalty",
    "l1_step",
    "log_odds_loss",
    "log_sigsoftmax",
    "mae_loss",
    "parallel_drsl_loss",
    "parallel_softmax_loss",
    "reference",
    "sigsoftmax",
    "softmax_loss",
]
