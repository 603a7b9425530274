"""A metric that should rank checkpoints, but is not logged: misspelt, or logged later."""

import ast
import inspect
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lockstep.core import RunError, did_you_mean

log = logging.getLogger(__name__)

_SHIPPED = "val/accuracy"
"""What the shipped configs have, over which a model of one's own may log something else."""

_OTHERS = ("lockstep", "lightning", "lightning_utilities", "torch", "builtins", "abc", "typing")
"""Packages whose classes log at every validation, or nothing."""


def check_monitor(name: str, trainer: Trainer, module: LightningModule) -> None:
    """Raise RunError if ``name``, which the first validation has not logged, is certainly misspelt; else log a warning.

    Misspelt is what is near to a metric that is logged; another name may come from a config for another module. A metric
    that is not logged by every validation, such as one of each tenth epoch, has its name, or what follows an f-string's
    braces, in the source of the module or of a callback.
    """
    logged = sorted(trainer.callback_metrics)
    suggestion = did_you_mean(name, logged)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    is_near = "did you mean" in suggestion and name != _SHIPPED
    if is_near and not _may_log(re.sub("_(epoch|step)$", "", name), [module, *callbacks]):
        raise RunError(
            f"checkpoint.monitor: {name!r} is not logged{suggestion} Resume with --checkpoint.monitor and one of them, "
            "or null, which keeps only the newest checkpoints."
        )
    text = "checkpoint.monitor: %r is not logged yet, so checkpoints have no score until it is; logged: %s."
    log.warning(text, name, ", ".join(logged) or "none")


def _may_log(name: str, objects: Iterable[object]) -> bool:
    """Whether the source of a class of ``objects`` has a text that ``name`` ends with, or cannot be read."""
    for cls in {cls for part in objects for cls in type(part).__mro__}:
        if cls.__module__.partition(".")[0] in _OTHERS:
            continue
        try:
            nodes = ast.walk(ast.parse(Path(inspect.getfile(cls)).read_text()))
        except (OSError, SyntaxError, TypeError, ValueError):
            return True
        texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
        if any(len(text) > 1 and name.endswith(text) for text in texts):
            return True
    return False
