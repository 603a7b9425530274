"""Redirect the caches of libraries if the home folder is not writable."""

import atexit
import os
import shutil
import tempfile
from collections.abc import MutableMapping


def use_writable_caches(env: MutableMapping[str, str]) -> str:
    """Let W&B and matplotlib use a temporary folder if HOME is not writable; return a warning, else an empty string."""
    home = env.get("HOME", "")
    wanted = [name for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR") if not env.get(name)]
    if not wanted or os.access(home, os.W_OK | os.X_OK):
        return ""
    folder = tempfile.mkdtemp(prefix="lockstep-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    env.update(dict.fromkeys(wanted, folder))
    return f"HOME={home} is not writable: the caches of this run are in {folder} until it ends"
