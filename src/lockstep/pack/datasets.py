"""Make the dataset that ``--dataset CLASS --dataset.ARG VALUE`` describes."""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import jsonargparse

from lockstep.core import UsageError, did_you_mean


def make_dataset(path: str, keys: Sequence[str]) -> tuple[Any, Mapping[str, Any]]:
    """The dataset, and its class and arguments.

    Args:
        path: Import path of its class.
        keys: Its arguments, as ``--dataset.NAME=VALUE``.

    Raises:
        UsageError: The class cannot be imported or made, or an argument is wrong.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    known = parser.add_class_arguments(_find_class(path), "dataset")
    for key in keys:
        name = key.partition("=")[0].removeprefix("--")
        if not any(f"{name}.".startswith(f"{own}.") for own in known):
            raise UsageError(f"--{name}: unknown argument of {path}{did_you_mean(name, known)}")
    try:
        config = parser.parse_args(list(keys))
        dataset = parser.instantiate(config).dataset
    except Exception as error:  # a user's class may raise anything
        raise UsageError(f"--dataset: {path} cannot be made ({' '.join(str(error).split())}).") from error
    return dataset, {"class_path": path, "init_args": config.dataset.as_dict() if known else {}}


def _find_class(path: str) -> type[Any]:
    """Import a class, also from the working folder."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does; the command lockstep does not
    module, _, name = path.rpartition(".")
    try:
        names = vars(import_module(module))
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"--dataset: {path} cannot be imported ({error}); give a class by its module, as in mine.Data."
        ) from None
    classes = [each for each, value in names.items() if isinstance(value, type)]
    if name not in classes:
        raise UsageError(f"--dataset: {module} has no class {name!r}{did_you_mean(name, classes)}")
    found: type[Any] = names[name]
    return found
