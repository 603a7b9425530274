"""Private names of torch."""

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lockstep.compat import private


def copy_data_loader(loader: DataLoader[Any], **attributes: Any) -> DataLoader[Any]:
    """Copy ``loader`` and replace ``attributes``, some of which ``DataLoader.__setattr__`` does not allow to change.

    The copy keeps the class and everything else that a subclass has set, which ``__init__`` could not restore.
    """
    copied = copy.copy(loader)
    for name, value in {**attributes, "_iterator": None}.items():
        private("torch", loader, name)
        vars(copied)[name] = value
    return copied


_DDPSink = private("torch", torch.nn.parallel.distributed, "_DDPSink")
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
