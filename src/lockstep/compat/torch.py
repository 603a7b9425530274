"""Private names of torch."""

import copy
from typing import Any

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
