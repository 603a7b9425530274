"""What DeepSpeed 0.19.8 gets wrong with NVMe, put right. Each would train on, with other numbers or none.

Its code for NVMe never looks at what became of a read or a write.
"""

import importlib
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lockstep.core import RunError

_ALIGNED = 512
"""Bytes that the address of memory must be a multiple of, for a read past the kernel's cache."""


@cache
def patch_nvme() -> None:
    """Put it right, once in a process."""
    folder = "deepspeed.runtime.swap_tensor"
    parameters = importlib.import_module(f"{folder}.partitioned_param_swapper")
    optimizer = importlib.import_module(f"{folder}.partitioned_optimizer_swapper")
    others = [importlib.import_module(f"{folder}.{name}") for name in ("optimizer_utils", "async_swapper", "utils")]
    init = importlib.import_module("deepspeed.runtime.zero.partition_parameters").Init
    set_dtype, swap_in = init._set_dtype, parameters.AsyncPartitionedParameterSwapper.swap_in
    # Where float16 is not supported, as on CPUs, parameters would go through bfloat16, whatever they are. The config knows.
    init._set_dtype = lambda self, config, dtype: set_dtype(self, config, dtype if config is None else None)
    # One that forward and then backward need next is asked for twice, which fails.
    parameters.AsyncPartitionedParameterSwapper.swap_in = lambda self, wanted, *more, **named: swap_in(
        self, list(dict.fromkeys(wanted)), *more, **named
    )
    optimizer.PartitionedOptimizerSwapper._swap_in_pinned_gradients = _read_gradients
    for module in (parameters, optimizer, importlib.import_module(f"{folder}.pipelined_optimizer_swapper"), *others):
        vars(module).update(swap_in_tensors=_start_read, swap_out_tensors=_start_write)


def _start_read(handle: Any, tensors: Sequence[Tensor], paths: Sequence[str]) -> None:
    """Begin to read each file into its tensor; one whose address does not allow that would silently stay as it is."""
    for tensor, path in zip(tensors, paths, strict=True):
        if handle.is_pinned(tensor) and tensor.data_ptr() % _ALIGNED:
            raise RunError(
                f"deepspeed.config: DeepSpeed cannot read {path} as the file wants it to; take out pipeline_read and such."
            )
        if handle.async_pread(tensor, path, 0) != 0:
            raise RunError(f"deepspeed.nvme_path: {path} cannot be read.")


def _start_write(handle: Any, tensors: Sequence[Tensor], paths: Sequence[str]) -> None:
    """Begin to write each tensor into its file; the space is taken first, since a full disk would lose it silently."""
    for tensor, path in zip(tensors, paths, strict=True):
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                if os.fstat(file).st_size < tensor.nbytes:
                    os.posix_fallocate(file, 0, tensor.nbytes)
            finally:
                os.close(file)
        except OSError as error:
            raise RunError(f"deepspeed.nvme_path: {path} cannot be written ({error.strerror}); make room, and go on.") from None
        if handle.async_pwrite(tensor, path, 0) != 0:
            raise RunError(f"deepspeed.nvme_path: {path} cannot be written.")


def _read_gradients(swapper: Any, aio_handle: Any, parameter: Any, gradient_tensor: Tensor) -> None:
    """Read gradients by way of memory of their own: where one begins in ``gradient_tensor`` depends on those before it."""
    gradients = list(swapper.swap_params_info[swapper.parameter_id(parameter)].swapped_gradients.values())
    tensors = [torch.empty(gradient.length, dtype=gradient_tensor.dtype) for gradient in gradients]
    _start_read(aio_handle, tensors, [gradient.path for gradient in gradients])
    assert aio_handle.wait() == len(gradients)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        gradient_tensor.narrow(0, gradient.offset, gradient.length).copy_(tensor)
