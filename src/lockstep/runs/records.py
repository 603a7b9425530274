"""Typed records in a run folder; reading a damaged file logs a warning and returns None."""

import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self, get_args, get_type_hints

import yaml

from lockstep.core import atomic_write_json

log = logging.getLogger(__name__)

_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def iso_time(seconds: float) -> str:
    """A time in ``seconds`` since 1970 as ISO 8601, in the zone of this machine."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


@dataclass(frozen=True)
class Record:
    """A JSON or YAML file with known fields. Fields that are None are not written, unknown ones are not read."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build the record from what ``as_dict`` returned; TypeError if a field without a default is missing."""
        hints = get_type_hints(cls)
        values = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        for name, value in values.items():
            for kind in get_args(hints[name]):
                if isinstance(kind, type) and issubclass(kind, Record) and value is not None:
                    values[name] = kind.from_dict(value)
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def read(cls, path: Path, strict: bool = False) -> Self | None:
        """Read the record; None if the file is missing, or damaged, which is logged.

        Args:
            strict: Raise OSError if the file cannot be read although it may exist.
        """
        try:
            text = path.read_text()
            return cls.from_dict(yaml.load(text, _Loader) if path.suffix == ".yaml" else json.loads(text))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            if strict and isinstance(error, OSError):
                raise
            log.warning("%s is damaged and ignored: %s", path, " ".join(str(error).split()))
            return None

    def write(self, path: Path) -> None:
        """Write the record, JSON atomically: after an OSError the old file remains."""
        if path.suffix == ".yaml":  # written once; fsync for each run of a large sweep would take seconds
            path.write_text(yaml.dump(self.as_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True))
        else:
            atomic_write_json(path, self.as_dict())


@dataclass(frozen=True)
class Durations(Record):
    """Where the seconds of a run went, over all of its attempts; ``total`` is their sum, up to rounding.

    Attributes:
        starting: From the start of the run to the first step, or to the evaluation.
        training: Training steps.
        validation, test, prediction: These loops.
        lost: Restarts: from each resumed checkpoint to the first step after it, including the time in a queue.
        other: The rest: saves outside a step, and the end of training.
    """

    starting: float = 0.0
    training: float = 0.0
    validation: float = 0.0
    test: float = 0.0
    prediction: float = 0.0
    lost: float = 0.0
    other: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class RunResult(Record):
    """``result.json``: how the newest attempt of a run ended.

    Attributes:
        status: ``finished``, ``failed`` or ``interrupted``.
        attempts: Number of the attempt.
        reasons: Why earlier attempts ended.
        reason: Why this attempt ended; None if it finished.
        exit_status: Of its ranks; 128 and more for a signal.
        global_step: Optimizer steps done.
        weights_sha256: Hash of the final weights, see ``monitoring.report.weights_sha256``. After ``fit`` it is that of the
            newest checkpoint, and None without checkpoints.
        test_error: Why the test after training failed; None if it did not.
        skipped_files: Number of data files that were skipped as corrupt.
        samples, predictions: Number of predicted samples, and their file.
        weights: The file that ``export`` has written.
        name, start, end: Of the run: its name, when its first attempt started and its newest one ended, ISO 8601.
        host: Machine of rank zero.
        commit: Of the folder where the run was started.
        checkpoint: The newest one; for an evaluation the one that was evaluated.
        monitor, best_score, best_step: ``checkpoint.monitor``, its best value and the step of that; None without.
    """

    status: str
    command: str = "fit"
    world_size: int = 0
    attempts: int = 0
    reasons: list[str] = field(default_factory=list)
    reason: str | None = None
    exit_status: int = 0
    global_step: int | None = None
    epochs: int | None = None
    seconds: Durations | None = None
    metrics: dict[str, float] | None = None
    weights_sha256: str | None = None
    test_error: str | None = None
    skipped_files: int | None = None
    samples: int | None = None
    predictions: str | None = None
    weights: str | None = None
    name: str | None = None
    start: str | None = None
    end: str | None = None
    host: str | None = None
    commit: str | None = None
    checkpoint: str | None = None
    monitor: str | None = None
    best_score: float | None = None
    best_step: int | None = None

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"


