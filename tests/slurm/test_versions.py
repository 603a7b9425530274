"""What the commands of each version of Slurm print, as ``support.golden_slurm`` has recorded it, and what the client reads."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
from support.golden_slurm import GOLDEN, JOBS_OF_SCENARIO

from lockstep.runs import Evidence, classify_ending, endings
from lockstep.slurm import dependencies
from lockstep.slurm.accounting import parse_accounting
from lockstep.slurm.client import (
    is_unanswered,
    is_unknown_job,
    lacks_nodes,
    parse_jobs,
    parse_node_states,
    parse_partitions,
    parse_rejection,
    parse_running_jobs,
    parse_scripts,
)
from lockstep.slurm.submission.associations import Accounting
from lockstep.slurm.submission.batch_script import _SUPERVISED_SRUN

VERSIONS = ("22.05", "24.11")
NAMES = {str(number): name for number, name in enumerate(JOBS_OF_SCENARIO, 1)}


@dataclass(frozen=True)
class Printed:
    """What the commands of a version have printed, by the names of their files."""

    version: str

    def __call__(self, name: str) -> str:
        return (GOLDEN / self.version / f"{name}.txt").read_text()


@pytest.fixture(params=VERSIONS)
def printed(request: pytest.FixtureRequest) -> Printed:
    """Each version."""
    return Printed(request.param)


def named(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with names of jobs instead of their ids."""
    return {re.sub(r"^\d+", lambda number: NAMES[number[0]], job): value for job, value in values.items()}


WAITING = {
    "held": ("PENDING", "JobHeldUser", 0, 0, ""),
    "dependency": ("PENDING", "Dependency", 0, 0, "afterok:2"),
    "never": ("PENDING", "DependencyNeverSatisfied", 0, 0, "afterok:9"),
    "array_3": ("PENDING", "JobArrayTaskLimit", 0, 0, ""),
}
ENDED = {
    "never-cancelled": ("CANCELLED", "DependencyNeverSatisfied", 0, 0, "afterok:9"),
    "cancelled": ("CANCELLED", "None", 143, 0, ""),
    "completed": ("COMPLETED", "None", 0, 0, ""),
    "failed": ("FAILED", "NonZeroExitCode", 3, 0, ""),
    "task-killed": ("FAILED", "NonZeroExitCode", 137, 0, ""),
    "task-exited": ("FAILED", "NonZeroExitCode", 7, 0, ""),
    "task-missing": ("FAILED", "NonZeroExitCode", 2, 0, ""),
    "array_0": ("FAILED", "NonZeroExitCode", 1, 0, ""),
}
RUNNING = ("RUNNING", "None", 0, 0, "")
DIFFERENT: dict[str, dict[str, Any]] = {
    "22.05": {"killed": ("FAILED", "JobLaunchFailure", 137, 0, ""), "node-failed": ("NODE_FAIL", "NodeDown", 0, 0, "")},
    "24.11": {"killed": ("FAILED", "RaisedSignal:9(Killed)", 137, 0, ""), "node-failed": ("NODE_FAIL", "NodeDown", 129, 0, "")},
}
"""States that differ between the versions; lockstep does not read the parts that differ."""


def test_the_states_of_all_jobs(printed: Printed) -> None:
    def states(text: str) -> dict[str, Any]:
        jobs = named(parse_jobs(text))
        return {name: (job.state, job.reason, job.exit_status, job.restarts, job.dependency) for name, job in jobs.items()}

    busy = states(printed("squeue-jobs-busy"))
    running = dict.fromkeys(("timeout", "running", "node-failed", "array_1", "array_2", "preempted"), RUNNING)
    assert busy == WAITING | ENDED | running | {
        "completing": ("COMPLETING", "None", 0, 0, ""),
        "requeued": ("PENDING", "BeginTime", 0, 1, ""),
        "preempting": ("PENDING", "Resources", 0, 0, ""),
        "killed": DIFFERENT[printed.version]["killed"],
    }
    ended = states(printed("squeue-jobs-ended"))
    running = dict.fromkeys(("running", "array_1", "array_2"), RUNNING)
    assert (
        ended
        == WAITING
        | ENDED
        | running
        | {
            "completing": ("CANCELLED", "None", 137, 0, ""),
            "requeued": ("RUNNING", "None", 0, 1, ""),
            "preempted": ("RUNNING", "None", 0, 1, ""),
            "preempting": ("COMPLETED", "None", 0, 0, ""),
            "timeout": ("TIMEOUT", "TimeLimit", 143, 0, ""),
        }
        | DIFFERENT[printed.version]
    )
    shown = parse_jobs(printed("squeue-jobs-ended"))["1"]
    assert (shown.limit, shown.nodes) == ("1:00", "n1") and re.fullmatch(r"2\d{3}-\d\d-\d\dT[\d:]{8}", shown.start)
    assert re.fullmatch(r"1:\d\d", shown.elapsed)


