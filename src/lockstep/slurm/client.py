"""The Slurm client: query squeue, sacct and scontrol, and parse the answers."""

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from lockstep.core import UsageError
from lockstep.runs import JobState, Owner

SLURM_TIMEOUT_SECONDS = 600.0
"""How long a running job retries while Slurm does not answer."""


def check_slurm_conf(env: Mapping[str, str]) -> None:
    """Raise UsageError if SLURM_CONF names no readable file: each Slurm command would retry for a minute."""
    conf = env.get("SLURM_CONF")
    if conf and not (Path(conf).is_file() and os.access(conf, os.R_OK)):
        raise UsageError(f"SLURM_CONF={conf} cannot be read: that cluster is gone; unset SLURM_CONF.")


def query_slurm(command: list[str], env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run a Slurm command without a user's own defaults, such as SQUEUE_PARTITION, which would hide jobs or partitions."""
    defaults = ("SQUEUE_", "SACCT_", "SINFO_", "SLURM_CLUSTERS")
    clean = {name: value for name, value in env.items() if not name.startswith(defaults)}
    return subprocess.run(command, env=clean, capture_output=True, text=True)


def _has_command(name: str, env: Mapping[str, str]) -> bool:
    return shutil.which(name, path=env.get("PATH")) is not None


def is_owner_alive(owner: Owner, env: Mapping[str, str], timeout: float = 0.0) -> bool:
    """Whether the owner of a run, a Slurm job or a process on this machine, is still running.

    While Slurm does not answer, it retries for ``timeout`` seconds; after that the owner counts as alive.
    """
    if owner.job is None:
        return owner.host == platform.node() and Path("/proc", str(owner.pid)).exists()
    if not _has_command("squeue", env):
        return False
    deadline = time.monotonic() + timeout
    while True:
        answer = query_slurm(["squeue", "--all", "--noheader", f"--jobs={owner.job}", "--Format=State"], env)
        if answer.returncode == 0 or "Invalid job id" in answer.stderr:  # Slurm has forgotten the job
            return answer.stdout.strip() in ("RUNNING", "SUSPENDED")
        if time.monotonic() > deadline:
            return True
        time.sleep(2)


def query_jobs(ids: set[str], env: Mapping[str, str]) -> tuple[dict[str, JobState], str]:
    """Return the state of each job that Slurm or its accounting knows, and the error of squeue; empty if it answered."""
    if not ids:
        return {}, ""
    if not _has_command("squeue", env):
        return {}, "squeue is not installed here."
    fields = "JobID,ArrayJobID,ArrayTaskID,State,Reason,StartTime,TimeUsed,TimeLimit,NodeList,exit_code,RestartCnt"
    format_ = fields.replace(",", ":|,") + ":|"
    # Not --jobs: squeue fails as a whole where Slurm has forgotten one of them.
    answer = query_slurm(["squeue", "--all", "--array", "--states=all", "--noheader", "--me", f"--Format={format_}"], env)
    if answer.returncode:
        return {}, answer.stderr.strip().splitlines()[-1].removeprefix("slurm_load_jobs error: ")
    states: dict[str, JobState] = {}
    for line in answer.stdout.splitlines():
        job, array, task, state, reason, start, elapsed, limit, nodes, code, restarts, *_ = line.split("|")
        status = os.waitstatus_to_exitcode(int(code)) if code.isdigit() else 0
        name = f"{array}_{task}" if task != "N/A" else job
        exit_status = status if status >= 0 else 128 - status
        states[name] = JobState(state, reason, start, elapsed, limit, nodes, exit_status, int(restarts))
    return _query_accounting(ids - set(states), env) | states, ""


def _query_accounting(ids: set[str], env: Mapping[str, str]) -> dict[str, JobState]:
    """The state of each job that ``sacct`` knows, where there is accounting."""
    if not ids or not _has_command("sacct", env):
        return {}
    jobs = ",".join(sorted({id_.partition("_")[0] for id_ in ids}))
    fields = "JobID,State,Reason,Start,Elapsed,Timelimit,NodeList,ExitCode"
    command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={jobs}", f"--format={fields}"]
    states: dict[str, JobState] = {}
    for line in query_slurm(command, env).stdout.splitlines():
        job, state, reason, start, elapsed, limit, nodes, code = line.split("|")
        status, _, signal = code.partition(":")
        exit_status = int(status) or (128 + int(signal) if signal and int(signal) else 0)
        states[job] = JobState(state.split()[0], reason, start, elapsed, limit, nodes, exit_status)
    return states


def cancel_steps(job: str, env: Mapping[str, str]) -> None:
    """Cancel the ranks that outlive a killed srun, so that they do not train beside those of the next attempt."""
    own = f"{job}.{env.get('SLURM_STEP_ID', '')}"
    deadline = time.monotonic() + SLURM_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        answer = query_slurm(["squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%i"], env)
        left = [step for step in answer.stdout.split() if step.rpartition(".")[2].isdigit() and step != own]
        if answer.returncode == 0 and not left:
            return
        if left:
            query_slurm(["scancel", *left], env)
        time.sleep(0.5)


def allocation_end(job: str, env: Mapping[str, str]) -> int:
    """When the allocation of a job ends, in seconds since 1970; 0 if it has no end."""
    answer = query_slurm(["squeue", "--all", "--noheader", f"--jobs={job}", "--Format=EndTime"], env)
    try:
        return int(time.mktime(time.strptime(answer.stdout.strip(), "%Y-%m-%dT%H:%M:%S")))
    except ValueError:
        return 0


def is_preempted(job: str, env: Mapping[str, str]) -> bool:
    """Whether Slurm has begun to preempt the job."""
    answer = query_slurm(["scontrol", "--oneliner", "show", "job", job], env)
    return re.search(r" PreemptTime=(?!None)\S", answer.stdout) is not None
