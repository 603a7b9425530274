"""Query Slurm's accounting for jobs that slurmctld has forgotten; without accounting all answers are empty."""

import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lockstep.runs import JobState
from lockstep.slurm.client import error_message, exit_status, has_command, query_slurm

_FIELDS = ("JobID", "Submit", "State", "Reason", "Start", "Elapsed", "Timelimit", "NodeList", "ExitCode", "MaxRSS", "ReqMem")

_COMMAND = ("sacct", "--duplicates", "--noheader", "--parsable2", f"--format={','.join(_FIELDS)}")

_NO_ACCOUNTING = re.compile(r"(?i)accounting storage is disabled|job accounting not enabled|only supports")
"""Errors of sacct where the cluster has no accounting."""

_TIMEOUT_SECONDS = 20.0
"""How long sacct may take: it waits for a database that does not answer."""

_JOBS_PER_QUERY = 5000
"""Linux limits the length of an argument."""


def query_accounting(ids: set[str], env: Mapping[str, str]) -> tuple[dict[str, JobState], str]:
    """Return how each of these jobs ended, as far as ``sacct`` knows it, and its error; empty without accounting.

    Args:
        ids: Jobs that slurmctld does not know. One that accounting lists as running or waiting is left out: its end was lost.
    """
    found, error = _query(sorted({id_.partition("_")[0] for id_ in ids}), env)
    return {id_: found[id_] for id_ in ids if id_ in found}, error


def accounted_states(job: str, env: Mapping[str, str]) -> set[str]:
    """How a job that slurmctld has forgotten ended, or the tasks of an array; empty if accounting does not know it."""
    found, _ = _query([job.partition("_")[0]], env)
    return {state.state for id_, state in found.items() if f"{id_}_".startswith(f"{job}_")}


def _query(jobs: Sequence[str], env: Mapping[str, str]) -> tuple[dict[str, JobState], str]:
    """The jobs among these that have ended, and the error of sacct; ``jobs`` names an array by its id."""
    if not jobs or not has_command("sacct", env):
        return {}, ""
    states: dict[str, JobState] = {}
    env = {**env, "SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0"}  # tasks of an array in full
    for first in range(0, len(jobs), _JOBS_PER_QUERY):
        names = ",".join(jobs[first : first + _JOBS_PER_QUERY])
        try:
            answer = query_slurm([*_COMMAND, f"--jobs={names}"], env, _TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            return states, f"no answer within {_TIMEOUT_SECONDS:.0f} s"
        if answer.returncode:
            return states, "" if _NO_ACCOUNTING.search(answer.stderr) else error_message(answer)
        states |= {id_: state for id_, state in parse_accounting(answer.stdout).items() if state.has_ended}
    return states, ""


@dataclass
class _Incarnation:
    """One start of a job, or waiting tasks of an array, with the state and memory of its steps."""

    job: str
    submitted: int
    state: JobState
    requested: str
    step_state: str = ""
    memory: list[tuple[int, str]] = field(default_factory=list)

    def add_step(self, name: str, state: str, memory: str) -> None:
        if name not in ("batch", "extern"):
            self.step_state = state  # the last step is the newest attempt
        elif state == "OUT_OF_MEMORY":
            self.step_state = self.step_state or state
        if memory:
            self.memory.append((_kilobytes(memory), memory))

    def ended(self, restarts: int) -> JobState:
        """The state of the job, which Slurm has restarted so often."""
        state = self.state.state
        if state == "FAILED" and self.step_state == "OUT_OF_MEMORY":  # the batch script itself was not killed
            state = "OUT_OF_MEMORY"
        peak = f"{max(self.memory)[1]} of {self.requested}" if self.memory and self.requested else ""
        return replace(self.state, state=state, restarts=restarts, memory=peak)


def parse_accounting(text: str) -> dict[str, JobState]:
    """Parse what sacct has printed: the newest incarnation of each job by its id, ``<array>_<task>`` for a run of a sweep."""
    found: list[_Incarnation] = []
    for line in text.splitlines():
        job, submitted, state, reason, start, elapsed, limit, nodes, code, memory, requested = line.split("|")
        parent, dot, step = job.partition(".")
        if dot:
            if found and found[-1].job == parent:
                found[-1].add_step(step, state.partition(" ")[0], memory)
            continue
        # Slurm has cancelled it, else the state would name a user. The reason is None if the condition never could hold.
        if state == "CANCELLED" and nodes == "None assigned" and reason in ("Dependency", "None"):
            reason = "DependencyNeverSatisfied"
        began = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(int(start))) if start.isdigit() else ""
        view = JobState(state.partition(" ")[0], reason, began, elapsed, limit, nodes, exit_status(code))
        found.append(_Incarnation(job, int(submitted) if submitted.isdigit() else 0, view, requested))
    found.sort(key=lambda incarnation: incarnation.submitted)
    restarts: dict[str, int] = {}
    states: dict[str, JobState] = {}
    for incarnation in found:
        if "[" not in (job := incarnation.job):
            restarts[job] = restarts.get(job, -1) + 1
            states[job] = incarnation.ended(restarts[job])
    for incarnation in found:
        if "[" in incarnation.job:
            states = {task: incarnation.ended(0) for task in _tasks(incarnation.job)} | states
    return states


def _tasks(job: str) -> Iterator[str]:
    """The tasks of an array that have not started, such as those of ``12_[0-3,7%2]``."""
    array, _, tasks = job.partition("_")
    for part in tasks.strip("[]").partition("%")[0].split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):
            for number in range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1)):
                yield f"{array}_{number}"


def _kilobytes(size: str) -> int:
    """A size of sacct, such as ``268166K`` or ``1.50G``."""
    match = re.fullmatch(r"([\d.]+)([KMGT]?)", size)
    return int(float(match[1]) * 1024 ** "KMGT".index(match[2] or "K")) if match else 0
