"""Jobs that are killed, requeued or out of time end with the weights of an undisturbed job.

A short selection of the fault table, ``make faults``: first five jobs side by side, then one job on different nodes.
"""

import json

import pytest
from support.faults import fault
from support.slurm_jobs import Job, Shell
from support.waiting import wait_until

pytestmark = pytest.mark.timeout(200)  # jobs start several times

RUN = (
    *("--ranks-per-node", "2", "--cpus-per-rank", "1", "--config", "toy_model.yaml", "--trainer.max_epochs", "5"),
    *("--checkpoint.every_n_steps", "5", "--run.hang_timeout_seconds", "8", "--model.seconds"),
)
"""40 steps."""


def start(shell: Shell, node: str, seconds: float, *arguments: str) -> Job:
    """A run that anything may happen to."""
    return shell.submit(*RUN, str(seconds), "--nodelist", node, *arguments)


def once(action: str) -> list[str]:
    """Arguments for one fault on rank one after step 22."""
    return fault(action, action, "fault_callbacks", step=22, rank=1)


def test_whatever_happens_to_a_job_it_ends_with_the_same_weights(shell: Shell) -> None:
    late = start(shell, "n1", 1.3, "--time", "1")
    undisturbed, killed = start(shell, "n2", 0.1), start(shell, "n3", 0.1, *once("SIGKILL"))
    stopped, requeued = start(shell, "n4", 0.1, *once("SIGSTOP")), start(shell, "n2", 0.3)
    requeued.wait_for_step(12)
    shell.cluster.command("scontrol", "requeue", requeued.id)
    for job in (undisturbed, killed, stopped, requeued, late):
        status = job.wait(seconds=120)
        assert status["exit"] == 0, (status, job.log())
        assert job.result["weights_sha256"] == undisturbed.result["weights_sha256"]
        if job is not undisturbed:
            assert job.result["attempts"] > 1 and job.result["seconds"]["lost"] > 0
        assert len(job.status()["attempts"]) == job.result["attempts"] == 1 + len(job.result["reasons"])
        assert all(job.result["reasons"])
    (attempt, *_, last) = killed.status()["attempts"]
    assert "rank 1 (node 0, n3): The process was killed by SIGKILL." in attempt["reason"]
    assert (attempt["crashed"], last["reason"]) == (True, "")
    assert "rank 1 does not answer" in stopped.status()["attempts"][0]["reason"]
    (attempt, *_) = late.status()["attempts"]
    assert (attempt["reason"], attempt["crashed"]) == ("SIGUSR2", False) and attempt["step"] == attempt["saved_step"] > 5


def test_a_run_goes_on_with_more_or_fewer_nodes_and_never_twice_at_once(shell: Shell) -> None:
    job = shell.submit(*RUN, "0.3", "--ranks-per-node", "1", "--nodes", "1-2", "--exclude", "n1,n2")
    job.wait_for_step(7)
    twice = shell.submit("--resume", str(job.folder), "--nodes", "1", "--nodelist", "n1")
    status = twice.wait(seconds=60)
    assert status["exit"] == 2 and f"is being trained by job {job.id}; end that first" in status["message"]
    shell.cluster.command("scontrol", "update", "NodeName=n4", "State=DRAIN", "Reason=maintenance")
    try:
        shell.cluster.command("scontrol", "requeue", job.id)
        wait_until(lambda: json.loads((job.folder / "status.json").read_text())["world_size"] == 1, 60, job.log)
        shell("launch/jobs.py", "cancel", job.id)
    finally:
        shell.cluster.command("scontrol", "update", "NodeName=n4", "State=RESUME")
    job.wait("cancelled")
    again = shell.submit("--resume", str(job.folder), "--nodes", "2", "--nodelist", "n1,n2")
    assert again.wait(seconds=60)["exit"] == 0, again.log()
    assert (again.result["world_size"], again.result["attempts"], again.result["global_step"]) == (2, 3, 40)
