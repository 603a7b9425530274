"""The origin of a run: the command as typed, the commit of a checkout, and lockstep's own version and commit."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import lockstep
from lockstep.core import is_secret
from lockstep.runs.records import GitState, SoftwareState

_PACKAGE = Path(lockstep.__file__).parent


def typed_command(command: Sequence[str], process: Sequence[str]) -> str:
    """``command`` as it was typed, quoted for a shell; what looks like a secret is replaced by ``***``.

    Args:
        command: What the program calls itself, in one or two words, and its arguments.
        process: The command line of this process. It lacks the arguments if they were passed to a function, as in a
            notebook; then ``command`` is all that is known.
    """
    words, known = list(command), list(command[1:])
    tail = list(process[len(process) - len(known) :])
    if known and len(process) > len(known) and Path(tail[0]).name == Path(known[0]).name and tail[1:] == known[1:]:
        words = list(process)
        if Path(words[1]).name == "lockstep":  # the script that pip makes: its first line names Python
            words[:2] = ["lockstep" if shutil.which("lockstep") == words[1] else words[1]]
    return shlex.join("***" if is_secret("", word) else word for word in words)


def git_state(folder: Path) -> GitState | None:
    """Commit of the checkout around ``folder`` and whether it has uncommitted changes; None without a commit."""
    command = ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch"]
    try:
        # File names may not be UTF-8.
        lines = subprocess.run(command, capture_output=True, check=True, text=True, errors="replace").stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), "(initial)")
    return None if commit == "(initial)" else GitState(commit, changed=not lines[-1].startswith("# "))


def lockstep_state() -> SoftwareState:
    """Version of this lockstep, and its commit if it runs from its own checkout and not from site-packages."""
    root = _PACKAGE.parents[1]
    git = git_state(root) if (root / ".git").exists() else None
    return SoftwareState(lockstep.__version__, git.commit if git else None, git.changed if git else None)
