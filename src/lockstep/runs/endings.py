"""Decide why a run or an attempt ended, from its records, its output and Slurm's job state.

Ranks, the supervisor of a Slurm job, local launches and ``jobs.py status`` all ask ``classify_ending``.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from lockstep.core import SIGNAL_EXIT_STATUSES
from lockstep.runs.failure import Failure
from lockstep.runs.records import Record, RunResult

TERMINAL_STATES = {
    "COMPLETED": (0, "finished"),
    "FAILED": (1, "failed"),
    "CANCELLED": (4, "cancelled"),
    "DEADLINE": (5, "over its deadline"),
    "TIMEOUT": (5, "over its time limit"),
    "OUT_OF_MEMORY": (6, "out of memory"),
    "NODE_FAIL": (7, "a node failed"),
    "BOOT_FAIL": (7, "a node failed"),
    "PREEMPTED": (7, "preempted"),
}
"""Slurm's terminal job states, each with the exit status of ``follow`` and ``status``, and a description."""

LOST_AGENT = 74
"""Exit status of an agent that has lost its connection to another one (EX_IOERR of sysexits.h)."""

_EXITED_FIRST = re.compile(rf"\A(?:(?!: Killed).)*: Exited with exit code (?!{LOST_AGENT}\b)", re.DOTALL)
"""Output in which a task exits by itself before another is killed: srun then kills all others."""

_OVER_MEMORY = re.compile(r"(?i)(?:srun|slurmstepd\S*): error: .*?(exceeded .*memory.*|out[- ]of[- ]memory.*|oom.kill.*)")
_ENDED_BY_SLURM = re.compile(r"CANCELLED AT \S+ DUE TO (TIME LIMIT|NODE FAILURE|PREEMPTION)")
_STATES_IN_OUTPUT = {"TIME LIMIT": "TIMEOUT", "NODE FAILURE": "NODE_FAIL", "PREEMPTION": "PREEMPTED"}
"""What slurmstepd writes when it ends a job, and the state of the job."""

OVER_MEMORY = "It used more memory than it requested; request more with --mem."
"""The first sentence of each reason of this kind. The rest differs between attempts, such as the amount of memory."""


@dataclass(frozen=True)
class JobState(Record):
    """Slurm's view of a job; times as Slurm writes them.

    Attributes:
        start: When it started, or is expected to.
        elapsed, limit: Time used, and allowed.
        exit_status: Of the batch script; 128 and more for a signal.
        memory: What its largest task used of what it requested, such as ``268166K of 50M``; empty if accounting has no value.
        dependency: The conditions on other jobs that do not hold yet.
    """

    state: str
    reason: str = ""
    start: str = ""
    elapsed: str = ""
    limit: str = ""
    nodes: str = ""
    exit_status: int = 0
    restarts: int = 0
    memory: str = ""
    dependency: str = ""

    @property
    def has_ended(self) -> bool:
        return self.state in TERMINAL_STATES


class Evidence(NamedTuple):
    """What is known about an ending.

    Attributes:
        result: ``result.json`` of this attempt.
        output: Output of the batch script and of srun.
        exit_status: Of srun or of the batch script; None if unknown.
        job: Slurm's view of the job that has ended; None while it runs, or where Slurm has forgotten it.
        was_cancelled: Whether ``jobs.py cancel`` was called.
        is_forgotten: Whether Slurm no longer knows the job.
    """

    result: RunResult | None = None
    failure: Failure | None = None
    output: str = ""
    exit_status: int | None = None
    job: JobState | None = None
    was_cancelled: bool = False
    is_forgotten: bool = False


class LostTask(NamedTuple):
    """A task that srun or slurmstepd says has ended without a report.

    Attributes:
        sentence: What they say, with its cause.
        is_explained: Whether the cause is known: not if SIGKILL from outside ended it, or if it lost the agent of another node.
        is_out_of_memory: Whether Slurm ended it because it exceeded its memory limit.
    """

    sentence: str
    is_explained: bool = True
    is_out_of_memory: bool = False


class Ending(NamedTuple):
    """Why a run or an attempt ended.

    Attributes:
        state: ``finished``, ``failed``, ``interrupted``, ``gone``, or a description of ``TERMINAL_STATES``.
        exit_status: 0 finished, 1 failed, 2 usage error, 4 to 7 as in ``TERMINAL_STATES``, 128 and more for a signal.
        reason: One sentence; may be empty.
        is_explained: Whether the cause is known. That of a kill from outside is not: it may happen twice and is not a bug.
    """

    state: str
    exit_status: int
    reason: str = ""
    is_explained: bool = False

    @property
    def is_finished(self) -> bool:
        return self.state == "finished"

    @property
    def is_interrupted(self) -> bool:
        """Whether Slurm or a person ended it with a signal."""
        return self.state == "interrupted"


def classify_ending(evidence: Evidence) -> Ending:
    """Decide why a run or an attempt ended; the reason also tells why no attempt followed, if the result does."""
    ending, result = _strongest(evidence), evidence.result
    told = (result.reason or "") if result is not None and result.status == "failed" else ""
    return ending._replace(reason=told) if ending.reason and ending.reason in told else ending


