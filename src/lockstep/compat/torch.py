"""Private names of torch."""

import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lockstep.compat import private, private_imports

with private_imports("torch"):
    from torch._C import DisableTorchFunction as no_torch_function  # switches off modes and subclasses of Tensor
    from torch._C import _disabled_torch_function_impl as plain_results  # as __torch_function__ of a subclass of Tensor
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
    from torch._subclasses.fake_tensor import unset_fake_temporarily as real_tensors
    from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
    from torch.distributed.distributed_c10d import _get_default_store as default_store
    from torch.nn.parallel.distributed import _DDPSink
    from torch.utils._pytree import tree_leaves, tree_map_only

Loader = TypeVar("Loader")


class InternalsDataLoader(DataLoader[Any]):
    """A DataLoader whose iterators see the attributes in ``internals``, while its user sees the original ones."""

    def internals(self) -> dict[str, Any]:
        """The attributes that the next iterator sees, by name."""
        raise NotImplementedError

    def _get_iterator(self) -> Any:
        seen = copy.copy(self)
        for name, value in self.internals().items():
            private("torch", self, name)
            vars(seen)[name] = value  # ``DataLoader.__setattr__`` does not allow to change some of them
        return super(InternalsDataLoader, seen)._get_iterator()


private("torch", DataLoader, "_get_iterator")
private("torch", DataLoader, "_index_sampler")


def add_base_class(loader: DataLoader[Any], base: type[Loader]) -> Loader:
    """A copy of ``loader`` whose class inherits from ``base`` and then from its own class; all its attributes are kept."""
    copied: Any = copy.copy(loader)
    vars(copied)["_iterator"] = None  # of persistent workers
    own: Any = type(loader)
    copied.__class__ = _join_classes(cast(Any, base), own)
    return cast(Loader, copied)


@functools.cache
def _join_classes(base: Any, own: Any) -> type:
    return type(own.__name__, (base, own), {"__module__": own.__module__, "__doc__": own.__doc__})


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Create tensors with a shape, a type and a device, but without memory; ``real_tensors`` suspends this."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, FakeCopyMode(mode):
        yield


def peak_activations(tracker: MemTracker, device: torch.device) -> int:
    """Peak bytes of activations on ``device``: without parameters, gradients, buffers and the state of the optimizer."""
    peak = tracker.get_tracker_snapshot("peak")[device]
    return sum(peak[private("torch", _MemRefType, kind)] for kind in ("ACT", "TEMP", "OTH"))


def forked_after_cuda() -> bool:
    """Whether this process was forked from one that had initialized CUDA, or had queried its GPUs."""
    return bool(private("torch", torch.cuda, "_is_in_bad_fork")())


def flight_record() -> bytes:
    """The newest collectives of this process in the format of ``torchfrtrace``; empty without a process group."""
    if not torch.distributed.is_initialized():
        return b""
    name = "_dump_nccl_trace" if torch.distributed.get_backend() == "nccl" else "_dump_fr_trace"
    record: bytes = private("torch", torch._C._distributed_c10d, name)()
    return record


def apply_to_states(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replace every tensor of ``module``, such as the states of a torchmetrics ``Metric``, by ``function`` of it."""
    private("torch", module, "_apply")(function)


for _name in ("prepare_for_forward", "prepare_for_backward"):
    private("torch", private("torch", torch.distributed, "Reducer"), _name)


def replay_backward(model: DistributedDataParallel, parameters: Sequence[Tensor]) -> None:
    """Run a backward pass of zeros in which the gradients of ``parameters`` become ready in this order.

    It does not affect hooks and buffers of the module; its gradients are zero afterwards.
    """
    for _ in range(2 if model.static_graph else 1):  # a static graph needs one more pass, which records it
        model.reducer.prepare_for_forward()
        model.reducer.prepare_for_backward([])
        loss = torch.zeros((), device=parameters[0].device)
        for parameter in reversed(parameters):  # the last one to be added has its gradient first
            loss = loss + parameter.reshape(-1)[:1].sum() * 0
        (loss,) = _DDPSink.apply(weakref.ref(model), loss)
        loss.backward()
