"""The API key of W&B, as wandb itself finds it. No torch and no wandb here: the launcher must know what not to write down."""

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse


def wandb_api_key(env: Mapping[str, str]) -> str | None:
    """The key in WANDB_API_KEY, or what ``wandb login`` has put into the netrc file; None where there is neither."""
    if key := env.get("WANDB_API_KEY"):
        return key
    host = urlparse(env.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(env.get("NETRC") or Path(env.get("HOME", os.sep)) / ".netrc")
    try:
        found = netrc.netrc(path).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found else None
