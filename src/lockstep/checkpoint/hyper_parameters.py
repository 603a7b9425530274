"""Store the arguments of the module and the DataModule in each checkpoint, so that ``load_from_checkpoint`` needs none."""

import sys
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lockstep.checkpoint.serialization import to_plain_types

_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
"""The function with which Lightning creates the objects that hyperparameters from a config describe."""


class HyperParameters(Callback):
    """Adds the arguments in the config to each checkpoint, in the format of LightningCLI.

    Values that a class has saved with ``save_hyperparameters`` take precedence if they are numbers, strings, lists or mappings.

    Args:
        config: The content of ``config.yaml``, on the rank that writes the checkpoint; empty on others.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        owners: dict[str, LightningModule | LightningDataModule | None] = {
            "model": pl_module,
            "data": getattr(trainer, "datamodule", None),
        }
        for section, owner in owners.items():
            if owner is not None and (owner.CHECKPOINT_HYPER_PARAMS_KEY in checkpoint or section in self.config):
                saved = checkpoint.get(owner.CHECKPOINT_HYPER_PARAMS_KEY, {})
                is_one_argument = checkpoint.get(owner.CHECKPOINT_HYPER_PARAMS_NAME) not in (None, "kwargs")
                given = None if is_one_argument else self.config.get(section)
                checkpoint[owner.CHECKPOINT_HYPER_PARAMS_KEY] = to_plain_types({**saved, **_arguments(saved, given or {})})


def _arguments(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments ``given`` in the config, except those that the class has ``saved`` itself."""
    module, _, name = given.get("class_path", "").rpartition(".")
    if not given or not isinstance(found := resolve_name(given["class_path"]), type):
        return {}  # a function creates the object, and its arguments are not those of the class
    arguments = {**given.get("init_args", {}), **given.get("dict_kwargs", {})}
    missing = {key: value for key, value in arguments.items() if key not in saved or not _is_plain(saved[key])}
    is_importable = getattr(sys.modules.get(module), name, None) is found  # Lightning refuses a nested class
    return {**missing, **({"_class_path": given["class_path"]} if is_importable else {}), "_instantiator": _INSTANTIATOR}


def _is_plain(value: Any) -> bool:
    """Whether ``to_plain_types`` keeps a value and its type."""
    return not isinstance(value, tuple) and (
        all(map(_is_plain, value.values()))
        if isinstance(value, dict)
        else all(map(_is_plain, value))
        if isinstance(value, list)
        else to_plain_types(value) is value
    )
