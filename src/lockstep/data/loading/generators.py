"""Reseed the random generators in attributes of datasets, samplers and loaders, together with the global ones.

Otherwise their state would depend on how often this process has used them, and so on restarts, ranks and workers.
"""

import functools
import hashlib
import random
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
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

_NESTED = 0x6E6573746564
"""Makes the seeds of nested generators differ from those of the others."""

_OBJECTS, _ITEMS = 10_000, 1_000
"""How many objects are searched for generators, and how many items of one."""

_ELSEWHERE = (ModuleType, Tensor, np.ndarray, Sampler, DataLoader, Trainer, LightningModule, LightningDataModule)
"""What is not searched: it has no generators, or they have seeds of their own."""

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
        _seed(generator, derive_seed(seed, number, *([_first_state(generator)] if keep_seed else [])))


class NestedGenerators:
    """The generators that a dataset or ``collate_fn`` reaches and ``reseed_generators`` does not, such as those of a transform.

    They are looked for once, in attributes, lists, dicts, closures, and the global names that methods use.
    """

    def __init__(self, owner: object) -> None:
        self._owner = owner
        self._found: list[_Generator] | None = None

    def reseed(self, seed: int) -> None:
        """Seed them."""
        if self._found is None:
            direct = set(map(id, _find(self._owner, set())))
            self._found = [each for each in _find_nested(self._owner) if id(each) not in direct]
        for number, generator in enumerate(self._found):
            _seed(generator, derive_seed(seed, number, _NESTED))


def _seed(generator: _Generator, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed >> 1)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed & 0xFFFFFFFF)
    else:
        generator.seed(seed)


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


def _find_nested(owner: object) -> Iterator[_Generator]:
    """Generators in everything that ``owner`` reaches, the nearest first."""
    seen: set[int] = set()
    queue: deque[Any] = deque([owner])
    while queue and len(seen) < _OBJECTS:
        value = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _Generator):
            yield value
        elif not isinstance(value, _ELSEWHERE):
            queue.extend(_parts(value))


def _parts(value: Any) -> Iterator[Any]:
    """What ``value`` consists of."""
    if isinstance(value, dict):
        yield from islice(list(value.values()), _ITEMS)
    elif isinstance(value, list | tuple | set | deque):
        yield from islice(list(value), _ITEMS)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, FunctionType):
        used = (value.__globals__.get(name) for name in value.__code__.co_names)
        yield from (found for found in used if isinstance(found, _Generator))
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # it is not set yet
                yield cell.cell_contents
    elif isinstance(value, type):
        for cls in value.__mro__:
            yield from (member for member in list(vars(cls).values()) if isinstance(member, FunctionType | _Generator))
    else:
        yield from list(getattr(value, "__dict__", {}).values())
        yield type(value)
