"""Private names of other libraries, one module per library, each of which fails at once where a name is gone.

Import the module of a library, not this room: the launcher must not import torch.
"""

from importlib.metadata import version
from typing import Any

from lockstep.core import LockstepError

TESTED = {"deepspeed": "0.19.8", "lightning": "2.6.6", "submitit": "1.5.4", "torch": "2.15.0", "wandb": "0.31.0"}
"""The versions whose private names were verified."""


def private(library: str, owner: Any, name: str) -> Any:
    """Return the private attribute ``name`` of ``owner``, a module, class or object of ``library``.

    Raises:
        LockstepError: The installed version does not have it; names the library and both versions.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        where = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__qualname__
        raise LockstepError(
            f"{library} {version(library)} has no {where}.{name}, which lockstep needs; it was tested with {library} "
            f"{TESTED[library]}: pip install {library}=={TESTED[library]}"
        ) from None


def patch(library: str, owner: Any, name: str, new: Any) -> None:
    """Replace the attribute ``name`` of ``owner`` by ``new``, where the installed version has it.

    Raises:
        LockstepError: As ``private``; an assignment would silently do nothing.
    """
    private(library, owner, name)
    setattr(owner, name, new)
