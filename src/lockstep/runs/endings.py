"""The truth about a run in one sentence: from Slurm, the output of its job, and what its ranks have written. No torch here."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.core import read_json
from lockstep.runs.failure import Failure, read_first_failure
from lockstep.runs.run import Run

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
"""Slurm's states of a job that has ended: exit status of ``follow`` and ``status``, and a word."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job; times as it writes them.

    Attributes:
        state: Such as PENDING, RUNNING, FAILED.
        reason: Why it is in that state.
        start: When it started, or is expected to.
        elapsed, limit: Time used, and allowed.
        nodes: Its nodes.
        status: Exit status of the batch script; 128 and more for a signal.
        restarts: How often Slurm has started it again.
    """

    state: str
    reason: str = ""
    start: str = ""
    elapsed: str = ""
    limit: str = ""
    nodes: str = ""
    status: int = 0
    restarts: int = 0

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.state in TERMINAL_STATES


ACTIVE = 3
"""Exit status of ``status`` for a job that waits or runs."""


_PENDING_REASONS = {
    "Resources": "for nodes to become free",
    "Priority": "behind jobs of higher priority",
    "Dependency": "for another job to end well",
    "BeginTime": "for its time to begin",
    "JobHeldUser": "because its user holds it (scontrol release)",
    "JobHeldAdmin": "because an administrator holds it",
    "ReqNodeNotAvail": "for nodes that are down, drained or reserved",
    "PartitionDown": "because its partition is down",
    "JobArrayTaskLimit": "for other runs of its sweep to end",
    "QOSMaxJobsPerUserLimit": "for one of your jobs to end (limit of the QOS)",
    "AssocGrpGRES": "for GPUs of your group to become free",
}


_IMPOSSIBLE_REASONS = {
    "DependencyNeverSatisfied": "the job that it waits for did not end well",
    "PartitionTimeLimit": "it asks for more time than its partition gives",
    "PartitionNodeLimit": "it asks for more nodes than its partition gives",
    "BadConstraints": "no node can ever give what it asks for",
    "InvalidAccount": "its account is not valid",
    "InvalidQOS": "its QOS is not valid",
}


def diagnose(job: str, run: Run, slurm: Path, slot: JobState | None, result: dict[str, Any]) -> tuple[int, str, str]:
    """Exit status, state and sentence of a run."""
    if slot is not None and not slot.ended:
        if slot.state != "PENDING":
            number = run.newest_attempt
            failed = read_first_failure(run, number) if number else None
            return ACTIVE, slot.state.lower(), f"Attempt {number} has failed: {failed.reason}" if failed else ""
        if slot.reason in _IMPOSSIBLE_REASONS:
            return (
                ACTIVE,
                "waiting",
                f"It will never start: {_IMPOSSIBLE_REASONS[slot.reason]} (Slurm: {slot.reason}); cancel it.",
            )
        if slot.reason == "None":
            return ACTIVE, "waiting", "Slurm has not looked at it yet."
        why = _PENDING_REASONS.get(slot.reason.partition(",")[0].strip("()"), f"for what Slurm calls {slot.reason}")
        return ACTIVE, "waiting", f"It waits {why}." + (f" Expected start: {slot.start}." if slot.start[:1].isdigit() else "")
    exited, output = _read_exit_status(slurm / f"{job}.exit"), attempt_output(run, slurm, job)
    attempt = run.newest_attempt
    failure = read_first_failure(run, attempt) if attempt else None
    said = killed_task(output)
    ate_too_much = said.startswith("Slurm says")
    if slot is not None and slot.state not in ("COMPLETED", "FAILED"):
        status, word = TERMINAL_STATES[slot.state]
        more = {
            "TIMEOUT": f"It was ended at its time limit of {slot.limit}; ask for more with --time.",
            "OUT_OF_MEMORY": f"It used more memory than it had asked for; ask for more with --mem. {said}".strip(),
            "NODE_FAIL": f"A node of {slot.nodes} went away.",
            "CANCELLED": "The job that it waited for did not end well." if slot.reason == "DependencyNeverSatisfied" else "",
        }
        if slot.state == "CANCELLED" and ate_too_much:
            return 6, "out of memory", more["OUT_OF_MEMORY"]
        return status, word, more.get(slot.state, said)
    if result.get("status") == "finished" and (slot is None or slot.state == "COMPLETED"):
        return 0, "finished", ""
    # A rank that lost its peers, or was told to leave because of one, does not know why.
    knows = failure is not None and not failure.is_secondary and not failure.interrupted
    if ate_too_much and not knows:
        return 6, "out of memory", f"It used more memory than it had asked for; ask for more with --mem. {said}"
    if failure is not None and knows:
        return _run_exit_status(failure.exit_status), "failed", failure.reason
    if slot is None and (slurm / f"{job}.cancelled").exists():
        return 4, "cancelled", ""
    if slot is None and (why := _state_in_output(output)):
        return TERMINAL_STATES[why][0], TERMINAL_STATES[why][1], "Slurm says so in the job's output."
    if said:
        return 1, "failed", said
    if words := exited_task(output, failure):
        return 1, "failed", words
    if failure is not None and failure.interrupted:
        return _run_exit_status(failure.exit_status), "interrupted", failure.reason
    if result.get("reason"):
        return (
            {"interrupted": 143}.get(result["status"], _run_exit_status(exited or 1)),
            result["status"],
            str(result["reason"]),
        )
    if slot is None and exited is None:
        return 1, "gone", "It ended without a word, and Slurm has forgotten it: cancelled, over a limit, or a node was lost."
    status = _run_exit_status(exited or (slot.status if slot else 1))
    return status, "failed", f"It ended without a word; the last one of its output: {_last_line(output)}"


def _run_exit_status(status: int) -> int:
    """The exit status of a run: what a script or a user's code may have ended with must not look like one of Slurm's."""
    return status if status in (2, 130, 138, 140, 143) else 1


def attempt_output(run: Run, slurm: Path, job: str) -> str:
    """What the batch script and srun have printed since the newest attempt of this job began."""
    begun = read_json(run.folder / "logs" / str(run.newest_attempt) / "begun.json")
    try:
        with (slurm / f"{job}_0_log.out").open(errors="replace") as file:
            file.seek(begun.get("output", 0) if begun.get("job") == job else 0)
            return file.read()
    except FileNotFoundError:
        return ""


def _state_in_output(output: str) -> str:
    """Slurm's state of a job that it has forgotten, from what slurmstepd wrote when the job was ended; empty if nothing."""
    why = re.search(r"CANCELLED AT \S+ DUE TO (TIME LIMIT|NODE FAILURE|PREEMPTION)", output)
    return {"TIME LIMIT": "TIMEOUT", "NODE FAILURE": "NODE_FAIL", "PREEMPTION": "PREEMPTED"}[why[1]] if why else ""


