"""What Slurm says of jobs: ``squeue`` while it knows them, ``sacct`` after that where there is accounting. No torch here."""

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.flags import asking

ENDED = {
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
class Slot:
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
        return self.state in ENDED


def holds(owner: Mapping[str, Any], env: Mapping[str, str], patience: float = 0.0) -> bool:
    """Whether the job, or the process on this machine, that has claimed a run still has it.

    Args:
        owner: What claimed it.
        env: With SLURM_CONF and PATH.
        patience: How long to go on asking where Slurm does not answer, in seconds; after that it is taken for a yes.
    """
    if not (job := str(owner.get("job", ""))):
        return owner.get("host") == platform.node() and Path("/proc", str(owner.get("pid"))).exists()
    if shutil.which("squeue", path=env.get("PATH")) is None:
        return False
    command = ["squeue", "--all", "--noheader", f"--jobs={job}", "--Format=State"]
    deadline = time.monotonic() + patience
    while True:
        answer = subprocess.run(command, env=asking(env), capture_output=True, text=True)
        if answer.returncode == 0 or "Invalid job id" in answer.stderr:  # it has forgotten the job
            return answer.stdout.strip() in ("RUNNING", "SUSPENDED")
        if time.monotonic() > deadline:
            return True
        time.sleep(2)


_FIELDS = ("JobID", "ArrayJobID", "ArrayTaskID", "State", "Reason", "StartTime", "TimeUsed", "TimeLimit", "NodeList")


def ask(ids: set[str], env: Mapping[str, str]) -> tuple[dict[str, Slot], str]:
    """Slurm's word on the jobs that it still knows, and with accounting on the others too; why it says nothing, if so."""
    if not ids:
        return {}, ""
    if shutil.which("squeue", path=env.get("PATH")) is None:
        return {}, "there is no squeue here."
    format_ = ",".join(f"{name}:|" for name in (*_FIELDS, "exit_code", "RestartCnt"))
    # Not --jobs: one that Slurm has forgotten makes an error of the whole answer.
    command = ["squeue", "--all", "--array", "--states=all", "--noheader", "--me", f"--Format={format_}"]
    answer = subprocess.run(command, env=asking(env), capture_output=True, text=True)
    if answer.returncode:
        return {}, answer.stderr.strip().splitlines()[-1].removeprefix("slurm_load_jobs error: ")
    slots: dict[str, Slot] = {}
    for line in answer.stdout.splitlines():
        job, array, task, state, reason, start, elapsed, limit, nodes, code, restarts, *_ = line.split("|")
        name = f"{array}_{task}" if task != "N/A" else job
        status = os.waitstatus_to_exitcode(int(code)) if code.isdigit() else 0
        slots[name] = Slot(state, reason, start, elapsed, limit, nodes, status if status >= 0 else 128 - status, int(restarts))
    return _from_accounting(ids - set(slots), asking(env)) | slots, ""


def _from_accounting(ids: set[str], env: Mapping[str, str]) -> dict[str, Slot]:
    """What ``sacct`` says, where there is accounting."""
    if not ids or shutil.which("sacct", path=env.get("PATH")) is None:
        return {}
    jobs = sorted({id_.partition("_")[0] for id_ in ids})
    command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={','.join(jobs)}"]
    answer = subprocess.run(
        [*command, "--format=JobID,State,Reason,Start,Elapsed,Timelimit,NodeList,ExitCode"],
        env=dict(env),
        capture_output=True,
        text=True,
    )
    slots: dict[str, Slot] = {}
    for line in answer.stdout.splitlines():
        job, state, reason, start, elapsed, limit, nodes, code = line.split("|")
        status, _, killed = code.partition(":")
        exited = int(status) or (128 + int(killed) if killed and int(killed) else 0)
        slots[job] = Slot(state.split()[0], reason, start, elapsed, limit, nodes, exited)
    return slots
