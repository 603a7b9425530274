"""The Slurm client: queries to Slurm's commands, and parsers of their output in all supported versions.

tests/slurm/golden has what the commands of each version print.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lockstep.core import UsageError, count
from lockstep.runs import JobState, Owner

RUNNING_JOBS = (
    *("--me", "--array", "--noheader", "--states=RUNNING,SUSPENDED"),
    "--Format=ArrayJobID:|,ArrayTaskID:|,JobID:|,RestartCnt:|,EndTime:|,PreemptTime:|",
)
"""Arguments of squeue that list the user's running jobs for ``parse_running_jobs``, with SLURM_TIME_FORMAT=%s."""

STATES_OF_JOB = ("squeue", "--all", "--array", "--states=all", "--noheader", "--Format=State")
"""The command that prints the state of each task of the job that ``--jobs`` names; it fails for an unknown one."""

JOBS = (
    *("squeue", "--all", "--array", "--states=all", "--noheader", "--me"),
    "--Format=JobID:|,ArrayJobID:|,ArrayTaskID:|,State:|,Reason:|,StartTime:|,TimeUsed:|,TimeLimit:|,NodeList:|,exit_code:|,"
    "RestartCnt:|,Dependency:|",
)
"""The command that lists all jobs of the user for ``parse_jobs``; with --jobs it would fail if Slurm has forgotten one."""

QUEUED_SCRIPTS = ("squeue", "--me", "--noheader", "--Format=ArrayJobID:|,Command:|")
"""The command that lists the user's jobs and their batch scripts for ``parse_scripts``."""

PARTITIONS = ("sinfo", "--all", "--exact", "--noheader", "--format=%R|%P|%D|%c|%m|%G|%l|%T")
"""The command that lists the nodes of each partition for ``parse_partitions``."""

NO_SQUEUE = "squeue is not installed here."
"""The error of ``query_jobs`` on a machine without Slurm."""

_NO_ANSWER = re.compile(r"(?i)unable to contact|connect failure|connection refused|timed out|zero bytes")


def check_slurm_conf(env: Mapping[str, str]) -> None:
    """Raise UsageError if SLURM_CONF names no readable file: each Slurm command would retry for a minute."""
    conf = env.get("SLURM_CONF")
    if conf and not (Path(conf).is_file() and os.access(conf, os.R_OK)):
        raise UsageError(f"SLURM_CONF={conf} cannot be read: that cluster is gone; unset SLURM_CONF.")


