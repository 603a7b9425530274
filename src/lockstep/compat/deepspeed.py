"""Private names of DeepSpeed: the tensors that ZeRO partitions, its start on a CPU, and corrections of its NVMe offload."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.compat import patch, private
from lockstep.core import RunError, UsageError

_STAGE_3_NAMES = (
    "optimizer_swapper",
    "grad_position",
    "get_param_id",
    "_swappable_optimizer_subgroup",
    "_optimizer_states_and_gradient_swap_in",
    "_optimizer_states_and_gradient_swap_out",
    "_reassign_or_swap_out_partitioned_parameters",
)
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def prepare_cpu() -> None:
    """Let DeepSpeed train on a CPU without compiling an op, and in float16.

    A CPU run needs no op, but probing which ones compile requires a compiler and half a minute. DeepSpeed allows float16
    only on CPUs with instructions for it; torch also computes in float16 without them, but slowly.
    """
    patch("deepspeed", import_module("deepspeed.ops"), "_probe_compatible_ops", dict)
    patch("deepspeed", import_module("deepspeed.accelerator").get_accelerator(), "is_fp16_supported", lambda: True)


def merge_async_io_sources(builder: Any, folder: Path) -> None:
    """Let the builder of async_io compile the nine files that include torch as one, from a copy of the sources in ``folder``.

    A compiler needs 20 seconds to read torch's headers. DeepSpeed's own headers have no include guards; the copies do.
    """
    root = Path(builder.deepspeed_src_path("csrc"))
    for name in ("aio", "pin_memory"):
        shutil.copytree(root / name, folder / name, dirs_exist_ok=True)
    for header in folder.rglob("*.h"):
        header.write_text("#pragma once\n" + header.read_text())
    sources = [folder.joinpath(*Path(name).parts[1:]) for name in builder.sources()]
    with_torch = [path for path in sources if path.parent.name == "py_lib"]
    merged = folder / "aio" / "py_lib" / "async_io.cpp"
    merged.write_text("".join(f'#include "{path.name}"\n' for path in with_torch))
    own = [Path(name) for name in builder.include_paths()]
    includes = [str(path if path.is_absolute() else folder.joinpath(*path.parts[1:])) for path in own]  # CUDA's is absolute
    names = [str(path) for path in (merged, *(path for path in sources if path not in with_torch))]
    patch("deepspeed", builder, "sources", lambda: names)
    patch("deepspeed", builder, "include_paths", lambda: includes)


def needs_nvcc(builder: Any) -> bool:
    """Whether an op cannot be compiled because nvcc is missing; on a machine with GPUs, async_io needs it too."""
    builders = import_module("deepspeed.ops.op_builder.builder")
    device = import_module("deepspeed.accelerator").get_accelerator().device_name()
    if device != "cuda" or not isinstance(builder, builders.CUDAOpBuilder):
        return False
    try:
        builders.installed_cuda_version()
    except builders.MissingCUDAException:
        return True
    return False


def is_partitioned(parameter: Any) -> bool:
    """Whether each rank holds only a part of ``parameter``, as in stage 3."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: Any) -> torch.Size:
    """The shape of the whole parameter, which may be partitioned."""
    return torch.Size(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


def gathered(parameter: Any, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
    """Gather a partitioned parameter on every rank; changes by ``modifier_rank`` are broadcast to all ranks."""
    if not is_partitioned(parameter):
        return nullcontext()
    gather: AbstractContextManager[Any] = import_module("deepspeed").zero.GatheredParameters([parameter], modifier_rank)
    return gather


class ZeroOptimizer:
    """The optimizer of a DeepSpeed engine in ZeRO stage 1, 2 or 3, and the state that it partitions.

    Attributes:
        inner: The optimizer of the module, which steps flat tensors instead of parameters.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._zero: Any = engine.optimizer
        self._is_stage_3 = hasattr(self._zero, "fp32_partitioned_groups_flat")
        names = _STAGE_3_NAMES if self._is_stage_3 else ("single_partition_of_fp32_groups", "update_lp_params")
        for owner, needed in ((self._zero, ("optimizer", "loss_scaler", *names)), (engine, _COUNTERS)):
            for name in needed:
                private("deepspeed", owner, name)
        self.inner: Optimizer = self._zero.optimizer

    @property
    def flats(self) -> list[Tensor]:
        """The tensors that ``inner`` steps: for each group, or part of one, this rank's elements of its parameters."""
        return list(self._zero.fp32_partitioned_groups_flat if self._is_stage_3 else self._zero.single_partition_of_fp32_groups)

    def capture_counters(self) -> dict[str, dict[str, Any]]:
        """State of the loss ``scaler``, and ``counters`` of steps, samples and batches."""
        scaler = vars(self._zero.loss_scaler).items()
        return {
            "scaler": {key: value for key, value in scaler if isinstance(value, bool | int | float | str | None)},
            "counters": {name: getattr(self._engine, name) for name in _COUNTERS},
        }

    def restore_counters(self, scaler: dict[str, Any], counters: dict[str, int]) -> None:
        """Restore what ``capture_counters`` returned."""
        vars(self._zero.loss_scaler).update(scaler)
        vars(self._engine).update(counters)

    def update_model_weights(self) -> None:
        """Copy the weights that the optimizer steps to the model; stage 3 does so at the end of ``in_memory``."""
        if not self._is_stage_3:
            self._zero.update_lp_params()

    @contextmanager
    def in_memory(self, index: int) -> Iterator[None]:
        """Load flat tensor ``index`` and its optimizer state into memory, then write them back to where they are offloaded."""
        is_swapped = self._is_stage_3 and self._zero._swappable_optimizer_subgroup(index)
        if is_swapped:
            self._zero._optimizer_states_and_gradient_swap_in(index)
        yield
        if self._is_stage_3:
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        if is_swapped:
            self._zero._optimizer_states_and_gradient_swap_out(index)

    def fragments(self, module: nn.Module) -> "Iterator[Fragment]":
        """This rank's part of each parameter that ZeRO partitions."""
        for name, parameter in module.named_parameters():
            p: Any = parameter
            if is_partitioned(p):
                padded = p.ds_tensor.ds_numel
                start = min(padded * self._engine.global_rank, p.ds_numel)
                position = self._zero.grad_position.get(self._zero.get_param_id(p)) if p.requires_grad else None
                flat, offset = position[:2] if position else (None, 0)
                size = min(padded, p.ds_numel - start)
                yield Fragment(self, p, name, list(p.ds_shape), start, size, padded, flat, offset)
            elif (mapping := getattr(p, "_hp_mapping", None)) is not None:
                part, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                flat, size = mapping.param_group_index, place.numel
                yield Fragment(self, p, name, list(p.shape), part.start, size, size, flat, place.start)

    def flat_state(self, index: int, key: str | None) -> Tensor:
        """Flat tensor ``index``, or what the optimizer keeps for it under ``key``."""
        found: Tensor = self.flats[index] if key is None else self.inner.state[self.flats[index]][key]
        return found

    def read_flat(self, index: int, key: str | None = None) -> Tensor:
        """Return what ``flat_state`` does: a live tensor, or one mapped from NVMe if it is offloaded there.

        An offloaded state need not fit into memory. Nothing writes to its files between two steps.
        """
        tensor = self.flat_state(index, key)
        swapper: Any = self._zero.optimizer_swapper if self._is_stage_3 else None
        swapped: Any = swapper and swapper.swap_params_info.get(swapper.parameter_id(self.flats[index]))
        for one in swapped.tensors if swapped else ():
            if one.compute_tensor is tensor:
                return torch.from_file(one.swap_path, size=swapped.numel(), dtype=swapped.dtype())
        return tensor


@dataclass(frozen=True)
class Fragment:
    """This rank's part of a parameter.

    Attributes:
        shape: Shape of the whole parameter.
        start, size: First element and number of elements, in the flattened parameter.
        padded: Number of elements with padding, which the last rank of stage 3 may have.
        flat: Index of the flat tensor that contains it; None if the optimizer does not step the parameter.
        offset: First element in the flat tensor.
    """

    zero: ZeroOptimizer
    parameter: Any
    name: str
    shape: list[int]
    start: int
    size: int
    padded: int
    flat: int | None
    offset: int

    def read_unstepped(self) -> Tensor:
        """The weight (size,) of a parameter that the optimizer does not step: live, or mapped from NVMe."""
        part = self.parameter.ds_tensor
        if part.status.name == "AVAILABLE":
            return torch.as_tensor(part).narrow(0, 0, self.size)
        swapper = self.parameter.nvme_swapper
        path = swapper.get_path(self.parameter, must_exist=True)
        return torch.from_file(path, size=part.ds_numel, dtype=swapper.dtype).narrow(0, 0, self.size)

    def write(self, key: str | None, value: Tensor) -> None:
        """Set the weight, or its optimizer state ``key``, to ``value``, inside ``ZeroOptimizer.in_memory``."""
        assert self.flat is not None
        target = self.zero.flat_state(self.flat, key).narrow(0, self.offset, self.padded)
        target.copy_(nn.functional.pad(value, (0, self.padded - self.size)))


@cache
def patch_nvme() -> None:
    """Correct DeepSpeed's NVMe offload, once per process: it ignores failed reads and writes, and so trains on wrong numbers.

    Raises:
        UsageError: Python runs without assert statements, in which DeepSpeed waits for its reads and writes.
    """
    if not __debug__:
        raise UsageError(
            "deepspeed.nvme_path: offload to NVMe does not work under python -O, because DeepSpeed waits for reads and writes "
            "inside assert statements; run without -O and PYTHONOPTIMIZE."
        )
    folder = "deepspeed.runtime.swap_tensor"
    parameters, optimizer = (import_module(f"{folder}.partitioned_{name}_swapper") for name in ("param", "optimizer"))
    others = [import_module(f"{folder}.{name}") for name in ("pipelined_optimizer_swapper", "optimizer_utils", "utils")]
    for module in (parameters, optimizer, *others):
        patch("deepspeed", module, "swap_in_tensors", _start_read)
        patch("deepspeed", module, "swap_out_tensors", _start_write)
    patch("deepspeed", import_module(f"{folder}.async_swapper"), "swap_out_tensors", _start_write)
    patch("deepspeed", optimizer.PartitionedOptimizerSwapper, "_swap_in_pinned_gradients", _read_gradients)
    swapper = parameters.AsyncPartitionedParameterSwapper
    swap_in = private("deepspeed", swapper, "swap_in")
    init = import_module("deepspeed.runtime.zero.partition_parameters").Init
    set_dtype = private("deepspeed", init, "_set_dtype")

    def swap_in_once(self: Any, parameters: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Swap in each parameter once: one that forward and then backward need next is requested twice, which fails."""
        return swap_in(self, list(dict.fromkeys(parameters)), *args, **kwargs)

    def set_dtype_of_config(self: Any, config: Any, dtype: Any) -> None:
        """Prefer the type in the config: ``dtype`` is always bfloat16 without support for float16, as on CPUs."""
        set_dtype(self, config, dtype if config is None else None)

    patch("deepspeed", swapper, "swap_in", swap_in_once)
    patch("deepspeed", init, "_set_dtype", set_dtype_of_config)


def _start_read(handle: Any, tensors: Sequence[Tensor], paths: Sequence[str]) -> None:
    """Start to read each file into its tensor; DeepSpeed would leave a tensor at an unaligned address unchanged."""
    for tensor, path in zip(tensors, paths, strict=True):
        if handle.is_pinned(tensor) and tensor.data_ptr() % 512:  # a direct read needs aligned memory
            raise RunError(
                f"deepspeed.config: DeepSpeed would read {path} to an unaligned address; remove options such as pipeline_read."
            )
        if handle.async_pread(tensor, path, 0) != 0:
            raise RunError(f"deepspeed.nvme_path: {path} cannot be read; check the disk, and resume the run.")


def _start_write(handle: Any, tensors: Sequence[Tensor], paths: Sequence[str]) -> None:
    """Start to write each tensor to its file; allocate the space first, because writes fail silently on a full disk."""
    for tensor, path in zip(tensors, paths, strict=True):
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                if os.fstat(file.fileno()).st_size < tensor.nbytes:
                    os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        except OSError as error:
            raise RunError(
                f"deepspeed.nvme_path: {path} cannot be written ({error.strerror}); free space, and resume the run."
            ) from None
        if handle.async_pwrite(tensor, path, 0) != 0:
            raise RunError(f"deepspeed.nvme_path: {path} cannot be written; check the disk, and resume the run.")


def _read_gradients(swapper: Any, aio_handle: Any, parameter: Any, gradient_tensor: Tensor) -> None:
    """Read gradients into separate memory and copy them, because their offsets in ``gradient_tensor`` are not aligned."""
    gradients = list(swapper.swap_params_info[swapper.parameter_id(parameter)].swapped_gradients.values())
    tensors = [torch.empty(gradient.length, dtype=gradient_tensor.dtype) for gradient in gradients]
    _start_read(aio_handle, tensors, [gradient.path for gradient in gradients])
    finished = aio_handle.wait()  # not in an assert, which python -O removes
    if finished != len(gradients):
        raise RunError(
            f"deepspeed.nvme_path: {finished} of {len(gradients)} gradients were read; check the disk, and resume the run."
        )
    for gradient, tensor in zip(gradients, tensors, strict=True):
        gradient_tensor.narrow(0, gradient.offset, gradient.length).copy_(tensor)
