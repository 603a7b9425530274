"""Load the module of a run with the weights of a checkpoint, for a notebook or a script."""

from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from lockstep.checkpoint import Checkpoint, allow_numpy_globals, allow_plain_classes, find_checkpoint
from lockstep.compat.pytorch_lightning import import_as_lightning
from lockstep.config import load_yaml
from lockstep.core import RunError, UsageError
from lockstep.runs import LaunchRecord, Run
from lockstep.trainer.config_parser import instantiate, make_parser, search_working_folder
from lockstep.trainer.parse_errors import explain_parse_error, import_modules


def load_module(place: Path) -> LightningModule:
    """Build the module of a run with the weights of a checkpoint, on the CPU and in evaluation mode.

    Args:
        place: A run folder, whose newest checkpoint is loaded, or a checkpoint in one.

    Raises:
        UsageError: ``place`` has no checkpoint or is not in a run folder, or the module cannot be imported or instantiated.
        RunError: The weights do not fit the module.
    """
    found = find_checkpoint(place, "run")
    model = found.model if isinstance(found, Checkpoint) else found
    run = Run(model.absolute().parent.parent.parent)  # not parents[2], which a file in /tmp does not have
    if not isinstance(found, Checkpoint) or not run.config.is_file():
        raise UsageError(
            f"run: {place} is not in a run folder, whose config.yaml says how to build the module; load {model} with "
            "load_from_checkpoint of its class."
        )
    module = _build_module(run)
    allow_numpy_globals()
    allow_plain_classes(model)
    checkpoint: dict[str, Any] = torch.load(model, map_location="cpu", weights_only=True, mmap=True)
    checkpoint["state_dict"] = dict(found.weights())
    try:  # in the order of load_from_checkpoint
        if is_overridden("configure_model", module):
            module.configure_model()
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    except RuntimeError as error:
        raise RunError(
            f"{found.folder}: the weights do not fit {type(module).__name__} ({' '.join(str(error).split())}); its layers must "
            "be those that were trained, and made in __init__ or configure_model."
        ) from error
    return module.eval()


def _build_module(run: Run) -> LightningModule:
    try:
        section = load_yaml(run.config.read_text())["model"]
    except (OSError, yaml.YAMLError, TypeError, ValueError, KeyError) as error:  # ValueError: not UTF-8, or no such date
        raise UsageError(f"{run.config} is damaged: {' '.join(str(error).split())}.") from None
    search_working_folder()
    import_as_lightning()
    import_modules({"model": section})
    parser = make_parser()
    try:
        module: LightningModule = instantiate(parser, parser.parse_object({"model": section})).model
    except ArgumentError as error:
        raise UsageError(f"{explain_parse_error(str(error))}{_remedy(str(error), run)}") from None
    return module


def _remedy(error: str, run: Run) -> str:
    """How to import a module that is not found: the folders that the ranks imported it from, where they are known."""
    if "No module named" not in error:
        return ""
    launch = LaunchRecord.read(run.launch)
    folder = None if launch is None else launch.paths[0] if launch.paths else launch.folder
    return f"; add its folder to sys.path{f', such as {folder}' if folder else ''}"
