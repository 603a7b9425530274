"""Private names of submitit: the batch script of a job that is not submitted, pickled tasks, and the errors of a submission."""

from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core import utils

from lockstep.compat import private

SUBMISSION_ERRORS: tuple[type[Exception], ...] = (
    private("submitit", utils, "FailedJobError"),
    private("submitit", utils, "FailedSubmissionError"),
)
"""Raised where ``sbatch`` refuses a job, or prints something other than a job id."""

_DelayedSubmission = private("submitit", utils, "DelayedSubmission")
_make_script = private("submitit", SlurmExecutor, "_make_submission_file_text")
private("submitit", SlurmExecutor, "_submitit_command_str")


class ScriptExecutor(SlurmExecutor):
    """A Slurm executor that also writes batch scripts where Slurm is not installed: ``--dry-run`` works on a laptop."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def batch_script_text(executor: ScriptExecutor, runs: int) -> str:
    """Return the script that ``executor`` submits for a job, or for an array of more than one run."""
    if runs > 1:
        executor.parameters["map_count"] = runs
    return str(_make_script(executor, executor._submitit_command_str, ""))


def load_task(path: Path) -> Any:
    """Return the callable in ``path``, one of the ``<job>_submitted.pkl`` that an executor writes."""
    return _DelayedSubmission.load(path).function
