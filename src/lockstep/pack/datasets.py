"""Make the dataset that ``--dataset CLASS --dataset.ARG VALUE`` describes."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jsonargparse
from torch.utils.data import Dataset

from lockstep.core import UsageError


def make_dataset(path: str, keys: Sequence[str]) -> tuple[Any, Mapping[str, Any]]:
    """The dataset, and its class and arguments.

    Args:
        path: Import path of its class.
        keys: Its arguments, as ``--dataset.NAME=VALUE``.

    Raises:
        UsageError: The class cannot be imported or made, or an argument is wrong.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does; the command lockstep does not
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Dataset, "dataset", required=True)
    try:
        config = parser.parse_args([f"--dataset={path}", *keys])
        described = config.dataset.as_dict()
        return parser.instantiate(config).dataset, described
    except UsageError:
        raise
    except Exception as error:  # of someone else's class
        raise UsageError(f"--dataset: {path} cannot be made: {' '.join(str(error).split())}") from error
