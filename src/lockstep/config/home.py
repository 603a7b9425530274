"""Expand ``~`` in the paths of a config, as the shell does not in ``--run.root=~/runs`` and YAML cannot."""

import argparse
import os
from pathlib import Path
from typing import Any

_TEXTS = ("ckpt_path", "data.archive")
"""Keys of paths that are texts, because they may be something else too; other paths are of that type."""


def expand_home(config: dict[str, Any], key: str = "") -> None:
    """Expand ``~`` in each path of a config, which has dicts or namespaces; ``key`` is that of ``config`` itself."""
    for name, value in config.items():
        inner = key if name == "init_args" else f"{key}.{name}".lstrip(".")
        if isinstance(value, dict | argparse.Namespace):
            expand_home(value if isinstance(value, dict) else vars(value), inner)
        elif isinstance(value, Path) or (isinstance(value, str) and inner in _TEXTS):
            config[name] = type(value)(os.path.expanduser(value))
