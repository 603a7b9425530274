"""From a request to a job in Slurm's queue: asking whether it would run, and ``sbatch``, through submitit.

No torch here: the launcher uses this room.
"""

import re
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence

from submitit.core.utils import FailedJobError, FailedSubmissionError

from lockstep.core import UsageError
from lockstep.slurm import TrainTask, query_slurm
from lockstep.slurm.submission.batch_script import JobRequest, batch_script, make_executor
from lockstep.slurm.submission.partitions import (
    check_time_limit,
    explain_rejection,
    fits_when_all_nodes_are_up,
    query_partitions,
)

_INHERITED_VARIABLES = re.compile(
    r"(SLURM_(?!CONF$)|SBATCH_|SRUN_|SALLOC_|SUBMITIT_|PMI|TORCHELASTIC_|LOCKSTEP_(?!PROFILE$)|GOMP_CPU_AFFINITY$|KMP_AFFINITY$"
    r"|OMP_PROC_BIND$|OMP_PLACES$|RANK$|WORLD_SIZE$|LOCAL_RANK$|LOCAL_WORLD_SIZE$|GROUP_RANK$|MASTER_ADDR$|MASTER_PORT$"
    r"|CUDA_VISIBLE_DEVICES$|ROCR_VISIBLE_DEVICES$|GPU_DEVICE_ORDINAL$)"
)
"""Variables of the shell that belong to the job it runs in, not to the one that is submitted."""


_PATIENCE_SECONDS = 60.0
"""How long a Slurm that does not answer is asked again."""


def scrub_environment(env: MutableMapping[str, str]) -> list[str]:
    """Take out of ``env`` what an enclosing job has left there, and return the names; ``SLURM_CONF`` stays."""
    names = [name for name in env if _INHERITED_VARIABLES.match(name)]
    for name in names:
        del env[name]
    return names


def check_schedulable(request: JobRequest, env: Mapping[str, str]) -> None:
    """Ask Slurm whether it would ever run this.

    Raises:
        UsageError: It would not; Slurm's own words, and what they mean for these resources.
    """
    # --test-only looks at nodes that are up, a submission at all of them: during maintenance it would refuse what can wait.
    patience = _RetryWhileSilent()
    while True:
        answer = subprocess.run(
            ["sbatch", "--test-only"],
            input=batch_script(request),
            env={**env, "SBATCH_JOB_NAME": request.name},
            capture_output=True,
            text=True,
        )
        if not (answer.returncode and patience.lasts(answer.stderr)):
            break
    if answer.returncode:
        partitions = query_partitions(env)
        if not ("node configuration is not available" in answer.stderr and fits_when_all_nodes_are_up(request, partitions)):
            raise UsageError(explain_rejection(answer.stderr, request, partitions))
    profile = request.profile
    if profile.minutes is not None and not profile.qos and not _argument_names(profile.sbatch) & {"qos", "partition", "time"}:
        check_time_limit(request, profile.minutes, query_partitions(env))


def check_dependency(job: str, env: Mapping[str, str]) -> None:
    """Raise UsageError unless ``job`` waits, runs, or has just ended well: of any other Slurm would make no condition."""
    command = ["squeue", "--all", "--array", "--states=all", "--noheader", f"--jobs={job}", "--Format=State"]
    answer = query_slurm(command, env)
    states = set(answer.stdout.split())
    if not states:
        raise UsageError(f"--after: Slurm does not know job {job}, or has forgotten it; if it ended well, leave --after out.")
    if bad := states - {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "COMPLETED"}:
        raise UsageError(f"--after: job {job} has not ended well ({', '.join(sorted(bad))}), so this one would never start.")


def submit_job(request: JobRequest, jobs: Sequence[TrainTask], env: MutableMapping[str, str]) -> str:
    """Queue ``jobs``, one per run, with one call of ``sbatch``, and return the job's id.

    Raises:
        UsageError: Slurm does not take it; nothing is queued.
    """
    executor = make_executor(request)
    (request.folder / "slurm").mkdir(mode=0o700, exist_ok=True)
    # Not in the script, where a line break in a name would begin a new line.
    env["SBATCH_JOB_NAME"] = request.name
    patience = _RetryWhileSilent()
    try:
        while True:
            try:
                if len(jobs) == 1:
                    return str(executor.submit(jobs[0]).job_id)
                with executor.batch():
                    queued = [executor.submit(job) for job in jobs]
                return str(queued[0].job_id).partition("_")[0]
            except (FailedJobError, FailedSubmissionError) as error:
                if not patience.lasts(str(error)):
                    raise UsageError(explain_rejection(str(error), request, query_partitions(env))) from None
                _cancel_unconfirmed(request, env)
    finally:
        del env["SBATCH_JOB_NAME"]


def _cancel_unconfirmed(request: JobRequest, env: Mapping[str, str]) -> None:
    """Cancel a job that Slurm has taken without being able to say so, and remove what was made for it."""
    slurm = request.folder / "slurm"
    command = ["squeue", "--me", "--noheader", "--Format=ArrayJobID:|,Command:|"]
    patience = _RetryWhileSilent()
    while (answer := query_slurm(command, env)).returncode:
        if not patience.lasts(answer.stderr):
            break
    for line in answer.stdout.splitlines():
        job, script, *_ = line.split("|")
        if script.startswith(f"{slurm}/.submission_file"):
            subprocess.run(["scancel", job.strip()], env=dict(env), capture_output=True)
    for left in (*slurm.glob(".submission_file_*.sh"), *slurm.glob("*.pkl")):
        if not left.name.endswith("_submitted.pkl"):
            left.unlink()


class _RetryWhileSilent:
    """Slurm that does not answer is asked again, for a while: its controller may be restarted."""

    _SILENT = re.compile(r"(?i)unable to contact|connect failure|connection refused|timed out|zero bytes")

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._run_arguments = False

    def lasts(self, said: str) -> bool:
        """Whether to ask again after Slurm's commands have ``said`` that; waits a moment."""
        # A controller that has just come back does not know its nodes yet.
        is_new = self._run_arguments and "node configuration is not available" in said
        if not (self._SILENT.search(said) or is_new) or time.monotonic() > self._began + _PATIENCE_SECONDS:
            return False
        if not self._run_arguments:
            print(f"Slurm does not answer; it is asked again for {_PATIENCE_SECONDS:.0f} s.", file=sys.stderr, flush=True)
            self._run_arguments = True
        time.sleep(1)
        return True


def _argument_names(arguments: Sequence[str]) -> set[str]:
    return {argument[2:].partition("=")[0] for argument in arguments}
