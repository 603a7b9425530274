"""Private names of torch."""

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lockstep.compat import private, private_imports

with private_imports("torch"):
    from torch._C import DisableTorchFunction as no_torch_function  # switches off modes and subclasses of Tensor
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
    from torch._subclasses.fake_tensor import unset_fake_temporarily as real_tensors
    from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
    from torch.nn.parallel.distributed import _DDPSink
    from torch.utils._pytree import tree_leaves, tree_map_only


def copy_data_loader(loader: DataLoader[Any], **attributes: Any) -> DataLoader[Any]:
    """Copy ``loader`` and replace ``attributes``, some of which ``DataLoader.__setattr__`` does not allow to change.

    The copy keeps the class and everything else that a subclass has set, which ``__init__`` could not restore.
    """
    copied = copy.copy(loader)
    for name, value in {**attributes, "_iterator": None}.items():
        private("torch", loader, name)
        vars(copied)[name] = value
    return copied


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Give new tensors a shape, a type and a device, but no memory; ``real_tensors`` suspends that."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, FakeCopyMode(mode):
        yield


def peak_activations(tracker: MemTracker, device: torch.device) -> int:
    """Return the bytes on ``device`` at the peak, without parameters, gradients, buffers and the optimizer's state."""
    peak = tracker.get_tracker_snapshot("peak")[device]
    return sum(peak[private("torch", _MemRefType, kind)] for kind in ("ACT", "TEMP", "OTH"))


def apply_to_states(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replace every tensor of ``module``, such as the states of a torchmetrics ``Metric``, by ``function`` of it."""
    private("torch", module, "_apply")(function)


for _name in ("prepare_for_forward", "prepare_for_backward"):
    private("torch", private("torch", torch.distributed, "Reducer"), _name)


def replay_backward(model: DistributedDataParallel, parameters: Sequence[Tensor]) -> None:
    """Run a backward pass of zeros in which the gradients of ``parameters`` become ready in this order.

    Hooks and buffers of the module see nothing of it; its gradients are zero afterwards.
    """
    for _ in range(2 if model.static_graph else 1):  # a static graph is recorded by one more pass
        model.reducer.prepare_for_forward()
        model.reducer.prepare_for_backward([])
        loss = torch.zeros((), device=parameters[0].device)
        for parameter in reversed(parameters):  # what was added last has its gradient first
            loss = loss + parameter.reshape(-1)[:1].sum() * 0
        (loss,) = _DDPSink.apply(weakref.ref(model), loss)
        loss.backward()
