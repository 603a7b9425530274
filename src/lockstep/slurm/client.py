"""What Slurm says of jobs: ``squeue`` while it knows them, ``sacct`` after that where there is accounting. No torch here."""

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockstep.core import UsageError
from lockstep.runs import JobState

PATIENCE_SECONDS = 600.0
"""How long a Slurm that does not answer is waited for."""


def check_slurm_conf(env: Mapping[str, str]) -> None:
    """Raise UsageError where SLURM_CONF leads nowhere: each of Slurm's commands would try for a minute before it says so."""
    conf = env.get("SLURM_CONF")
    if conf and not (Path(conf).is_file() and os.access(conf, os.R_OK)):
        raise UsageError(f"SLURM_CONF={conf} is no file that can be read: that cluster is gone; unset SLURM_CONF.")


def query_env(env: Mapping[str, str]) -> dict[str, str]:
    """``env`` without the defaults of a user's own, such as SQUEUE_PARTITION, which would leave jobs or partitions out."""
    return {
        name: value for name, value in env.items() if not name.startswith(("SQUEUE_", "SACCT_", "SINFO_", "SLURM_CLUSTERS"))
    }


def is_owner_alive(owner: Mapping[str, Any], env: Mapping[str, str], patience: float = 0.0) -> bool:
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
        answer = subprocess.run(command, env=query_env(env), capture_output=True, text=True)
        if answer.returncode == 0 or "Invalid job id" in answer.stderr:  # it has forgotten the job
            return answer.stdout.strip() in ("RUNNING", "SUSPENDED")
        if time.monotonic() > deadline:
            return True
        time.sleep(2)


_FIELDS = ("JobID", "ArrayJobID", "ArrayTaskID", "State", "Reason", "StartTime", "TimeUsed", "TimeLimit", "NodeList")


def query_jobs(ids: set[str], env: Mapping[str, str]) -> tuple[dict[str, JobState], str]:
    """Slurm's word on the jobs that it still knows, and with accounting on the others too; why it says nothing, if so."""
    if not ids:
        return {}, ""
    if shutil.which("squeue", path=env.get("PATH")) is None:
        return {}, "there is no squeue here."
    format_ = ",".join(f"{name}:|" for name in (*_FIELDS, "exit_code", "RestartCnt"))
    # Not --jobs: one that Slurm has forgotten makes an error of the whole answer.
    command = ["squeue", "--all", "--array", "--states=all", "--noheader", "--me", f"--Format={format_}"]
    answer = subprocess.run(command, env=query_env(env), capture_output=True, text=True)
    if answer.returncode:
        return {}, answer.stderr.strip().splitlines()[-1].removeprefix("slurm_load_jobs error: ")
    slots: dict[str, JobState] = {}
    for line in answer.stdout.splitlines():
        job, array, task, state, reason, start, elapsed, limit, nodes, code, restarts, *_ = line.split("|")
        name = f"{array}_{task}" if task != "N/A" else job
        status = os.waitstatus_to_exitcode(int(code)) if code.isdigit() else 0
        slots[name] = JobState(
            state, reason, start, elapsed, limit, nodes, status if status >= 0 else 128 - status, int(restarts)
        )
    return _from_accounting(ids - set(slots), query_env(env)) | slots, ""


def _from_accounting(ids: set[str], env: Mapping[str, str]) -> dict[str, JobState]:
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
    slots: dict[str, JobState] = {}
    for line in answer.stdout.splitlines():
        job, state, reason, start, elapsed, limit, nodes, code = line.split("|")
        status, _, killed = code.partition(":")
        exited = int(status) or (128 + int(killed) if killed and int(killed) else 0)
        slots[job] = JobState(state.split()[0], reason, start, elapsed, limit, nodes, exited)
    return slots


def cancel_steps(job: str, env: Mapping[str, str]) -> None:
    """End ranks that live on because somebody has killed srun: they and those of the next attempt must not both train."""
    command = ["squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%i"]
    own = f"{job}.{env.get('SLURM_STEP_ID', '')}"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        answer = subprocess.run(command, env=query_env(env), capture_output=True, text=True)
        left = [step for step in answer.stdout.split() if step.rpartition(".")[2].isdigit() and step != own]
        if answer.returncode == 0 and not left:
            return
        if left:
            subprocess.run(["scancel", *left], env=dict(env), capture_output=True)
        time.sleep(0.5)


def allocation_end(job: str, env: Mapping[str, str]) -> int:
    """When the allocation is over, in seconds since 1970; 0 where there is no such time."""
    command = ["squeue", "--all", "--noheader", f"--jobs={job}", "--Format=EndTime"]
    told = subprocess.run(command, env=query_env(env), capture_output=True, text=True).stdout.strip()
    try:
        return int(time.mktime(time.strptime(told, "%Y-%m-%dT%H:%M:%S")))
    except ValueError:
        return 0


def is_preempted(job: str, env: Mapping[str, str]) -> bool:
    """Whether Slurm has begun to take the job's nodes."""
    command = ["scontrol", "--oneliner", "show", "job", job]
    told = subprocess.run(command, env=query_env(env), capture_output=True, text=True).stdout
    return re.search(r" PreemptTime=(?!None)\S", told) is not None