@dataclass(frozen=True)
class RunProgress(Record):
    """``status.json``: where a run is, written every few seconds.

    Attributes:
        status: ``starting``, ``training``, ``trained``, or the status of the result.
        phase: How far a starting attempt is: ``imports``, or one of ``distributed.phases``.
        steps: Optimizer steps of the whole run; None if it has no end.
        samples_per_second: Of all ranks.
        warning: What is wrong with the files of the run; empty if nothing.
        time: When it was written, in seconds since 1970.
    """

    status: str
    phase: str = ""
    step: int = 0
    steps: int | None = None
    epoch: int = 0
    samples_per_second: float = 0.0
    seconds_left: float | None = None
    attempt: int = 0
    world_size: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    warning: str = ""
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Owner(Record):
    """``owner.json``: the Slurm job, or outside Slurm the process, that may write to a run.

    Attributes:
        job: Id of the job, ``<array>_<task>`` for a run of a sweep.
        restarts: How often Slurm had restarted the job: an older incarnation may still run on a node that Slurm has given up.
        started: When the process started, in clock ticks since boot: another process may get its number later.
        attempt: The attempt that it has claimed; comparisons ignore it.
    """

    job: str | None = None
    restarts: int = 0
    host: str | None = None
    pid: int | None = None
    started: str | None = None
    attempt: int = field(default=0, compare=False)

    @classmethod
    def this_process(cls) -> "Owner":
        return cls.of_process(os.getpid())

    @classmethod
    def of_job(cls, env: Mapping[str, str]) -> "Owner":
        """The Slurm job whose environment this is."""
        return cls(job=env["LOCKSTEP_JOB"], restarts=int(env.get("SLURM_RESTART_COUNT", "0")))

    @classmethod
    def of_process(cls, pid: int) -> "Owner":
        """The process ``pid`` on this machine; ``started`` is None if it does not run or cannot be seen."""
        try:
            started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        except OSError:
            started = None
        return cls(host=platform.node(), pid=pid, started=started)

    def __str__(self) -> str:
        return f"job {self.job}" if self.job is not None else f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class AttemptStart(Record):
    """``logs/<attempt>/start.json``: when an attempt started (seconds since 1970), and bytes of ``output`` before that.

    ``job`` is empty for an attempt outside Slurm.
    """

    job: str
    time: float
    output: int = 0


@dataclass(frozen=True)
class GitState(Record):
    """The commit of a checkout, and whether it has uncommitted changes."""

    commit: str
    changed: bool


@dataclass(frozen=True)
class SoftwareState(Record):
    """The version of a package, and the commit of its checkout, if it runs from one."""

    version: str
    commit: str | None = None
    changed: bool | None = None


@dataclass(frozen=True)
class SweepRun(Record):
    """A run's place in a sweep: the folder name of the sweep, the index in its array, and the values of the swept keys."""

    id: str
    index: int
    values: dict[str, str]


@dataclass(frozen=True)
class LaunchRecord(Record):
    """``launch.yaml``: how a run was started.

    Attributes:
        command: The command line as it was typed.
        nodes: Number of nodes, or a range such as 2-4.
        git: Of the folder where it was typed; None outside a checkout.
        lockstep: Version and commit of lockstep; ``interpreter`` is the Python that ran it.
        profile: Name or file of the profile of the job.
        slurm: Resources of the job that differ from the defaults; of the environment only the names.
        code: SHA-256 of the code snapshot; empty without one.
        paths: Where the ranks import from.
        after: Conditions on other jobs before it starts, as ``--dependency`` of sbatch.
        sweep: None if the run is not one of a sweep.
        time: Of the launch, ISO 8601.
    """

    command: str
    nodes: int | str
    ranks_per_node: int
    git: GitState | None = None
    lockstep: SoftwareState | None = None
    interpreter: str | None = None
    folder: str | None = None
    profile: str | None = None
    slurm: dict[str, Any] | None = None
    code: str | None = None
    paths: list[str] | None = None
    after: str | None = None
    sweep: SweepRun | None = None
    host: str = field(default_factory=platform.node)
    python: str = field(default_factory=platform.python_version)
    time: str = field(default_factory=lambda: iso_time(time.time()))

    @property
    def max_nodes(self) -> int:
        """Number of nodes; the upper end of a range."""
        return int(str(self.nodes).rpartition("-")[2])
