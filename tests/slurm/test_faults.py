"""Jobs that fail on the one-machine cluster: the reason within seconds, the exit status, and no process left.

Cheapest first: jobs that never start, then ranks that train and fail.
"""

import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.faults import fault
from support.runs import REPO
from support.slurm_jobs import Job, Shell
from support.waiting import wait_until

pytestmark = pytest.mark.timeout(150)
SOON = 30.0
"""Seconds within which the truth must be told."""


ENDLESS = ("--config", "toy_model.yaml", "--trainer.max_epochs", "100000")


def toy_fault(action: str, rank: int = 1) -> list[str]:
    """Arguments for a fault at step 3 of every attempt; the file ``fault`` has the time of the newest."""
    return fault("fault", action, "fault_callbacks", hook="on_train_batch_start", step=3, rank=rank, repeat=True)


@pytest.fixture(scope="module", autouse=True)
def late(long_shell: Shell) -> Job:
    """A job that does not stop in time; it runs beside the other tests, as Slurm looks for such jobs every 30 seconds only."""
    stuck = toy_fault("sleep", rank=0)
    return long_shell.submit("--time", "1", "--nodelist", "n2", *ENDLESS, *stuck)


def told(job: Job) -> dict[str, Any]:
    """The status of a job that is about to end, which must be told soon; no process of it may be left."""
    status = job.wait(seconds=SOON)
    nothing_is_left(job)
    return status


def nothing_is_left(job: Job) -> None:
    """No node has a process of this job any more."""

    def left() -> list[int]:
        return [pid for pid in job.shell.cluster.job_processes() if job.id in jobs_of(pid)]

    wait_until(lambda: not left(), SOON, left)


