"""Private names of torch: tensors without content, and the memory that they would need."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lockstep.compat import private, private_imports

with private_imports("torch"):
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
    from torch._subclasses.fake_tensor import unset_fake_temporarily as real_tensors
    from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
    from torch.utils._pytree import tree_leaves, tree_map_only

no_torch_function = private("torch", torch._C, "DisableTorchFunction")
"""Switches off, in a ``with`` statement, modes and subclasses of Tensor that change what functions do."""

_ACTIVATIONS = [private("torch", _MemRefType, name) for name in ("ACT", "TEMP", "OTH")]


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Give new tensors a shape, a type and a device, but no memory; ``real_tensors`` suspends that."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, FakeCopyMode(mode):
        yield


def peak_activations(tracker: MemTracker, device: torch.device) -> int:
    """Return the bytes on ``device`` at the peak, without parameters, gradients, buffers and the optimizer's state."""
    peak = tracker.get_tracker_snapshot("peak")[device]
    return sum(peak[kind] for kind in _ACTIVATIONS)


def apply_to_states(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replace every tensor of ``module``, such as the states of a torchmetrics ``Metric``, by ``function`` of it."""
    private("torch", module, "_apply")(function)