def _strongest(evidence: Evidence) -> Ending:
    """What the evidence says; the strongest comes first."""
    result, failure, job = evidence.result, evidence.failure, evidence.job
    lost = killed_task(evidence.output)
    if job is not None and job.state not in ("COMPLETED", "FAILED"):
        return _ending_by_slurm(job, lost, failure)
    if result is not None and result.is_finished and (job is None or job.state == "COMPLETED"):
        return Ending("finished", 0)
    was_interrupted = result is not None and result.status == "interrupted"
    is_killed = failure is not None and failure.is_killed
    has_cause = failure is not None and failure.is_cause and not is_killed
    if lost is not None and lost.is_out_of_memory and not was_interrupted and not has_cause:
        return _out_of_memory(lost, failure)
    if failure is not None and failure.is_cause:
        if failure.is_out_of_memory:
            return _out_of_memory(None, failure)
        return Ending("failed", _run_exit_status(failure.exit_status), failure.reason, is_explained=not is_killed)
    if evidence.is_forgotten and evidence.was_cancelled:
        return Ending("cancelled", 4)
    if evidence.is_forgotten and (why := _ENDED_BY_SLURM.search(evidence.output)):
        status, word = TERMINAL_STATES[_STATES_IN_OUTPUT[why[1]]]
        return Ending(word, status, "Slurm says so in the output of the job.")
    if lost is None or (not lost.is_explained and _EXITED_FIRST.search(evidence.output)):
        lost = exited_task(evidence.output, failure) or lost
    if lost is not None and not was_interrupted:
        return Ending("failed", 1, lost.sentence, is_explained=lost.is_explained)
    if result is not None and result.reason and (was_interrupted or failure is None):
        return Ending(result.status, result.exit_status or _run_exit_status(evidence.exit_status or 1), result.reason)
    if failure is not None:
        is_signal = failure.is_interruption or evidence.exit_status in SIGNAL_EXIT_STATUSES
        return Ending("interrupted" if is_signal else "failed", _run_exit_status(failure.exit_status), failure.reason)
    if evidence.is_forgotten and evidence.exit_status is None:
        return Ending(
            "gone", 1, "It ended without a report, and Slurm has forgotten it: cancelled, over a limit, or a node was lost."
        )
    status = evidence.exit_status or (job.exit_status if job is not None else 1)
    state = "interrupted" if status in SIGNAL_EXIT_STATUSES and job is None and not evidence.is_forgotten else "failed"
    last = next((line for line in reversed(evidence.output.splitlines()) if line.strip()), "nothing.")
    reason = f"It ended with exit status {status} and without a report; last output: {last}"
    return Ending(state, _run_exit_status(status), reason)


def _out_of_memory(lost: LostTask | None, failure: Failure | None, job: JobState | None = None) -> Ending:
    """The ending of a job that exceeded its memory; names the rank that the kernel killed, else quotes Slurm."""
    is_named = failure is not None and failure.is_out_of_memory
    killed = failure.reason if failure is not None and (is_named or failure.is_killed) else ""
    said = lost.sentence if lost is not None and not is_named else ""
    seen = f"Accounting has seen {job.memory}." if job is not None and job.memory else ""
    return Ending("out of memory", 6, " ".join(filter(None, (OVER_MEMORY, killed, said, seen))), is_explained=True)


def _ending_by_slurm(job: JobState, lost: LostTask | None, failure: Failure | None) -> Ending:
    """The ending of a job that Slurm itself ended."""
    status, word = TERMINAL_STATES[job.state]
    sentence = lost.sentence if lost is not None else ""
    if job.state == "OUT_OF_MEMORY" or (job.state == "CANCELLED" and lost is not None and lost.is_out_of_memory):
        return _out_of_memory(lost, failure, job)
    reasons = {
        "TIMEOUT": f"It was ended at its time limit of {job.limit}; request more with --time.",
        "NODE_FAIL": f"A node of {job.nodes} was lost.",
        "PREEMPTED": "Slurm has preempted it, and has not requeued it.",
    }
    if job.reason == "DependencyNeverSatisfied":
        never = f"It waited for {job.dependency}, which cannot happen any more."
        return Ending(word, status, never if job.dependency else "The job that it waited for did not succeed.")
    return Ending(word, status, reasons.get(job.state, sentence))


def _run_exit_status(status: int) -> int:
    """The exit status of a run; other statuses of scripts or user code become 1, as 4 to 7 have a meaning of their own."""
    return status if status == 2 or status in SIGNAL_EXIT_STATUSES else 1


def killed_task(output: str) -> LostTask | None:
    """The killed task that Slurm names in the output of an attempt; None if it names none."""
    if over := _OVER_MEMORY.search(output):
        return LostTask(f"Slurm says: {over[1].strip().rstrip('.')}.", is_out_of_memory=True)
    killed = re.search(r"srun: error: (\S+): tasks? ([\d,-]+): (Killed|Segmentation fault|Bus error|Aborted)", output)
    if killed is None:
        return None
    sentence = f"the agent of {killed[1]}: {killed[3]} (a signal ended it; SIGKILL may be the kernel, out of memory)."
    return LostTask(sentence, is_explained=killed[3] != "Killed")


def exited_task(output: str, failure: Failure | None) -> LostTask | None:
    """The first task that srun says exited by itself and without a signal; None if it names none."""
    if (found := re.search(r"error: (execve\(\): .+)", output)) and failure is None:
        return LostTask(f"Slurm says: {found[1].rstrip('.')}.")
    exited = re.findall(r"srun: error: (\S+): tasks? [\d,-]+: Exited with exit code (\d+)", output)
    if not exited:
        return None
    host, status = min(exited, key=lambda task: int(task[1]) == LOST_AGENT)  # which does not know the cause
    if int(status) == LOST_AGENT:
        return LostTask(f"the agent of {host} has lost its connection to the agent of another node.", is_explained=False)
    if int(status) in (130, 143):
        return None
    return LostTask(f"the agent of {host} ended with exit status {status} and without a report.")