def jobs_of(pid: int) -> list[str]:
    """Id of the job that a process belongs to, if it is still there."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    return [entry.partition("=")[2] for entry in entries if entry.startswith("SLURM_JOB_ID=")]


def test_a_job_that_waits_for_ever_says_what_for(shell: Shell) -> None:
    blocker = shell.submit("--sbatch=--hold", "--config", "toy_model.yaml")
    job = shell.submit("--after", blocker.id, "--config", "toy_model.yaml")
    status = job.wait("waiting")
    assert (status["exit"], status["slurm"]["reason"]) == (3, "Dependency")
    assert f"It waits for job {blocker.id} to finish successfully." in status["message"]
    held = blocker.status()
    assert held["exit"] == 3 and "because its user holds it" in held["message"]
    command = [sys.executable, str(REPO / "launch/jobs.py"), "logs", "-f", blocker.id]
    following = subprocess.Popen(command, env=shell.env, stdout=subprocess.PIPE, text=True)
    assert following.stdout is not None and "waiting" in following.stdout.readline()
    following.send_signal(signal.SIGINT)  # Ctrl-C
    rest = following.communicate(timeout=20)[0]
    assert following.returncode == 130 and f"job {blocker.id} continues; to follow it: " in rest
    assert shlex.split(rest.partition("to follow it: ")[2])[-4:] == command[1:]
    assert blocker.status()["exit"] == 3
    shell("launch/jobs.py", "cancel", blocker.id)
    assert told(blocker)["exit"] == 4
    status = told(job)
    assert (status["exit"], status["state"]) == (4, "cancelled")


def followed(job: Job) -> "subprocess.CompletedProcess[str]":
    """``logs -f`` until the end, which must be told soon after the fault."""
    done = job.shell("launch/jobs.py", "logs", "-f", job.id)
    began = (job.shell.project / "fault").stat().st_mtime
    assert time.time() - began < SOON, done.stdout
    return done


def test_a_raised_exception_is_told_with_its_rank_and_traceback(shell: Shell) -> None:
    job = shell.submit("--nodes", "2", "--config", "toy_model.yaml", *toy_fault("raise"))
    shown = followed(job)
    assert shown.returncode == 1
    status = told(job)
    assert (status["exit"], status["state"]) == (1, "failed")
    assert "rank 1 (node 1," in status["message"] and "ValueError: injected fault" in status["message"]
    log = job.log()
    assert "rank 1 of 2 (node 1" in log and log.count("Traceback") == 1, log
    assert f"job {job.id}: failed." in shown.stdout and "Traceback" in shown.stdout
    assert "injected fault" in job.result["reason"]


def test_an_import_that_raises_in_the_agent_is_told_and_not_repeated(shell: Shell) -> None:
    lines = (
        "raise RuntimeError('set MY_VARIABLE')",
        "from lightning.pytorch import LightningModule as M",
        "class Model(M): ...",
    )
    (shell.project / "raises.py").write_text("\n".join(lines))
    job = shell.submit("--nodes", "2", "--config", "toy_model.yaml", "--model", "raises.Model")
    status = job.wait()
    assert (status["exit"], status["attempt"]) == (2, 1)
    assert re.search(r"RuntimeError: set MY_VARIABLE \(.*raises\.py, line 1\)", status["message"]), status["message"]


def test_a_killed_rank_is_told(shell: Shell) -> None:
    job = shell.submit("--nodes", "2", "--config", "toy_model.yaml", *toy_fault("SIGKILL"), "--run.max_restarts", "0")
    shown = followed(job)
    status = told(job)
    assert (shown.returncode, status["exit"], status["state"]) == (1, 1, "failed")
    assert "rank 1 (node 1, n2): The process was killed by SIGKILL." in status["message"]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("leave", "rank 1 (node 1, n2): The process exited with status 9 and without a report."),
        ("exit", "The run was ended by sys.exit('there are no data')."),
    ],
)
def test_a_rank_that_leaves_by_itself_is_told(shell: Shell, action: str, message: str) -> None:
    job = shell.submit("--nodes", "2", "--config", "toy_model.yaml", *toy_fault(action))
    shown = followed(job)
    status = told(job)
    assert (shown.returncode, status["exit"], status["state"]) == (1, 1, "failed"), status
    assert message in str(status["message"])


def test_a_rank_that_eats_too_much_memory_is_told(shell: Shell) -> None:
    job = shell.submit("--nodes", "2", "--mem", "2G", "--config", "toy_model.yaml", *toy_fault("allocate"))
    shown = followed(job)
    status = told(job)
    assert (shown.returncode, status["exit"], status["state"]) == (6, 6, "out of memory"), status
    assert "--mem" in str(status["message"])


def test_cancelled_and_lost_node(shell: Shell) -> None:
    cancelled = shell.submit(*ENDLESS)
    lost = shell.submit("--nodes", "2", "--nodelist", "n3,n4", *ENDLESS)
    for job in (cancelled, lost):
        job.wait_for_step(1)
    assert shell("launch/jobs.py", "cancel", cancelled.id).returncode == 0
    status = cancelled.wait(seconds=SOON)
    assert (status["exit"], status["state"]) == (4, "cancelled")
    nothing_is_left(cancelled)
    assert (cancelled.folder / "slurm" / f"{cancelled.id}.exit").read_text() == "143\n"
    shell.cluster.lose("n4")
    status = lost.wait("waiting", seconds=SOON)
    assert "for nodes that are down" in status["message"] or "for its start time" in status["message"]
    nothing_is_left(lost)
    shell.cluster.restore("n4")
    status = lost.wait("running", seconds=30)
    assert status["slurm"]["restarts"] == 1
    shell("launch/jobs.py", "cancel", lost.id)


def test_over_the_time_limit(late: Job) -> None:
    status = late.wait(seconds=100)
    assert (status["exit"], status["state"]) == (5, "over its time limit")
    assert "--time" in status["message"]
    nothing_is_left(late)


def test_a_job_whose_python_cannot_be_run_ends_at_once(shell: Shell) -> None:
    job = shell.submit("--config", "toy_model.yaml", "--python", "python-that-is-not-there")
    status = job.wait(seconds=30)
    assert (status["state"], status["exit"]) == ("failed", 1)
    assert "python: the interpreter of the job cannot be run on" in status["message"]
