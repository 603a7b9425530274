"""The folder of a cluster: private, marked by a file, and owned by the user."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lockstep.slurm.cluster.conf import ClusterError, ClusterSpec, ClusterUsageError

_MARKER = "lockstep-cluster.json"
"""The file that marks the folder of a cluster; a folder without it is never deleted."""

_SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket: 108 bytes with the final zero, see unix(7)."""


def check_folder(folder: Path) -> None:
    """Raise ClusterError if the folder is neither empty nor that of a cluster, or belongs to another user."""
    is_ours = folder.is_dir() and ((folder / _MARKER).exists() or not any(folder.iterdir()))
    if not is_ours or folder.stat().st_uid != os.geteuid():
        raise ClusterError(f"{folder} is not a cluster's folder, or not yours; choose another with --folder.")


def claim_folder(folder: Path, spec: ClusterSpec, ports: Sequence[int]) -> None:
    """Create the folder, private to the user, with its marker."""
    node = spec.node_names[-1]
    # The longest path is that of the batch script of the largest job id.
    limit = _SOCKET_PATH_BYTES - len(f"/{node}/{node}_67043328.4294967291")
    if len(os.fsencode(folder)) > limit:
        raise ClusterUsageError(f"{folder} is too long for the sockets in it: --folder may have {limit} bytes.")
    if not re.fullmatch(r"[\w./+@~-]+", str(folder)):
        raise ClusterUsageError(f"--folder: {folder} must consist of letters, digits and . / + @ ~ - _ only.")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        check_folder(folder)
        folder.chmod(0o700)
        with (folder / _MARKER).open("x") as marker:
            json.dump({"spec": asdict(spec), "ports": ports}, marker)
    except FileExistsError:
        raise ClusterError(f"{folder} exists already; stop the cluster in it with `down`, or choose another folder.") from None
    except OSError as error:
        raise ClusterError(f"{folder} cannot be created: {error.strerror}.") from None


def read_marker(folder: Path) -> tuple[ClusterSpec, Sequence[int]]:
    """The specification and the ports of the cluster in a folder; FileNotFoundError without a marker, ValueError if damaged."""
    try:
        facts = json.loads((folder / _MARKER).read_text())
        spec = facts["spec"] | {key: tuple(facts["spec"][key]) for key in ("partitions", "options")}
        return ClusterSpec(**spec), facts["ports"]
    except (KeyError, TypeError) as error:
        raise ValueError(error) from None


def remove_folder(folder: Path) -> None:
    """Remove the folder, and its marker last, so that an interrupted removal can be repeated."""
    marker = folder / _MARKER
    if not marker.exists():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != marker:
            path.unlink()
    marker.unlink()
    folder.rmdir()
