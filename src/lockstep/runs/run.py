"""A run's folder, ``runs/<name>/<id>/``: one training, however often it restarts.

No torch here: the launcher makes the folder before any rank exists.
"""

import os
import platform
import re
import secrets
import shlex
import stat
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lockstep.core import UsageError, atomic_write_json, read_json

_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""The fast one, where there is libyaml: a sweep writes a thousand files."""


@dataclass(frozen=True)
class Run:
    """One training and where it keeps everything. ``id`` is the W&B id too.

    Attributes:
        folder: ``<root>/<name>/<id>``, private to the user (0700).
    """

    folder: Path

    @classmethod
    def create(cls, root: Path, name: str, identity: str | None = None) -> "Run":
        """Make a new, empty run folder.

        Args:
            root: Folder of all runs.
            name: What the run is called.
            identity: Name of its folder; a new one if not given.

        Raises:
            UsageError: ``name`` cannot be a folder's name, or the folder cannot be written, or others could replace it.
        """
        cls.check_name(name)
        identity = identity or new_run_id()
        folder = root.absolute() / name / identity
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise UsageError(
                f"run.root: the run folder {folder} cannot be written ({error.strerror}); choose another with --run.root."
            ) from None
        for above in (folder.parent, folder.parent.parent):
            mode = above.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                folder.rmdir()
                raise UsageError(
                    f"run.root: everybody can write to {above}, and so replace what a run keeps there; "
                    f"take that away (chmod o-w {above}) or choose another with --run.root."
                )
        for part in ("logs", "checkpoints"):
            (folder / part).mkdir()
        return cls(folder)

    @staticmethod
    def check_name(name: str) -> None:
        """Raise UsageError if ``name`` cannot be a run's name."""
        if not re.fullmatch(r"[\w.+=-]+", name) or name in (".", ".."):
            raise UsageError(f"run.name: {name!r} must be letters, digits and . _ + = - only; it names a folder.")

    @classmethod
    def start(cls, root: Path, name: str, command: Sequence[str], nodes: int, ranks: int) -> "tuple[Run, int]":
        """A new run and the number of its first attempt; ``launch.yaml`` says how it was started."""
        run = cls.create(root, name)
        run.write_launch_record(command, nodes, ranks, git_state(Path.cwd()))
        return run, run.begin_attempt()

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """The run in ``folder``.

        Raises:
            UsageError: There is none.
        """
        run = cls(folder.absolute())
        if not run.config.is_file():
            raise UsageError(f"{folder} is no run folder: it has no config.yaml.")
        return run

    @property
    def id(self) -> str:
        """The folder's own name: the time of creation and four random digits; sorts by time."""
        return self.folder.name

    @property
    def name(self) -> str:
        """What the run is called in its config."""
        return self.folder.parent.name

    @property
    def config(self) -> Path:
        """The complete, resolved config."""
        return self.folder / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One row per logged step."""
        return self.folder / "metrics.csv"

    @property
    def result(self) -> Path:
        """Written once, at the end."""
        return self.folder / "result.json"

    @property
    def predictions(self) -> Path:
        """What ``predict`` writes: a row for each sample."""
        return self.folder / "predictions.safetensors"

    @property
    def status(self) -> Path:
        """Where the run is now; replaced every few seconds."""
        return self.folder / "status.json"

    @property
    def launch(self) -> Path:
        """What was typed, where, and on which code."""
        return self.folder / "launch.yaml"

    def log(self, attempt: int, rank: int) -> Path:
        """The log of one rank in one attempt; its folder is made."""
        folder = self.folder / "logs" / str(attempt)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{rank}.log"

    def begin_attempt(
        self, owner: Mapping[str, Any] | None = None, holds: Callable[[Mapping[str, Any]], bool] = lambda owner: False
    ) -> int:
        """Claim this run and count one more start of it: 1 for the first. Called once, before the ranks start.

        Args:
            owner: Who claims it: a job, or a process of this machine (the default).
            holds: Whether another owner still has it.

        Raises:
            UsageError: Another has it.
        """
        owner = owner or {"host": platform.node(), "pid": os.getpid()}
        held, attempt = read_json(self.folder / "owner.json"), 1 + self.newest_attempt
        taken = bool(held) and held != owner and holds(held)
        try:
            if not taken:
                (self.folder / "logs" / str(attempt)).mkdir()
        except FileExistsError:  # at this very moment
            held, taken = read_json(self.folder / "owner.json"), True
        if taken:
            who = ", ".join(f"{name} {value}" for name, value in held.items()) or "another"
            raise UsageError(f"The run {self.folder} is being trained by {who}; end that first.")
        atomic_write_json(self.folder / "owner.json", owner)
        return attempt

    @property
    def newest_attempt(self) -> int:
        """Number of the newest attempt; 0 before the first."""
        return max((int(path.name) for path in (self.folder / "logs").glob("*") if path.name.isdigit()), default=0)

    def write_launch_record(
        self, command: Sequence[str], nodes: int | str, ranks: int, git: Mapping[str, Any] | None, **more: Any
    ) -> None:
        """Write ``launch.yaml``: command line, resources, machine, git commit and what else the launcher knows."""
        facts = {
            "command": shlex.join(command),
            "nodes": nodes,
            "ranks_per_node": ranks,
            "host": platform.node(),
            "python": platform.python_version(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "git": git,
            **more,
        }
        self.launch.write_text(yaml.dump(facts, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


RUN_ID_PATTERN = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}(-\d{3,})?")
"""The name of a run folder; the runs of a sweep have a number at the end."""


def new_run_id() -> str:
    """A name for a run folder: the time and four random digits; sorts by time."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout around ``folder`` and whether it has uncommitted changes; None outside of one with a commit."""
    command = ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), "(initial)")
    return None if commit == "(initial)" else {"commit": commit, "changed": not lines[-1].startswith("# ")}


def update_status(run: Run, status: str) -> None:
    """Change ``status`` in ``status.json``, where there is one, and leave the rest as it was."""
    if before := read_json(run.status):
        atomic_write_json(run.status, before | {"status": status})
