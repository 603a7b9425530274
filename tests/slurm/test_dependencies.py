"""``--after`` and what squeue shows of a dependency; without Slurm, but for a squeue that prints what the test says."""

from pathlib import Path

import pytest

from lockstep.core import UsageError
from lockstep.runs import Run
from lockstep.slurm import Dependency, SubmittedJob, find_job, register_job
from lockstep.slurm.submission.sbatch import check_dependency


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has submitted run 7, and the sweep 8 of three runs."""
    made = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    for job, runs in (("7", 1), ("8", 3)):
        register_job(SubmittedJob(job, Run.create(tmp_path / "runs", "x").folder, "x", runs, ""), made)
    return made


@pytest.mark.parametrize(
    ("typed", "sent", "words"),
    [
        ("12", "afterok:12", "job 12 to finish successfully"),
        ("12 13_1", "afterok:12:13_1", "jobs 12 and 13_1 to finish successfully"),
        ("afterok:1:2", "afterok:1:2", "jobs 1 and 2 to finish successfully"),
        ("afterany:1,afternotok:2", "afterany:1,afternotok:2", "job 1 to end, and for job 2 to fail"),
        ("afterany:1 afternotok:2", "afterany:1,afternotok:2", "job 1 to end, and for job 2 to fail"),
        ("after:1+10", "after:1+10", "the start of job 1, and 10 minutes more"),
        ("after:1+1", "after:1+1", "the start of job 1, and 1 minute more"),
        ("after:1:2", "after:1:2", "jobs 1 and 2 to start"),
        ("afterok:1:2?afterany:3", "afterok:1?afterok:2?afterany:3", None),
        ("aftercorr:8", "aftercorr:8", "the same run of job 8 to finish successfully"),
        ("singleton", "singleton", "your other jobs of this name to end"),
        ("RUN", "afterok:7", None),
        ("ID", "afterok:7", None),
        ("afterany:ID:12,singleton", "afterany:7:12,singleton", None),
    ],
)
def test_all_kinds_of_slurm_are_taken_and_described(env: dict[str, str], typed: str, sent: str, words: str | None) -> None:
    run = find_job("7", env).folder
    dependency = Dependency.parse(typed.replace("RUN", str(run)).replace("ID", run.name).split(), env)
    assert str(dependency) == sent
    shown = ("?" if dependency.is_any else ",").join(f"{part}(unfulfilled)" for part in str(dependency).split(","))
    assert Dependency.of_squeue(shown).describe() == dependency.describe()
    assert words in (None, dependency.describe())


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("tomorrow", "'tomorrow' is neither a job id nor a run that lockstep has submitted here; give job ids, run folders"),
        ("singletn", "'singletn' is neither a job id nor a run that lockstep has submitted here; did you mean 'singleton'"),
        ("afterokay:12", "'afterokay' in 'afterokay:12' is not a kind of dependency; did you mean 'afterok'"),
        ("12:13", "'12:13' does not say when: write afterok:12:13, or separate the jobs by spaces."),
        ("afterok", "'afterok' needs jobs, such as afterok:12 or afterok:12:13."),
        ("afterok:12:", "'afterok:12:' has an empty place where a job is expected"),
        ("afterok:12,", "'afterok:12,' has an empty place where a job is expected"),
        ("afterok:12+5", "'afterok:12+5': only after:JOB+MINUTES takes minutes; leave out +5."),
        ("singleton:12", "'singleton:12': singleton takes no jobs"),
        ("afterok:1?afterok:2,afterok:3", "mixes conditions that must all hold"),
        ("afterok:1?afterok:2 3", "mixes conditions that must all hold"),
        ("afterok:runs/gone", "'runs/gone' in 'afterok:runs/gone' is neither a job id nor a run"),
    ],
)
def test_a_damaged_dependency_is_one_sentence(env: dict[str, str], typed: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        Dependency.parse(typed.split(), env)
    assert error.value.message.startswith("--after: ") and message in error.value.message


@pytest.mark.parametrize(
    ("typed", "runs", "message"),
    [
        ("afterok:1:2", 1, ""),
        ("afterok:3", 1, "job 3 did not finish successfully (FAILED): this job would never start."),
        ("afterany:3", 1, ""),
        ("afternotok:3", 1, ""),
        ("afternotok:1", 1, "job 1 has finished successfully: this job would never start."),
        ("afterok:3?afterok:1", 1, ""),
        ("afterok:3?afternotok:1", 1, "job 3 did not finish successfully (FAILED)"),
        ("afterany:4", 1, "Slurm does not know job 4, or has forgotten it; leave it out if it ended as afterany:4 expects."),
        ("afterok:1?afterok:4", 1, "Slurm does not know job 4"),
        ("aftercorr:8", 3, ""),
        ("aftercorr:9", 3, ""),
        ("afterok:9", 1, "job 9 did not finish successfully (FAILED)"),
        ("aftercorr:3", 3, "job 3 did not finish successfully (FAILED)"),
        ("aftercorr:8", 1, "aftercorr pairs the runs of two sweeps, and this is not a sweep; use afterok"),
        ("aftercorr:8", 4, "and job 8 has only 3 runs for 4: this job would never start."),
        ("afterok:5", 1, "Slurm does not say whether job 5 exists: slurm_load_jobs error: Access denied"),
        ("singleton", 1, ""),
    ],
)
def test_a_condition_that_slurm_would_ignore_or_that_can_never_hold_is_refused(
    env: dict[str, str], tmp_path: Path, typed: str, runs: int, message: str
) -> None:
    (tmp_path / "squeue").write_text(
        """#!/bin/sh
for argument; do case $argument in
  --jobs=1) echo COMPLETED ;;
  --jobs=2 | --jobs=8) printf 'RUNNING\\nPENDING\\n' ;;
  --jobs=3) echo FAILED ;;
  --jobs=9) printf 'RUNNING\\nFAILED\\n' ;;
  --jobs=4) echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1 ;;
  --jobs=5) echo 'slurm_load_jobs error: Access denied' >&2; exit 1 ;;
esac; done
"""
    )
    (tmp_path / "squeue").chmod(0o755)
    try:
        check_dependency(Dependency.parse([typed], env), runs, env)
        said = ""
    except UsageError as error:
        said = error.message
    assert message in said and bool(message) == bool(said)
