"""Check whether a ``checkpoint.monitor`` that is not logged is misspelt, or may be logged later."""

import ast
import inspect
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lockstep.core import RunError, did_you_mean

log = logging.getLogger(__name__)

_SHIPPED_MONITOR = "val/accuracy"
"""The monitor of the shipped configs; a user's model may not log it."""

_LIBRARIES = ("lockstep", "lightning", "lightning_utilities", "torch", "builtins", "abc", "typing")
"""Packages whose classes log at every validation, or never."""


def check_monitor(name: str, trainer: Trainer, module: LightningModule) -> None:
    """Raise RunError if ``name``, which the first validation has not logged, is clearly misspelt; else log a warning.

    A misspelt name resembles a logged metric; any other name may come from a config for another module. A metric that only
    some validations log has its name in the source of the module or of a callback: all of it, or what follows the braces of
    an f-string.
    """
    logged = sorted(trainer.callback_metrics)
    suggestion = did_you_mean(name, logged)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    is_near = "did you mean" in suggestion and name != _SHIPPED_MONITOR
    if is_near and not _may_log(re.sub("_(epoch|step)$", "", name), [module, *callbacks]):
        raise RunError(
            f"checkpoint.monitor: {name!r} is not logged{suggestion} Resume with --checkpoint.monitor and one of them, "
            "or null, which keeps only the newest checkpoints."
        )
    text = "checkpoint.monitor: %r is not logged yet, so checkpoints have no score until it is; logged: %s."
    log.warning(text, name, ", ".join(logged) or "none")


def _may_log(name: str, objects: Iterable[object]) -> bool:
    """Whether the source of a class of ``objects`` contains a string that ``name`` ends with, or cannot be read."""
    for cls in {cls for part in objects for cls in type(part).__mro__}:
        if cls.__module__.partition(".")[0] in _LIBRARIES:
            continue
        try:
            nodes = ast.walk(ast.parse(Path(inspect.getfile(cls)).read_text()))
        except (OSError, SyntaxError, TypeError, ValueError):
            return True
        texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
        if any(len(text) > 1 and name.endswith(text) for text in texts):
            return True
    return False
