"""The truth about a run in one sentence: from Slurm, the output of its job, and what its ranks have written. No torch here."""

import re
from pathlib import Path
from typing import Any

from lockstep.disk import read_whole
from lockstep.failure import Failure, first_failure
from lockstep.run import Run
from lockstep.squeue import ENDED, Slot

ALIVE = 3
"""Exit status of ``status`` for a job that waits or runs."""

_WAITS = {
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
_NEVER = {
    "DependencyNeverSatisfied": "the job that it waits for did not end well",
    "PartitionTimeLimit": "it asks for more time than its partition gives",
    "PartitionNodeLimit": "it asks for more nodes than its partition gives",
    "BadConstraints": "no node can ever give what it asks for",
    "InvalidAccount": "its account is not valid",
    "InvalidQOS": "its QOS is not valid",
}


def verdict(job: str, run: Run, slurm: Path, slot: Slot | None, result: dict[str, Any]) -> tuple[int, str, str]:
    """Exit status, state and sentence of a run."""
    if slot is not None and not slot.ended:
        if slot.state != "PENDING":
            number = run.newest_attempt
            failed = first_failure(run, number) if number else None
            return ALIVE, slot.state.lower(), f"Attempt {number} has failed: {failed.reason}" if failed else ""
        if slot.reason in _NEVER:
            return ALIVE, "waiting", f"It will never start: {_NEVER[slot.reason]} (Slurm: {slot.reason}); cancel it."
        if slot.reason == "None":
            return ALIVE, "waiting", "Slurm has not looked at it yet."
        why = _WAITS.get(slot.reason.partition(",")[0].strip("()"), f"for what Slurm calls {slot.reason}")
        return ALIVE, "waiting", f"It waits {why}." + (f" Expected start: {slot.start}." if slot.start[:1].isdigit() else "")
    exited, output = _exit_file(slurm / f"{job}.exit"), output_of(run, slurm, job)
    attempt = run.newest_attempt
    failure = first_failure(run, attempt) if attempt else None
    said = last_words(output)
    ate_too_much = said.startswith("Slurm says")
    if slot is not None and slot.state not in ("COMPLETED", "FAILED"):
        status, word = ENDED[slot.state]
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
    knows = failure is not None and not failure.echo and not failure.interrupted
    if ate_too_much and not knows:
        return 6, "out of memory", f"It used more memory than it had asked for; ask for more with --mem. {said}"
    if failure is not None and knows:
        return _of_run(failure.exit_status), "failed", failure.reason
    if slot is None and (slurm / f"{job}.cancelled").exists():
        return 4, "cancelled", ""
    if slot is None and (why := _cancelled_by_slurm(output)):
        return ENDED[why][0], ENDED[why][1], "Slurm says so in the job's output."
    if said:
        return 1, "failed", said
    if words := exit_words(output, failure):
        return 1, "failed", words
    if failure is not None and failure.interrupted:
        return _of_run(failure.exit_status), "interrupted", failure.reason
    if result.get("reason"):
        return {"interrupted": 143}.get(result["status"], _of_run(exited or 1)), result["status"], str(result["reason"])
    if slot is None and exited is None:
        return 1, "gone", "It ended without a word, and Slurm has forgotten it: cancelled, over a limit, or a node was lost."
    status = _of_run(exited or (slot.status if slot else 1))
    return status, "failed", f"It ended without a word; the last one of its output: {_tail(output)}"


def _of_run(status: int) -> int:
    """The exit status of a run: what a script or a user's code may have ended with must not look like one of Slurm's."""
    return status if status in (2, 130, 138, 140, 143) else 1


def output_of(run: Run, slurm: Path, job: str) -> str:
    """What the batch script and srun have printed since the newest attempt of this job began."""
    begun = read_whole(run.folder / "logs" / str(run.newest_attempt) / "begun.json")
    try:
        with (slurm / f"{job}_0_log.out").open(errors="replace") as file:
            file.seek(begun.get("output", 0) if begun.get("job") == job else 0)
            return file.read()
    except FileNotFoundError:
        return ""


def _cancelled_by_slurm(output: str) -> str:
    """Slurm's state of a job that it has forgotten, from what slurmstepd wrote when the job was ended; empty if nothing."""
    why = re.search(r"CANCELLED AT \S+ DUE TO (TIME LIMIT|NODE FAILURE|PREEMPTION)", output)
    return {"TIME LIMIT": "TIMEOUT", "NODE FAILURE": "NODE_FAIL", "PREEMPTION": "PREEMPTED"}[why[1]] if why else ""


def last_words(text: str) -> str:
    """What srun says of a task that was killed, in the output of an attempt."""
    if over := re.search(r"(?i)error: .*?(exceeded .*memory.*|out[- ]of[- ]memory.*|oom.kill.*)", text):
        return f"Slurm says: {over[1].strip().rstrip('.')}."
    killed = re.findall(r"srun: error: (\S+): tasks? ([\d,-]+): (Killed|Segmentation fault|Bus error|Aborted)", text)
    if killed:
        node, task, how = killed[0]
        return f"rank {task} on {node}: {how} (a signal ended it; SIGKILL may be the kernel, out of memory)."
    return ""


def exit_words(text: str, failure: Failure | None) -> str:
    """What srun says of the first task that ended by itself, where no rank has told more."""
    if (found := re.search(r"error: (execve\(\): .+)", text)) and failure is None:
        return f"Slurm says: {found[1].rstrip('.')}."
    first = re.search(r"srun: error: (\S+): tasks? ([\d,-]+): Exited with exit code (\d+)", text)
    if first is None or int(first[3]) in (130, 143):
        return ""
    return f"rank {first[2]} on {first[1]} ended with exit status {first[3]} and without a word."


def is_told(text: str, failure: Failure | None) -> bool:
    """Whether an attempt has told why it ended. A kill from outside tells nothing: it may come twice, and is no bug.

    Args:
        text: Its output, with srun's words.
        failure: What its ranks have left.
    """
    if failure is not None and not failure.echo:
        return True
    killed = last_words(text)
    return ": Killed (" not in killed if killed else bool(exit_words(text, failure))


def _exit_file(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _tail(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing."
