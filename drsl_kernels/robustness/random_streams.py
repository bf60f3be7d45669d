"""Numbers that depend on where a training run is, and on nothing that happened before.

The order of the images comes from one generator that runs through all epochs. Everything else (crops, starts of
attacks, dropout) has a generator of its own for each batch, seeded by the run's seed, the epoch, the batch and the
purpose. So a run that goes on in the middle of an epoch has no other state to restore, and all losses of a seed see the
same images in the same order, however much randomness the rest of a recipe uses. `train` and `engine` rely on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["deterministic", "generator_for", "own_random_state", "seed_for", "seed_global_state"]


def seed_for(*place: object) -> int:
    """A seed of 63 bits, from numbers and names that say where and what for."""
    digest = hashlib.sha256(repr(place).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_for(*place: object, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed_for(*place))


def seed_global_state(device: torch.device, *place: object) -> None:
    """Seed what modules such as dropout draw from."""
    torch.default_generator.manual_seed(seed_for(*place))
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed_for(*place))


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Put the global random state back as it was, afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Fix what else would change the last digits; afterwards put back what was set.

    Deterministic algorithms cost nothing measurable on the CPU. On a GPU convolutions take deterministic ones, too,
    which can be slower, and an operation that has none warns and does not stop the run.
    """
    debugging = torch.utils.deterministic
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        debugging.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    debugging.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it costs time
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
        debugging.fill_uninitialized_memory = before[3]  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[4:]
