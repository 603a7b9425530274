"""Private names of other libraries, one module per library; a missing name raises at import or at start.

Import the module of a library, not this room: the launcher must not import torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lockstep.core import LockstepError, UsageError

TESTED = {
    "deepspeed": "0.19.8",
    "lightning": "2.6.6",
    "submitit": "1.5.4",
    "torch": "2.15.0",
    "torchmetrics": "1.9.0",
    "wandb": "0.31.0",
}
"""The versions with which lockstep is tested."""


def private(library: str, owner: Any, name: str) -> Any:
    """Return the private attribute ``name`` of ``owner``, a module, class or object of ``library``.

    Raises:
        LockstepError: The installed version does not have it; names the library and both versions.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        where = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__qualname__
        raise _missing(library, f"has no {where}.{name}") from None


@contextmanager
def private_imports(library: str) -> Iterator[None]:
    """Import private names of ``library`` in the body of a ``with`` statement; raise as ``private`` does."""
    try:
        yield
    except ImportError as error:
        raise _missing(library, f"fails: {error}") from error


def installed_version(library: str) -> str | None:
    """The installed version of a library; None if it is not installed, as on a login node."""
    from importlib import metadata  # which takes 10 ms to import

    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _missing(library: str, what: str) -> LockstepError:
    return LockstepError(
        f"{library} {installed_version(library)} {what}, which lockstep needs; it was tested with {library} "
        f"{TESTED[library]}: pip install {library}=={TESTED[library]}"
    )


def patch(library: str, owner: Any, name: str, new: Any) -> None:
    """Replace the attribute ``name`` of ``owner`` by ``new``; raise as ``private`` does if there is none to replace."""
    private(library, owner, name)
    setattr(owner, name, new)


def check_tested_version(library: str, feature: str) -> None:
    """Check that ``library``, if it is installed, has the tested version.

    Raises:
        UsageError: Another version is installed; names ``feature`` (a key and its value) and both versions.
    """
    installed = installed_version(library)
    if installed is not None and installed != TESTED[library]:
        raise UsageError(
            f"{feature} needs {library} {TESTED[library]}, the only version it was tested with; {installed} is installed: "
            f"pip install {library}=={TESTED[library]}"
        )
