"""A run folder, ``<root>/<name>/<id>/``: one training, however often it restarts."""

import errno
import grp
import logging
import os
import pwd
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lockstep.core import Superseded, UsageError
from lockstep.runs.origin import git_state, lockstep_state, typed_command
from lockstep.runs.records import AttemptStart, LaunchRecord, Owner, RunProgress, RunResult, iso_time

log = logging.getLogger(__name__)

RUN_ID_PATTERN = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}(-\d{3,})?")
"""The name of a run folder; the runs of a sweep have a number at the end."""


_SILENT_SECONDS = 60.0
"""Time without a sign of life after which an owner that cannot be queried counts as ended."""


@dataclass(frozen=True)
class _Entry:
    """The path of a file or folder inside a run folder, as an attribute of ``Run``."""

    name: str

    def __get__(self, run: "Run", owner: "type[Run]") -> Path:
        return run.folder / self.name


@dataclass(frozen=True)
class Run:
    """One training and its folder, which is private to the user (mode 0700)."""

    folder: Path

    config = _Entry("config.yaml")
    """The complete, resolved config."""
    checkpoints = _Entry("checkpoints")
    """Folder of the checkpoints."""
    metrics = _Entry("metrics.csv")
    """Logged metrics, one row per logged step."""
    result = _Entry("result.json")
    """``RunResult`` of the newest attempt, written at its end."""
    predictions = _Entry("predictions.safetensors")
    """What ``predict`` writes, one row per sample."""
    tensorboard = _Entry("tensorboard")
    """Folder of TensorBoard's event file."""
    status = _Entry("status.json")
    """``RunProgress``, written every few seconds."""
    launch = _Entry("launch.yaml")
    """``LaunchRecord``."""
    owner = _Entry("owner.json")
    """``Owner`` of the newest attempt: who may write to the run."""

    @classmethod
    def create(cls, root: Path, name: str, identity: str | None = None) -> "Run":
        """Create a run folder, with a new id or ``identity``; UsageError if it cannot be written or others could replace it."""
        cls.check_name(name)
        made = [parent for parent in (root.absolute() / name, *(root.absolute() / name).parents) if not parent.exists()]
        while True:
            folder = root.absolute() / name / (identity or new_run_id())
            try:
                for parent in reversed(folder.parents):
                    parent.mkdir(mode=0o755, exist_ok=True)  # not group-writable, whatever the umask
                folder.mkdir(mode=0o700)
                break
            except OSError as error:
                if identity is None and isinstance(error, FileExistsError) and folder.is_dir():
                    continue  # another run has drawn the same id
                raise UsageError(
                    f"run.root: the run folder {folder} cannot be written ({error.strerror}); choose another with --run.root."
                ) from None
        try:
            _check_private(folder, "choose another with --run.root")
        except UsageError:
            for path in (folder, *made):
                path.rmdir()
            raise
        for part in ("logs", "checkpoints"):
            (folder / part).mkdir()
        return cls(folder)

    @staticmethod
    def check_name(name: str) -> None:
        """Raise UsageError if ``name`` cannot be the name of a run."""
        if not re.fullmatch(r"[\w.+=-]+", name) or name in (".", ".."):
            raise UsageError(f"run.name: {name!r} must be letters, digits and . _ + = - only, as it names a folder.")

    @classmethod
    def start(cls, root: Path, name: str, command: Sequence[str], nodes: int, ranks: int) -> "tuple[Run, int]":
        """Create a run, write its launch record, and claim its first attempt."""
        run = cls.create(root, name)
        typed, git = typed_command(command, sys.orig_argv), git_state(Path.cwd())
        LaunchRecord(typed, nodes, ranks, git, lockstep_state(), sys.executable, str(Path.cwd())).write(run.launch)
        return run, run.claim_attempt(Owner.this_process())

    @classmethod
    def check_place(cls, root: Path, name: str) -> None:
        """Raise UsageError if others could replace a run of this ``name`` below ``root``; create nothing."""
        cls.check_name(name)
        _check_private(root.absolute() / name / new_run_id(), "choose another with --run.root")

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Return the run in ``folder``; raise UsageError if that is not a run folder, or others could replace what is in it."""
        run = cls(folder.absolute())
        if not os.path.isfile(run.config):
            raise UsageError(f"{folder} is not a run folder: it has no config.yaml.")
        _check_private(run.folder.resolve(), "move the run to a folder of your own")
        return run

    @property
    def id(self) -> str:
        """Name of the folder: the time of creation and four random digits. It is the W&B id too."""
        return self.folder.name

    @property
    def name(self) -> str:
        """Name of the run in its config."""
        return self.folder.parent.name

    def attempt_folder(self, attempt: int) -> Path:
        """Folder of what only one attempt writes: logs, its failure, its owner."""
        return self.folder / "logs" / str(attempt)

    def trained_result(self, attempt: int) -> Path:
        """The result of an attempt whose training has finished, before the final test."""
        return self.attempt_folder(attempt) / "trained.json"

    def start_record(self, attempt: int) -> Path:
        """``AttemptStart`` of an attempt."""
        return self.attempt_folder(attempt) / "start.json"

    def log(self, attempt: int, rank: int = 0, node: int = 0) -> Path:
        """Log of a rank in one attempt; creates its folder. A folder for each node keeps all of them small."""
        folder = self.attempt_folder(attempt) / f"node-{node}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{rank}.log"

    def find_log(self, attempt: int, rank: int) -> Path | None:
        """Log of a rank in one attempt; None if it has none yet."""
        return next(self.attempt_folder(attempt).glob(f"node-*/{rank}.log"), None)

    def claim_attempt(self, owner: Owner, is_alive: Callable[[Owner], bool | None] = lambda owner: False) -> int:
        """Claim the run before its ranks start, and return the number of the attempt; all older attempts have to stop.

        Args:
            is_alive: Whether an owner still runs; None if that cannot be known.

        Raises:
            UsageError: Another owner has the run.
            OSError: It cannot be known who has it.
        """
        attempt = self.newest_attempt
        while True:
            held = Owner.read(self.claim(attempt), strict=True)
            if held is not None and held != owner and self._is_held(held, is_alive(held)):
                raise UsageError(f"The run {self.folder} is being trained by {held}; end that first.")
            attempt += 1
            claim = replace(owner, attempt=attempt)
            if self._create_attempt(claim):
                claim.write(self.owner)
                if owner.job is None:  # that of a job also knows its output
                    AttemptStart("", time.time()).write(self.start_record(attempt))
                return attempt

    def owner_of(self, attempt: int) -> Owner | None:
        """Who claimed an attempt; None if it is unknown."""
        return Owner.read(self.claim(attempt))

    def result_of(self, attempt: int) -> RunResult | None:
        """The result of this attempt; None if it has left none."""
        result = RunResult.read(self.result)
        return result if result is not None and result.attempts == attempt else None

    def finished_before(self, attempt: int) -> RunResult | None:
        """The result of an earlier attempt that has finished, unless ``attempt`` has replaced it."""
        result = RunResult.read(self.result)
        return result if result is not None and result.is_finished and result.attempts < attempt else None

    def is_finished_by(self, job: str) -> bool:
        """Whether an attempt of this Slurm job has finished the run."""
        result = RunResult.read(self.result)
        owner = self.owner_of(result.attempts) if result is not None and result.is_finished else None
        return owner is not None and owner.job == job

    def living_owner(self, is_alive: Callable[[Owner], bool | None]) -> Owner | None:
        """The owner, if it still runs; ``is_alive`` is that of ``claim_attempt``."""
        held = Owner.read(self.owner)
        return held if held is not None and self._is_held(held, is_alive(held)) else None

    def _is_held(self, held: Owner, is_alive: bool | None) -> bool:
        """Whether the owner may still write; if it cannot be queried, the time of its last sign of life decides."""
        if is_alive is not None:
            return is_alive
        last = RunProgress.read(self.status)
        if last is not None and last.status not in ("starting", "training", "trained"):
            return False
        times = [last.time] if last is not None else []
        with suppress(OSError):
            times.append(self.claim(held.attempt).stat().st_mtime)
        return time.time() - max(times, default=0.0) < _SILENT_SECONDS

    def claim(self, attempt: int) -> Path:
        """The record of who claimed an attempt, which that attempt touches while it lives."""
        return self.attempt_folder(attempt) / self.owner.name

    def _create_attempt(self, claim: Owner) -> bool:
        """Create the folder of an attempt with its owner in it, atomically; return False if another process has created it."""
        folder = self.attempt_folder(claim.attempt)
        temporary = Path(tempfile.mkdtemp(prefix=".claim-", dir=folder.parent))
        try:
            claim.write(temporary / self.owner.name)
            temporary.rename(folder)  # fails where the folder has a file in it, and each one has
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return True

    def is_superseded(self, attempt: int) -> bool:
        """Whether a newer attempt has claimed the run."""
        held = Owner.read(self.owner)  # opened, so that it is new on NFS too, which may hide a new folder for half a minute
        return (held is not None and held.attempt > attempt) or self.attempt_folder(attempt + 1).exists()

    def check_owner(self, attempt: int) -> None:
        """Raise Superseded if a newer attempt has claimed the run: call it before writing what attempts share."""
        if self.is_superseded(attempt):
            raise self.superseded(attempt)

    def superseded(self, attempt: int) -> Superseded:
        """The error for an attempt that has lost the run to a newer one."""
        who = Owner.read(self.owner) or "another process"
        return Superseded(f"{who} has claimed the run {self.folder}: attempt {attempt} stops and writes nothing more.")

    @property
    def newest_attempt(self) -> int:
        """Number of the newest attempt; 0 before the first."""
        return max((int(path.name) for path in (self.folder / "logs").glob("*") if path.name.isdigit()), default=0)

    @property
    def latest_saved_step(self) -> int:
        """Step of the newest checkpoint; 0 before the first."""
        return max((step for path in self.checkpoints.glob("step-*") for step in checkpoint_order(path)[:1]), default=0)

    def output(self, slurm: Path, job: str) -> str:
        """Output of the batch script and of srun, in the folder ``slurm``, since the newest attempt of ``job`` started."""
        start = AttemptStart.read(self.start_record(self.newest_attempt))
        try:
            with (slurm / f"{job}_0_log.out").open(errors="replace") as file:
                file.seek(start.output if start is not None and start.job == job else 0)
                return file.read()
        except FileNotFoundError:
            return ""


def checkpoint_order(path: Path) -> tuple[int, ...]:
    """The step of a published checkpoint, and 1 if it was saved after the end of training; empty for another name."""
    found = re.fullmatch(r"step-(\d+)(-end)?", path.name)
    return (int(found[1]), int(found[2] is not None)) if found else ()


def _check_private(folder: Path, remedy: str) -> None:
    """Raise UsageError if a run folder or one of the two above it is not this user's, or if others can replace any above it.

    Folders that do not exist are ignored.
    """
    places = [
        (number, place) for number, place in enumerate((folder.absolute(), *folder.absolute().parents)) if os.path.exists(place)
    ]
    for number, place in places:
        if number < 3 and os.geteuid() and (owner := place.stat().st_uid) not in (os.geteuid(), 0):
            raise UsageError(
                f"run.root: {place} belongs to another user (uid {owner}), who may replace what a run keeps there."
            )
    for number, place in places:
        if _others_can_write(place, groups=number < 3):
            raise UsageError(
                f"run.root: others can write to {place}, and so replace what a run keeps there; remove that "
                f"permission (chmod go-w {place}) or {remedy}."
            )


def _others_can_write(folder: Path, groups: bool) -> bool:
    """Whether other users can replace what is in ``folder``; with ``groups``, members of its group count too."""
    found = folder.stat()
    if found.st_mode & stat.S_ISVTX:
        return False
    is_shared = bool(found.st_mode & stat.S_IWGRP and not _is_private_group(found.st_gid))
    return bool(found.st_mode & stat.S_IWOTH) or (groups and is_shared)


def _is_private_group(number: int) -> bool:
    """Whether this user is the only member of a group, which many systems create for each user."""
    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.geteuid())
    except KeyError:  # without names, as in a container
        return number == os.geteuid()
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def new_run_id() -> str:
    """Make a name for a run folder: the time and four random digits; sorts by time."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def describe_run(run: Run, result: RunResult) -> RunResult:
    """Return ``result`` with the name, the commit and the start of the run, and now as its end."""
    start, launch = AttemptStart.read(run.start_record(1)), LaunchRecord.read(run.launch)
    return replace(
        result,
        name=run.name,
        start=iso_time(start.time) if start is not None else None,
        end=iso_time(time.time()),
        commit=launch.git.commit if launch is not None and launch.git is not None else None,
    )


def report_phase(run: Run, attempt: int, phase: str) -> None:
    """Write the phase of a starting attempt to ``status.json``; keep the progress of the attempt before it."""
    progress = RunProgress.read(run.status) or RunProgress("starting")
    has_started = progress.attempt == attempt and progress.status != "starting"  # a test follows the training
    if not has_started and not run.is_superseded(attempt):
        try:
            replace(progress, status="starting", phase=phase, attempt=attempt, time=time.time()).write(run.status)
        except OSError as error:  # a full disk must not end a run
            log.warning("%s cannot be written (%s)", run.status, error.strerror)


def update_status(run: Run, status: str) -> None:
    """Change only ``status`` in ``status.json``, if it exists; the caller must own the run."""
    if progress := RunProgress.read(run.status):
        replace(progress, status=status).write(run.status)