def killed_task(text: str) -> str:
    """What srun says of a task that was killed, in the output of an attempt."""
    if over := re.search(r"(?i)error: .*?(exceeded .*memory.*|out[- ]of[- ]memory.*|oom.kill.*)", text):
        return f"Slurm says: {over[1].strip().rstrip('.')}."
    killed = re.findall(r"srun: error: (\S+): tasks? ([\d,-]+): (Killed|Segmentation fault|Bus error|Aborted)", text)
    if killed:
        node, task, how = killed[0]
        return f"rank {task} on {node}: {how} (a signal ended it; SIGKILL may be the kernel, out of memory)."
    return ""


def exited_task(text: str, failure: Failure | None) -> str:
    """What srun says of the first task that ended by itself, where no rank has told more."""
    if (found := re.search(r"error: (execve\(\): .+)", text)) and failure is None:
        return f"Slurm says: {found[1].rstrip('.')}."
    first = re.search(r"srun: error: (\S+): tasks? ([\d,-]+): Exited with exit code (\d+)", text)
    if first is None or int(first[3]) in (130, 143):
        return ""
    return f"rank {first[2]} on {first[1]} ended with exit status {first[3]} and without a word."


def has_known_cause(text: str, failure: Failure | None) -> bool:
    """Whether an attempt has told why it ended. A kill from outside tells nothing: it may come twice, and is no bug.

    Args:
        text: Its output, with srun's words.
        failure: What its ranks have left.
    """
    if failure is not None and not failure.is_secondary:
        return True
    killed = killed_task(text)
    return ": Killed (" not in killed if killed else bool(exited_task(text, failure))


def _read_exit_status(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing."
