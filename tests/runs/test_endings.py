"""Why an attempt has ended, from what srun says. Text alone."""

import pytest

from lockstep.runs.endings import has_known_cause, killed_task
from lockstep.runs.failure import Failure

KILLED = """srun: error: n1: task 0: Killed
srun: error: n4: task 3: Exited with exit code 1
srun: error: n2: task 1: Exited with exit code 1
"""
RAISED = "srun: error: n2: task 1: Exited with exit code 1\nsrun: error: n1: task 0: Killed\n"
OVER = "slurmstepd: error: Detected 1 oom_kill event in StepId=10.0. Some of the step tasks have been OOM Killed.\n" + KILLED


def test_who_was_killed_is_named() -> None:
    assert killed_task(KILLED).startswith("rank 0 on n1: Killed")
    assert killed_task(OVER).startswith("Slurm says: ")


@pytest.mark.parametrize(
    ("text", "failure", "told"),
    [
        (KILLED, None, False),  # may come ten times in a row
        (RAISED, Failure(1, 4, 1, "n2", "ValueError: no"), True),
        (KILLED.replace("Killed", "Segmentation fault"), None, True),
        (OVER, None, True),
        ("srun: error: n4: task 3: Exited with exit code 1\n", None, True),
        ("", None, False),
    ],
)
def test_a_kill_from_outside_tells_nothing(text: str, failure: Failure | None, told: bool) -> None:
    assert has_known_cause(text, failure) is told
