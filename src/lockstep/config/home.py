"""Expand ``~`` in the paths of a config: the shell leaves it in ``--run.root=~/runs``, and YAML has no such form."""

import argparse
import os
from pathlib import Path
from typing import Any

_STRING_PATHS = ("ckpt_path", "data.archive")
"""Keys of paths that are strings, because they may also be something else; other paths are of the type Path."""


def expand_home(config: dict[str, Any], key: str = "") -> None:
    """Expand ``~`` in each path of a config, which has dicts or namespaces; ``key`` is that of ``config`` itself."""
    for name, value in config.items():
        inner = key if name == "init_args" else f"{key}.{name}".lstrip(".")
        if isinstance(value, dict | argparse.Namespace):
            expand_home(value if isinstance(value, dict) else vars(value), inner)
        elif isinstance(value, Path) or (isinstance(value, str) and inner in _STRING_PATHS):
            config[name] = type(value)(os.path.expanduser(value))
