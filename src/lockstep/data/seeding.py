"""Seeds derived from (seed, epoch, index), so that a sample does not depend on the process that prepares it."""

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

    ``torch.manual_seed`` also visits every accelerator and takes about 130 µs.
    """
    torch.default_generator.manual_seed(seed >> 1)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the random state of torch (CPU), numpy and random at the end of the block."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])


class SeededDataset(Dataset[Any]):
    """A dataset whose random augmentation (torch, numpy, random) depends on (seed, epoch, index) alone.

    Reading restores the random state of the process. A dataset whose attribute ``deterministic`` is true uses no random
    numbers; its own ``__getitems__`` is called if it has one.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not set yet while unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, key: SampleKey) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> Any:
        """The samples of ``keys``, in that order."""
        if getattr(self.dataset, "deterministic", False):
            indices = [index for _, index in keys]
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(indices)
            return [self.dataset[index] for index in indices]
        samples = []
        with preserve_rng_state():
            for epoch, index in keys:
                seed_cpu(derive_seed(self.seed, epoch, index))
                samples.append(self.dataset[index])
        return samples
