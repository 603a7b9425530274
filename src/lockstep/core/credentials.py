"""Find the W&B API key as wandb does, so that the launcher can keep it out of the files it writes."""

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse


def wandb_api_key(env: Mapping[str, str]) -> str | None:
    """The W&B API key from WANDB_API_KEY, else from the netrc file that ``wandb login`` writes, else None."""
    if key := env.get("WANDB_API_KEY"):
        return key
    host = urlparse(env.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(env.get("NETRC") or Path(env.get("HOME", os.sep)) / ".netrc")
    try:
        found = netrc.netrc(path).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found else None
