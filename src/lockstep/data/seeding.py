"""The order of the data: a function of (seed, epoch), never of the number of ranks or workers.

Every DataLoader of a run passes through ``in_order``. Its ``batch_size`` is the global batch, the samples of one step
over all ranks; batch *i* is the same set of samples on 1, 2 or 64 ranks, and each rank takes a consecutive slice of it.
What is random in a sample (augmentation) is seeded with (seed, epoch, index), so it does not matter either which
process prepares it.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

SampleKey = tuple[int, int]
"""One sample of one epoch: (epoch, index)."""


def derive_seed(*parts: int) -> int:
    """A 64-bit seed from ``parts``: equal for equal parts, unrelated otherwise (splitmix64, Steele et al. 2014)."""
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


def seed_cpu(seed: int) -> None:
    """Seed torch on the CPU, numpy and random with a 64-bit number, in about 8 µs.

    Not ``torch.manual_seed``: that also visits every accelerator and alone takes some 130 µs.
    """
    torch.default_generator.manual_seed(seed >> 1)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Leave torch (CPU), numpy and random afterwards as they were."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])


class SeededDataset(Dataset[Any]):
    """A dataset whose randomness (torch, numpy, random) depends on (seed, epoch, index) alone.

    A dataset with a true attribute ``deterministic`` promises to use none, and is fetched by its own ``__getitems__``
    if it has one. The random state of the process is left as it was.

    Args:
        dataset: The map-style dataset to read from.
        seed: The run's seed.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not yet there while unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, draw: SampleKey) -> Any:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: list[SampleKey]) -> Any:
        """The samples of ``draws``, in their order."""
        if getattr(self.dataset, "deterministic", False):
            indices = [index for _, index in draws]
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(indices)
            return [self.dataset[index] for index in indices]
        with preserve_rng_state():
            return [self._seeded(*draw) for draw in draws]

    def _seeded(self, epoch: int, index: int) -> Any:
        seed_cpu(derive_seed(self.seed, epoch, index))
        return self.dataset[index]
