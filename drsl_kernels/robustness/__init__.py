"""Attacks, robust evaluation and training on top of the losses; the command line is `drsl`.

What is imported here needs torch alone. Data, comparison and command line need the
extra "lab".
"""

from .attack_kinds import SingleStep, TargetedAttack, Transfer
from .attack_objects import FGSM, PGD, SingleFourier
from .attack_table import AttackOutcome, AttackTable, attack_table
from .attacks import ATTACK_LOSSES, fgsm, pgd
from .autoattack import AutoAttackMember
from .evaluate import Attack, WorstCase, second_largest_softmax, worst_case
from .fourier import FourierAttack, FourierSweep, fourier_direction, single_fourier_attack
from .losses import TrainingLoss
from .recipe import Adversarial, Recipe
from .train import EpochLog, train

__all__ = [
    "ATTACK_LOSSES",
    "FGSM",
    "PGD",
    "Adversarial",
    "Attack",
    "AttackOutcome",
    "AttackTable",
    "AutoAttackMember",
    "EpochLog",
    "FourierAttack",
    "FourierSweep",
    "Recipe",
    "SingleFourier",
    "SingleStep",
    "TargetedAttack",
    "TrainingLoss",
    "Transfer",
    "WorstCase",
    "attack_table",
    "fgsm",
    "fourier_direction",
    "pgd",
    "second_largest_softmax",
    "single_fourier_attack",
    "train",
    "worst_case",
]
