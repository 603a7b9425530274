"""Recognize secrets, and find the W&B API key as wandb does, to keep both out of the files of a run."""

import netrc
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

WANDB_KEY_ADVICE = "set WANDB_API_KEY, or run `wandb login` once, which writes the key to ~/.netrc"
"""How to give W&B a key."""


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


_NAME = re.compile(
    r"(^|_)(\w*(passw(or)?d|secret|api_?key|access_?key)|key|token|pwd|pass|passphrase|pat"
    r"|auth|dsn|webhook|credentials?|database_url)s?(_|$)",
    re.IGNORECASE,
)
"""Names of variables that hold a secret: OPENAI_KEY, MY_PASSWD, GITHUB_PAT, but not TOKENIZERS_PARALLELISM or PATH."""

_CERTAIN_NAME = re.compile(
    r"(^|_)(\w*(passw(or)?d|secret|api_?key|access_?key)|passphrase|pwd|credentials?"
    r"|(auth|access|api|bearer|refresh|session|bot|hf|hub|github|gitlab|gh|slack|wandb|openai|anthropic)_token"
    r"|(openai|anthropic|hf|aws|azure|gcp|google|slack|private|encryption|signing|ssh|client|service|account)_key"
    r"|(github|gitlab|gh|git|azure|devops)_pat|(db|database|user|root|admin|my|smtp|mail|ftp|ssh|redis)_pass)$",
    re.IGNORECASE,
)
"""Names of arguments that hold a secret. A token, a key or a pass alone is more often a word, a column or a pass over data."""

_VALUE = re.compile(
    r"://(?!\[)[^/\s:@]*:(?!\d{0,5}/)\S+@(?!sha\d+:)"  # user:password in a URL, but not host:port and a path
    r"|://[^/\s:]*@[^/\s:]*:[^/\s@]+@|https?://[^/\s@]+@"  # me@here:password, or a token, in a URL
    r"|\b(sk-[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|hf_[A-Za-z0-9]{20,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|wandb_v\d_\w{20,})"
    r"|hooks\.slack\.com/services/\w|discord(app)?\.com/api/webhooks/\w|\bwandb login (--\S+ )*[0-9a-f]{40}"
)
"""Passwords in URLs, and the forms of well-known services: OpenAI, GitHub, GitLab, Hugging Face, Slack, Discord, AWS, W&B."""

_REFERENCE = re.compile(r"[\"']?([~$]|\./|/[\w.@-]+(/[\w.@-]*)*[\"']?$|$)")
"""Values that are not secrets: a path or a shell expansion, which say where the secret is, and an empty string."""


def is_secret(name: str, value: str, certain: bool = False) -> bool:
    """Whether ``value`` looks like a secret, by its form or by its ``name``.

    Args:
        name: Name of an environment variable, or of an argument.
        certain: Whether only names count that certainly mean a secret, as for arguments.
    """
    named = (_CERTAIN_NAME if certain else _NAME).search(name.rpartition(".")[2])
    return bool(_VALUE.search(value) or (named and not _REFERENCE.match(value)))