def test_the_states_that_accounting_has(printed: Printed) -> None:
    found = named(parse_accounting(printed("sacct")))
    assert {name: (job.state, job.restarts) for name, job in found.items()} == {
        **dict.fromkeys(("held", "dependency", "never", "array_3"), ("PENDING", 0)),
        **dict.fromkeys(("running", "array_1", "array_2"), ("RUNNING", 0)),
        **dict.fromkeys(("requeued", "preempted"), ("RUNNING", 1)),
        **dict.fromkeys(("completed", "preempting"), ("COMPLETED", 0)),
        **dict.fromkeys(("failed", "killed", "task-killed", "task-exited", "task-missing", "array_0"), ("FAILED", 0)),
        **dict.fromkeys(("completing", "cancelled", "never-cancelled"), ("CANCELLED", 0)),
        **{"timeout": ("TIMEOUT", 0), "node-failed": ("NODE_FAIL", 0)},
    }
    assert [name for name, job in found.items() if job.reason == "DependencyNeverSatisfied"] == ["never-cancelled"]
    assert {name: found[name].exit_status for name in ("failed", "killed", "task-exited", "task-missing", "array_0")} == {
        **{"failed": 3, "killed": 137, "task-exited": 7, "task-missing": 2, "array_0": 1}
    }
    assert found["timeout"].limit == "00:01:00" and found["node-failed"].nodes == "n3"


def test_what_slurmctld_says_about_accounting(printed: Printed) -> None:
    accounting = Accounting.parse(printed("scontrol-config"), {})
    assert accounting.enforced == {"associations", "limits", "qos"} and accounting.cluster.startswith("lockstep-")


def test_running_jobs(printed: Printed) -> None:
    jobs = named(parse_running_jobs(printed("squeue-running")))
    assert set(jobs) == {"timeout", "running", "node-failed", "array_1", "array_2", "preempted"}
    assert {name for name, job in jobs.items() if job.is_preempted} == {"preempted"}
    assert jobs["timeout"].end - jobs["preempted"].end < 60 and all(job.restarts == 0 for job in jobs.values())


def test_scripts_steps_and_single_jobs(printed: Printed) -> None:
    scripts = named(parse_scripts(printed("squeue-scripts")))
    assert scripts and all(script == f"/tmp/lockstep-golden/{name}.sh" for name, script in scripts.items())
    (pattern,) = re.findall(r"\[\[ \$step =~ (\S+) \]\]", _SUPERVISED_SRUN)
    assert [step for step in printed("squeue-steps").split() if re.search(pattern, step)] == ["4.0"]
    assert set(printed("squeue-states").split()) == {"FAILED", "PENDING", "RUNNING"}
    assert is_unknown_job(printed("squeue-unknown")) and not is_unanswered(printed("squeue-unknown"))
    assert is_unanswered(printed("squeue-no-answer")) and is_unanswered(printed("sbatch-no-answer"))


def test_partitions_and_nodes(printed: Printed) -> None:
    found = [part for part in parse_partitions(printed("sinfo")) if part.name == "short"]
    assert {(part.cpus, part.memory, part.gpus, part.time, part.is_default) for part in found} == {
        ("8", "64000", 4, "1:00", False)
    }
    assert sorted(part.state for part in found if part.is_unavailable) == ["down*", "drained"]
    assert {part.name for part in parse_partitions(printed("sinfo")) if part.is_default} == {"debug"}
    states = parse_node_states(printed("scontrol-node"))
    assert (states["n1"], states["n4"]) == ("mixed", "idle+drain") and states["n3"].split("+")[0] == "down"


def test_refusals_of_sbatch(printed: Printed) -> None:
    for what in ("nodes", "cpus", "gpus", "down-node"):
        text = printed(f"sbatch-{what}")
        assert lacks_nodes(text) and parse_rejection(text) == "Requested node configuration is not available"
    assert parse_rejection(printed("sbatch-partition")) == "Invalid partition name specified"
    assert parse_rejection(printed("sbatch-array-size")) == "Invalid job array specification"
    assert printed("sbatch-time").startswith("sbatch: Job ")  # which would never start: check_time_limit


def test_the_output_of_jobs_says_why_they_ended(printed: Printed) -> None:
    def lost(name: str) -> Any:
        return endings.killed_task(printed(f"output-{name}")) or endings.exited_task(printed(f"output-{name}"), None)

    assert not lost("task-killed").is_explained and lost("task-killed").sentence.startswith("the agent of n1: Killed")
    assert lost("task-exited").sentence == "the agent of n1 ended with exit status 7 and without a report."
    assert lost("task-missing").sentence == "Slurm says: execve(): /nope/python: No such file or directory."
    forgotten = Evidence(output=printed("output-timeout"), exit_status=143, is_forgotten=True)
    assert classify_ending(forgotten).state == "over its time limit"
    assert lost("cancelled") is None and dependencies.Dependency.of_squeue("(null)").describe() == ""
