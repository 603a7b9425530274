"""The reason for the end of an attempt, from the output of srun as text."""

from dataclasses import replace

import pytest

from lockstep.core import World
from lockstep.runs.endings import LOST_AGENT, Evidence, JobState, classify_ending, killed_task
from lockstep.runs.failure import Failure
from lockstep.runs.records import RunResult

KILLED = """srun: error: n1: task 0: Killed
srun: error: n4: task 3: Exited with exit code 1
srun: error: n2: task 1: Exited with exit code 1
"""
RAISED = "srun: error: n2: task 1: Exited with exit code 1\nsrun: error: n1: task 0: Killed\n"
ALONE = f"srun: error: n1: task 0: Exited with exit code {LOST_AGENT}\n"
OVER = "slurmstepd: error: Detected 1 oom_kill event in StepId=10.0. Some of the step tasks have been OOM Killed.\n" + KILLED

FINISHED, STOPPED = RunResult("finished"), RunResult("interrupted", reason="SIGUSR2", exit_status=140)
CAUSE, LOST = Failure(1, 4, 1, "n2", "ValueError: no"), Failure(0, 4, 0, "n1", "RuntimeError: gloo", is_secondary=True)
GIVEN_UP = RunResult("failed", reason=f"It has failed 2 times in a row: {CAUSE.reason}")
LEFT = RunResult("failed", reason="25 attempts in a row: the agent of n1 has lost its connection to the agent of another node.")
KILLED_RANK = Failure(2, 4, 2, "n3", "The process was killed by SIGKILL.", is_killed=True)
HUNGRY = replace(KILLED_RANK, report="it had 2 GiB.", is_out_of_memory=True)
SIGNALLED = Failure(2, 4, 2, "n3", "it was ended by SIGTERM.", 143)


def test_who_was_killed_is_named() -> None:
    killed, over = killed_task(KILLED), killed_task(OVER)
    assert killed is not None and killed.sentence.startswith("the agent of n1: Killed") and not killed.is_explained
    assert over is not None and over.sentence.startswith("Slurm says: ") and over.is_out_of_memory
    assert killed_task("torch.OutOfMemoryError: CUDA error: out of memory\n") is None  # of a GPU


@pytest.mark.parametrize(
    ("text", "failure", "is_explained"),
    [
        (KILLED, None, False),  # may come ten times in a row
        (RAISED, Failure(1, 4, 1, "n2", "ValueError: no"), True),
        ("", KILLED_RANK, False),
        ("", replace(KILLED_RANK, is_killed=False), True),
        (KILLED.replace("Killed", "Segmentation fault"), None, True),
        (OVER, None, True),
        ("srun: error: n4: task 3: Exited with exit code 1\n", None, True),
        (ALONE, None, False),
        (ALONE + "srun: error: n4: task 3: Exited with exit code 1\n", None, True),
        ("", None, False),
    ],
)
def test_a_kill_from_outside_tells_nothing(text: str, failure: Failure | None, is_explained: bool) -> None:
    assert classify_ending(Evidence(failure=failure, output=text, exit_status=1)).is_explained is is_explained


@pytest.mark.parametrize(
    ("evidence", "state", "exit_status", "reason"),
    [
        (Evidence(FINISHED, LOST, KILLED, 0), "finished", 0, ""),
        (Evidence(FINISHED, job=JobState("TIMEOUT", limit="1:00")), "over its time limit", 5, "1:00"),
        (Evidence(None, CAUSE, KILLED, 1), "failed", 1, "rank 1 (node 1, n2): ValueError: no"),
        (Evidence(STOPPED, CAUSE, "", 1), "failed", 1, "ValueError: no"),
        (Evidence(GIVEN_UP, CAUSE, "", 1), "failed", 1, "It has failed 2 times in a row: rank 1 (node 1, n2): ValueError: no"),
        (Evidence(GIVEN_UP, HUNGRY, "", 1), "out of memory", 6, "it had 2 GiB."),
        (Evidence(LEFT, None, ALONE, 1), "failed", 1, "25 attempts in a row: the agent of n1 has lost"),
        (Evidence(None, LOST, OVER, 1), "out of memory", 6, "--mem"),
        (Evidence(None, None, "", 137, JobState("CANCELLED")), "cancelled", 4, ""),
        (Evidence(None, None, OVER, 137, JobState("CANCELLED")), "out of memory", 6, "oom_kill"),
        (Evidence(None, KILLED_RANK, "", 1), "failed", 1, "rank 2 (node 2, n3): The process was killed by SIGKILL."),
        (Evidence(None, replace(KILLED_RANK, is_out_of_memory=True), "", 1), "out of memory", 6, "--mem"),
        (Evidence(None, KILLED_RANK, OVER, 1), "out of memory", 6, "oom_kill"),
        (Evidence(None, HUNGRY, OVER, 1), "out of memory", 6, "--mem. rank 2 (node 2, n3): it had 2 GiB."),
        (
            Evidence(None, HUNGRY, OVER, 1, JobState("OUT_OF_MEMORY", memory="1.9G of 2G")),
            "out of memory",
            6,
            "it had 2 GiB. Acc",
        ),
        (
            Evidence(None, None, "", 1, JobState("OUT_OF_MEMORY", memory="1.9G of 2G")),
            "out of memory",
            6,
            "has seen 1.9G of 2G.",
        ),
        (Evidence(None, None, "", 1, JobState("PREEMPTED")), "preempted", 7, "not requeued"),
        (Evidence(STOPPED, None, KILLED, 137), "interrupted", 140, "SIGUSR2"),
        (Evidence(None, LOST, KILLED, 1), "failed", 1, "the agent of n1: Killed"),
        (
            Evidence(None, None, ALONE, LOST_AGENT),
            "failed",
            1,
            "the agent of n1 has lost its connection to the agent of another",
        ),
        (Evidence(None, None, ALONE + RAISED, LOST_AGENT), "failed", 1, "the agent of n2 ended with exit status 1"),
        (Evidence(None, None, RAISED, 1), "failed", 1, "the agent of n2 ended with exit status 1"),
        (Evidence(None, SIGNALLED, "", 143), "interrupted", 143, "SIGTERM"),
        (Evidence(None, LOST, "", 143), "interrupted", 1, "gloo"),
        (Evidence(None, None, "", 143), "interrupted", 143, "exit status 143"),
        (Evidence(None, None, "last words\n\n", 9), "failed", 1, "last words"),
        (Evidence(is_forgotten=True), "gone", 1, "forgotten"),
        (Evidence(is_forgotten=True, was_cancelled=True), "cancelled", 4, ""),
    ],
)
def test_the_strongest_evidence_decides(evidence: Evidence, state: str, exit_status: int, reason: str) -> None:
    ending = classify_ending(evidence)
    assert (ending.state, ending.exit_status) == (state, exit_status) and reason in ending.reason


def test_the_reason_is_the_whole_message_of_the_last_exception() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError:
            raise RuntimeError("Error(s) in loading state_dict for Net:\n\tsize mismatch for weight: " + "9" * 400) from None
    except RuntimeError as error:
        reason = Failure.from_exception(error, World()).reason
    assert reason.startswith("RuntimeError: Error(s) in loading state_dict for Net: size mismatch for weight: 999")
    assert len(reason) == 301 and reason.endswith("9…")
    worker = "Caught ValueError in DataLoader worker.\nOriginal Traceback (most recent call last):\n  File x\nValueError: b"
    assert Failure.from_exception(RuntimeError(worker), World()).reason == "ValueError: b"
    assert Failure.from_report("It hangs:\n  in x\nits stack is above.", World(1, 2)).reason.endswith(": its stack is above.")