def query_slurm(command: list[str], env: Mapping[str, str], timeout: float | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a Slurm command without a user's own defaults, such as SQUEUE_PARTITION, which would hide jobs or partitions."""
    return subprocess.run(command, env=_without_defaults(env), capture_output=True, text=True, timeout=timeout)


def start_query(command: list[str], env: Mapping[str, str]) -> "subprocess.Popen[str]":
    """Start a Slurm command as ``query_slurm`` does, to run beside another one; as a context manager it waits for the end."""
    return subprocess.Popen(command, env=_without_defaults(env), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _without_defaults(env: Mapping[str, str]) -> dict[str, str]:
    defaults = ("SQUEUE_", "SACCT_", "SINFO_", "SLURM_CLUSTERS")
    return {name: value for name, value in env.items() if not name.startswith(defaults)}


def has_command(name: str, env: Mapping[str, str]) -> bool:
    """Whether a Slurm command is installed."""
    return shutil.which(name, path=env.get("PATH")) is not None


def error_message(answer: "subprocess.CompletedProcess[str]") -> str:
    """The last line that a failed command printed, or its exit status if it printed nothing."""
    lines = answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"]
    return re.sub(r"^\w+:? error: ", "", lines[-1])


class RunningJob(NamedTuple):
    """A job that runs, or is suspended.

    Attributes:
        restarts: How often Slurm has restarted it.
        end: When its allocation ends, in seconds since 1970; 0 without an end.
        is_preempted: Whether Slurm has begun to preempt it.
    """

    restarts: int
    end: int
    is_preempted: bool


def parse_running_jobs(text: str) -> dict[str, RunningJob]:
    """Parse what squeue has printed for RUNNING_JOBS: each job by its id, ``<array>_<task>`` for a run of a sweep."""
    jobs = {}
    for line in text.splitlines():
        array, task, job, restarts, end, preempted, *_ = line.split("|")
        # The last run of an array has the id of the whole array as its own.
        name = f"{array}_{task}" if task != "N/A" else job
        jobs[name] = RunningJob(int(restarts), int(end) if end.isdigit() else 0, preempted.isdigit())
    return jobs


def is_owner_alive(owner: Owner, env: Mapping[str, str]) -> bool | None:
    """Whether the owner of a run, a Slurm job or a process on this machine, still runs; None if that cannot be known."""
    if owner.job is None:
        is_here = owner.host == platform.node() and owner.started is not None
        return owner == Owner.of_process(owner.pid or 0) if is_here else None
    if not has_command("squeue", env):
        return None
    answer = query_slurm(["squeue", *RUNNING_JOBS], {**env, "SLURM_TIME_FORMAT": "%s"})
    return None if answer.returncode else is_running(owner, parse_running_jobs(answer.stdout))


def is_running(owner: Owner, jobs: Mapping[str, RunningJob]) -> bool:
    """Whether ``jobs`` has the job of an owner, in this incarnation."""
    found = jobs.get(owner.job or "")
    return found is not None and found.restarts == owner.restarts


def query_jobs(ids: set[str], env: Mapping[str, str]) -> tuple[dict[str, JobState], str]:
    """Return the state of each job that slurmctld knows, and the error of squeue; empty if it answered."""
    if not ids:
        return {}, ""
    if not has_command("squeue", env):
        return {}, NO_SQUEUE
    answer = query_slurm([*JOBS], env)
    if answer.returncode:
        return {}, error_message(answer)
    return parse_jobs(answer.stdout), ""


def exit_status(code: str) -> int:
    """The exit status in ``status:signal``, or in the wait status that squeue prints before Slurm 23.02."""
    status, colon, signal = code.partition(":")
    if not colon:
        waited = os.waitstatus_to_exitcode(int(code)) if code.isdigit() else 0
        return waited if waited >= 0 else 128 - waited
    return int(status) or (128 + int(signal) if int(signal) else 0)


def parse_jobs(text: str) -> dict[str, JobState]:
    """Parse what squeue has printed for JOBS: the state of each job by its id, ``<array>_<task>`` for a run of a sweep."""
    states: dict[str, JobState] = {}
    for line in text.splitlines():
        job, array, task, state, reason, start, elapsed, limit, nodes, code, restarts, after, *_ = line.split("|")
        name = f"{array}_{task}" if task != "N/A" else job
        after = re.sub(r"\(\w+\)", "", after)  # (unfulfilled), (failed) or (null)
        states[name] = JobState(state, reason, start, elapsed, limit, nodes, exit_status(code), int(restarts), dependency=after)
    return states


def parse_scripts(text: str) -> dict[str, str]:
    """Parse what squeue has printed for QUEUED_SCRIPTS: the path of the batch script of each job."""
    return {job.strip(): script for job, script, *_ in (line.split("|") for line in text.splitlines())}


class Partition(NamedTuple):
    """Nodes of one kind in a partition, as ``sinfo`` prints them; where they differ, ``cpus`` and ``memory`` end with +."""

    name: str
    is_default: bool
    nodes: str
    cpus: str
    memory: str
    gres: str
    time: str
    state: str

    @property
    def gpus(self) -> int:
        """GPUs per node."""
        return sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", self.gres))

    @property
    def is_unavailable(self) -> bool:
        """Whether its nodes take no jobs now."""
        return re.match(r"down|drain|drng|maint|reserved|fail|unk|no_resp|power", self.state) is not None

    def __str__(self) -> str:
        gpus = self.gres if self.gres != "(null)" else "no GPUs"
        return (
            f"partition {self.name} has {count(int(self.nodes), 'node')}, each {self.cpus} CPUs, {self.memory} MB, {gpus}, "
            f"and a time limit of {self.time}"
        )


def query_partitions(env: Mapping[str, str]) -> list[Partition]:
    """Return all partitions, one entry per kind of node."""
    return parse_partitions(query_slurm([*PARTITIONS], env).stdout)


def parse_partitions(text: str) -> list[Partition]:
    """Parse what sinfo has printed for PARTITIONS."""
    return [
        Partition(name, label.endswith("*"), *rest) for name, label, *rest in (line.split("|") for line in text.splitlines())
    ]


def parse_node_states(text: str) -> dict[str, str]:
    """Parse ``scontrol --oneliner show node``: the state of each node in lower case, such as down+not_responding."""
    return {name: state.lower() for name, state in re.findall(r"^NodeName=(\S+).*? State=(\S+)", text, re.MULTILINE)}


def parse_rejection(output: str) -> str:
    """Why ``sbatch`` has refused a job, in its own words."""
    errors = re.findall(r"(?:sbatch: error: |allocation failure: |Batch job submission failed: )([^\n]+)", output)
    return (errors[-1].rpartition("failed: ")[2] if errors else " ".join(output.split())).rstrip(".")


def is_unanswered(error: str) -> bool:
    """Whether a command has failed because slurmctld did not answer."""
    return _NO_ANSWER.search(error) is not None


def lacks_nodes(error: str) -> bool:
    """Whether sbatch has refused a job because not enough nodes that are up can run it."""
    return "node configuration is not available" in error


def is_unknown_job(error: str) -> bool:
    """Whether squeue has failed because Slurm does not know the job."""
    return "Invalid job id" in error
