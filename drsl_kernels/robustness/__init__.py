"""Attacks, robust evaluation and training on top of the losses; the command line is `drsl`.

What is imported here needs torch alone. Data, comparison and command line need the
extra "lab".
"""

from .attacks import ATTACK_LOSSES, pgd
from .evaluate import Attack, WorstCase, second_largest_softmax, worst_case
from .losses import TrainingLoss
from .recipe import Adversarial, Recipe
from .train import EpochLog, train

__all__ = [
    "ATTACK_LOSSES",
    "Adversarial",
    "Attack",
    "EpochLog",
    "Recipe",
    "TrainingLoss",
    "WorstCase",
    "pgd",
    "second_largest_softmax",
    "train",
    "worst_case",
]
