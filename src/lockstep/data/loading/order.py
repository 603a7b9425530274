"""A random order of any number of samples in constant memory: the sample at any position is computed, not drawn.

It uses integer arithmetic only, so it is the same on every machine and with every version of numpy and torch.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lockstep.data.loading.seeding import derive_seed

_SORTED = 4096  # up to this number of samples, all are sorted by a random number: few bits make a Feistel network non-uniform
_ROUNDS = 8
_BLOCK = 8192


class SequentialOrder:
    """The samples one after another."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def read(self, first: int, end: int, stride: int) -> Sequence[int]:
        """The samples at the positions from ``first`` to ``end``."""
        return range(first, end)


class ShuffledOrder:
    """A permutation of ``range(samples)``, chosen by ``key``.

    A Feistel network permutes all numbers with as many bits as ``samples - 1``. Results of ``samples`` or more are permuted
    again (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """

    def __init__(self, samples: int, key: int) -> None:
        self._samples = samples
        self._keys = [np.uint64(derive_seed(key, samples, number)) for number in range(_ROUNDS)]
        self._all: NDArray[np.int64] | None = None
        self._rows: dict[tuple[int, int], list[int]] = {}

    def __len__(self) -> int:
        return self._samples

    def read(self, first: int, end: int, stride: int) -> Sequence[int]:
        """The samples at the positions from ``first`` to ``end``.

        One call computes some thousand positions ahead, which serve the next calls if ``first`` grows by ``stride``.
        """
        if (first, end) not in self._rows:
            starts = range(first, self._samples - (end - first) + 1, stride)[: max(1, _BLOCK // (end - first))]
            positions = np.array(starts)[:, None] + np.arange(end - first)
            rows = self.at(positions.ravel()).reshape(positions.shape)
            self._rows = {(start, start + end - first): row.tolist() for start, row in zip(starts, rows, strict=True)}
        return self._rows[first, end]

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at ``positions``, int64 (n,)."""
        if self._samples <= _SORTED:
            if self._all is None:
                self._all = np.argsort(_mix(np.arange(self._samples, dtype=np.uint64) + self._keys[0]))
            return self._all[positions]
        found = self._permute(positions.astype(np.uint64))
        while len(outside := np.flatnonzero(found >= self._samples)):
            found[outside] = self._permute(found[outside])
        return found.astype(np.int64)

    def _permute(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The Feistel network; its halves differ by one bit if the number of bits is odd."""
        bits = (self._samples - 1).bit_length()
        low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
        high, low = numbers >> low_bits, numbers & (np.uint64(1) << low_bits) - np.uint64(1)
        for even, odd in zip(self._keys[::2], self._keys[1::2], strict=True):
            high = high ^ _mix(low + even) >> np.uint64(64) - high_bits
            low = low ^ _mix(high + odd) >> np.uint64(64) - low_bits
        return high << low_bits | low


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The bijection of ``derive_seed`` (splitmix64), for an array."""
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return numbers ^ numbers >> np.uint64(31)
