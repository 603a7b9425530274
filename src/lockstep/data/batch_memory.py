"""Shared memory of batches, which DataLoader workers reuse: for a new batch, the kernel would clear and map new pages.

For images of 224×224 that takes a fifth of the time in which a worker reads, decodes and crops a JPEG of 256 pixels.
"""

import math
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from lockstep.compat.torch import plain_results

_MAX_BUFFERS = 8
"""Buffers of a worker; while all are in use, batches get new memory."""


class BatchMemory:
    """Stacks images to batches, in a worker into shared memory that the process which trains no longer uses.

    The last byte of a buffer is 1 from the time when the worker fills it until the batch is gone in the process that trains.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def stack(self, images: Sequence[Tensor]) -> Tensor:
        """A batch (B, C, H, W) of ``images`` (C, H, W), in channels-last layout if the first one is."""
        # A transposition of each image would take longer than decoding it; the device transposes the whole batch.
        is_last = images[0].permute(1, 2, 0).is_contiguous()
        parts = [image.permute(1, 2, 0) for image in images] if is_last else list(images)
        buffer = self._reserve(parts) if get_worker_info() is not None else None
        if buffer is None:
            batch: Tensor = default_collate(parts)
            return batch.permute(0, 3, 1, 2) if is_last else batch
        shape = (len(parts), *parts[0].shape)
        stacked = torch.stack(parts, out=_view(buffer, parts[0].dtype, shape))
        batch = (stacked.permute(0, 3, 1, 2) if is_last else stacked).as_subclass(_SharedBatch)
        batch.source = buffer, parts[0].dtype, shape, is_last
        return batch

    def _reserve(self, parts: Sequence[Tensor]) -> Tensor | None:
        """A buffer that no batch uses, marked as used; None if all are in use, or the parts cannot be stacked."""
        first = parts[0]
        if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
            return None
        size = len(parts) * first.nbytes + 1
        unused = [buffer for buffer in self._buffers if not buffer[-1]]
        if found := [buffer for buffer in unused if len(buffer) >= size]:
            buffer = found[0]
        elif len(self._buffers) - len(unused) < _MAX_BUFFERS:
            self._buffers = [buffer for buffer in self._buffers if buffer[-1]]  # the unused ones are too small
            buffer = torch.empty(size, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
            self._buffers.append(buffer)
        else:
            return None
        buffer[-1] = 1
        return buffer


class _SharedBatch(Tensor):
    """A batch in a buffer; what is computed from it in the worker is an ordinary tensor, and its buffer is not reused."""

    __torch_function__ = plain_results  # type: ignore[assignment]
    source: tuple[Tensor, torch.dtype, tuple[int, ...], bool]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _receive, self.source


def _receive(buffer: Tensor, dtype: torch.dtype, shape: tuple[int, ...], is_last: bool) -> Tensor:
    """The batch in the process that trains, as an ordinary tensor; when its memory is freed, the worker reuses the buffer."""
    pixels = buffer[:-1].numpy()[:]  # torch keeps this array for as long as any tensor uses its memory
    weakref.finalize(pixels, _release, buffer, os.getpid()).atexit = False
    batch = _view(torch.from_numpy(pixels), dtype, shape)
    return batch.permute(0, 3, 1, 2) if is_last else batch


def _release(buffer: Tensor, process: int) -> None:
    if os.getpid() == process:  # a forked process may drop its copy earlier
        buffer[-1] = 0


def _view(buffer: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
