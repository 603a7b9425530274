"""Batches in memory that real DataLoader workers reuse: what is still in use keeps its values."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lockstep.data.batch_memory import BatchMemory

BATCHES = 30


class Numbered(Dataset[Tensor]):
    """Images (3, 8, 8), uint8 and in channels-last layout, of their number."""

    def __len__(self) -> int:
        return 4 * BATCHES - 1

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((8, 8, 3), index, dtype=torch.uint8).permute(2, 0, 1)


class Collate:
    """Stacks images, and returns the number of buffers too; ``change`` is what user code does in the worker."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda batch: batch) -> None:
        self.memory, self.change = BatchMemory(), change

    def __call__(self, images: list[Tensor]) -> tuple[Tensor, int]:
        return self.change(self.memory.stack(images)), len(self.memory._buffers)


def loader(collate: Collate, workers: int = 1) -> DataLoader[Any]:
    return DataLoader(Numbered(), 4, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0)


def expected(number: int, batch: Tensor) -> bool:
    values = torch.arange(4 * number, 4 * number + len(batch)).view(-1, 1, 1, 1)
    return batch.shape[1:] == (3, 8, 8) and bool((batch == values).all())


def test_a_worker_reuses_the_memory_of_batches_that_are_gone() -> None:
    batches = loader(Collate())
    for _ in range(2):
        for number, (batch, buffers) in enumerate(batches):
            assert type(batch) is Tensor and batch.is_contiguous(memory_format=torch.channels_last)
            assert expected(number, batch) and buffers <= 5  # of prefetched batches, this one and the one before
    assert len(batch) == 3


@pytest.mark.parametrize("keep", [lambda batch: batch, lambda batch: batch[1:], lambda batch: batch.numpy()[1:]])
def test_batches_and_parts_of_them_that_are_in_use_keep_their_values(keep: Callable[[Tensor], Any]) -> None:
    for workers in (1, 2):
        kept = [(keep(batch), buffers) for batch, buffers in loader(Collate(), workers)]
        assert kept[-1][1] == 8  # the other batches have memory of their own
        first = 4 - len(kept[0][0])
        for number, (batch, _) in enumerate(kept):
            assert (
                torch.as_tensor(batch)[:, 0, 0, 0] == torch.arange(4 * number + first, 4 * number + first + len(batch))
            ).all()


def test_a_forked_process_does_not_release_memory_that_its_parent_uses() -> None:
    batches = iter(loader(Collate()))
    kept = next(batches)[0]
    if (child := os.fork()) == 0:
        del kept
        os._exit(0)
    os.waitpid(child, 0)
    for _ in batches:
        pass
    assert expected(0, kept)


@pytest.mark.parametrize("change", [lambda batch: batch.float(), lambda batch: batch[:2], lambda batch: batch.clone()])
def test_what_user_code_computes_in_a_worker_is_an_ordinary_tensor(change: Callable[[Tensor], Tensor]) -> None:
    batches = [batch for batch, _ in loader(Collate(change))]
    assert all(type(batch) is Tensor and expected(number, batch) for number, batch in enumerate(batches))


def test_without_a_worker_and_in_other_layouts() -> None:
    assert all(expected(number, batch) for number, (batch, _) in enumerate(loader(Collate(), 0)))
    memory = BatchMemory()
    assert memory.stack([torch.ones(3, 4, 5), torch.zeros(3, 4, 5)]).is_contiguous() and not memory._buffers
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        memory.stack([torch.ones(3, 4, 5), torch.zeros(3, 4, 6)])


def test_larger_batches_replace_the_buffers_of_smaller_ones() -> None:
    groups = [[number] * size for number, size in enumerate([*range(1, 9)] * 3)]
    for group, (batch, buffers) in zip(
        groups, DataLoader(Numbered(), batch_sampler=groups, num_workers=1, collate_fn=Collate()), strict=True
    ):
        assert batch[:, 0, 0, 0].tolist() == group and buffers <= 5
