"""Seeds derived from (seed, epoch, position), so that a sample does not depend on the process that prepares it."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from lockstep.data.loading.generators import NestedGenerators, derive_seed, reseed_generators

SampleKey = tuple[int, int, Any]
"""One sample of one pass over the data: seed of the pass, position in it, and what the sampler yields there."""


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
    state = _get_rng_state()
    try:
        yield
    finally:
        _set_rng_state(state)


def _get_rng_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_rng_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


def pack_rng_state(state: tuple[Any, ...]) -> list[Any]:
    """A ``RandomStream.state`` as tensors and plain values."""
    own, (name, keys, *rest), (version, words, gauss) = state
    return [own, [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest], [version, torch.tensor(words), gauss]]


class RandomStream:
    """A random state of torch (CPU), numpy and random apart from that of the process; used in the blocks of ``active``."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._state: tuple[Any, ...] | None = None

    @property
    def state(self) -> tuple[Any, ...] | None:
        """The state after the newest block; None before the first."""
        return self._state

    def restore(self, packed: list[Any]) -> None:
        """Continue from a state that ``pack_rng_state`` has packed."""
        own, (name, keys, *rest), (version, words, gauss) = packed
        numpy_state = name, keys.numpy().astype(np.uint32), *rest
        self._state = own, numpy_state, (version, tuple(words.tolist()), gauss)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream in the block."""
        with preserve_rng_state():
            if self._state is None:
                seed_cpu(self._seed)
            else:
                _set_rng_state(self._state)
            try:
                yield
            finally:
                self._state = _get_rng_state()


class SeededDataset(Dataset[Any]):
    """A dataset whose random augmentation (torch, numpy, random) depends on (seed, epoch, position) alone.

    Only the workers of a loader see it. Reading restores the random state of the process. As in a plain DataLoader,
    ``__getitems__`` is called instead of ``__getitem__`` if the dataset has it. It gets one index at a time; or all together
    if it does not return a list or the dataset's attribute ``deterministic`` is true.

    Args:
        times: For each worker, float64 (workers, 3) in shared memory: seconds spent here, how many of them on reading files,
            and samples. A dataset counts its seconds of reading in its attribute ``read_seconds``.
    """

    def __init__(self, dataset: Dataset[Any], times: Tensor | None = None) -> None:
        self.dataset, self.batch_seed, self._times = dataset, 0, times
        self._nested = NestedGenerators(dataset)

    def __getitems__(self, keys: list[SampleKey]) -> Any:
        """The samples of ``keys``, in that order."""
        if self._times is None:
            return self._samples(keys)
        begin, read = time.perf_counter(), getattr(self.dataset, "read_seconds", 0.0)
        try:
            return self._samples(keys)
        finally:
            info = get_worker_info()
            own = self._times.numpy()[0 if info is None else info.id]
            own += (time.perf_counter() - begin, getattr(self.dataset, "read_seconds", 0.0) - read, len(keys))

    def _samples(self, keys: list[SampleKey]) -> Any:
        self.batch_seed = derive_seed(*keys[0][:2], 0) if keys else 0
        indices = [index for *_, index in keys]
        if getattr(self.dataset, "deterministic", False):
            return self._read(indices)
        samples: list[Any] = []
        with preserve_rng_state():
            for seed, position, index in keys:
                own = derive_seed(seed, position)
                seed_cpu(own)
                reseed_generators(self.dataset, own)
                self._nested.reseed(own)
                sample = self._read([index])
                if not isinstance(sample, list):
                    return self._read(indices)
                samples += sample
        return samples

    def _read(self, indices: list[Any]) -> Any:
        read_all = getattr(self.dataset, "__getitems__", None)
        return read_all(indices) if read_all else [self.dataset[index] for index in indices]


class SeededCollate:
    """A ``collate_fn`` whose random numbers, of MixUp for example, depend on the position of the batch alone.

    A ``collate_fn`` whose attribute ``deterministic`` is true draws none and needs no wrapper.

    Args:
        dataset: The dataset of the same loader, which has read the batch just before.
    """

    def __init__(self, collate: Callable[[Any], Any], dataset: SeededDataset) -> None:
        self.collate, self.dataset = collate, dataset
        self._nested = NestedGenerators(collate)

    def __call__(self, samples: Any) -> Any:
        with preserve_rng_state():
            seed_cpu(self.dataset.batch_seed)
            reseed_generators(self.collate, self.dataset.batch_seed)
            self._nested.reseed(self.dataset.batch_seed)
            return self.collate(samples)
