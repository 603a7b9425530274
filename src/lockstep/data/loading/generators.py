"""Reseed the random generators in attributes of datasets, samplers and loaders, together with the global ones.

Otherwise their state would depend on how often this process has used them, and so on restarts, ranks and workers.
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def derive_seed(*parts: int) -> int:
    """A 64-bit seed from ``parts``: equal for equal parts, unrelated otherwise (splitmix64, Steele et al. 2014)."""
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


_Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
_PARTS = (Dataset, Sampler, DataLoader)

_first_states: dict[int, tuple[_Generator, int]] = {}
"""Each generator reseeded with ``keep_seed``, and a hash of its initial state."""


def reseed_generators(owner: object, seed: int, keep_seed: bool = False) -> None:
    """Seed the generators that are attributes of ``owner``, or of datasets, samplers and loaders in its attributes.

    Args:
        owner: A dataset, sampler or loader.
        seed: Determines the new state.
        keep_seed: Whether the new state also depends on the initial one, which the owner may choose for each rank.
    """
    for number, generator in enumerate(_find(owner, set())):
        own = derive_seed(seed, number, *([_first_state(generator)] if keep_seed else []))
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own >> 1)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(own).state
        elif isinstance(generator, np.random.RandomState):
            generator.seed(own & 0xFFFFFFFF)
        else:
            generator.seed(own)


def _first_state(generator: _Generator) -> int:
    if id(generator) not in _first_states:
        if isinstance(generator, torch.Generator):
            state: Any = generator.get_state().tolist()
        elif isinstance(generator, np.random.Generator):
            state = generator.bit_generator.state
        else:
            state = generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()
        digest = hashlib.sha256(repr(state).encode()).digest()
        _first_states[id(generator)] = generator, int.from_bytes(digest[:8])
    return _first_states[id(generator)][1]


def _find(owner: object, seen: set[int]) -> Iterator[_Generator]:
    if id(owner) in seen:
        return
    seen.add(id(owner))
    for name, value in list(getattr(owner, "__dict__", {}).items()):
        if isinstance(value, _Generator):
            if id(value) not in seen:
                seen.add(id(value))
                yield value
        elif isinstance(value, _PARTS) or name in ("sampler", "batch_sampler"):  # they need no base class
            yield from _find(value, seen)
        elif type(value) in (list, tuple) and value and isinstance(value[0], _PARTS):
            for part in value:
                yield from _find(part, seen)
