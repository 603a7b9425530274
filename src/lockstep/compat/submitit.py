"""Private names of submitit: the batch script of a job, pickled tasks, and the errors of a submission."""

from pathlib import Path
from typing import Any

from submitit import SlurmExecutor

from lockstep.compat import private, private_imports

with private_imports("submitit"):
    from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError

SUBMISSION_ERRORS = (FailedJobError, FailedSubmissionError)
"""Raised if ``sbatch`` rejects a job, or prints anything but a job id."""


class ScriptExecutor(SlurmExecutor):
    """A Slurm executor that also writes batch scripts where Slurm is not installed: ``--dry-run`` works on a laptop."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def batch_script_text(executor: ScriptExecutor, runs: int) -> str:
    """Return the script that ``executor`` would submit for a job, or for an array if ``runs`` is more than one."""
    if runs > 1:
        executor.parameters["map_count"] = runs
    command = private("submitit", executor, "_submitit_command_str")
    return str(private("submitit", executor, "_make_submission_file_text")(command, ""))


def load_task(path: Path) -> Any:
    """Return the callable in ``path``, one of the ``<job>_submitted.pkl`` that an executor writes."""
    return DelayedSubmission.load(path).function
