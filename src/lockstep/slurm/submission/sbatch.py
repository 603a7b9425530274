"""Check with Slurm that it would run a job, and submit the job with ``sbatch``, through submitit."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress

from lockstep.compat.submitit import SUBMISSION_ERRORS
from lockstep.core import UsageError, count
from lockstep.runs import TERMINAL_STATES
from lockstep.slurm import (
    QUEUED_SCRIPTS,
    STATES_OF_JOB,
    Condition,
    Dependency,
    NodeTask,
    accounted_states,
    find_job,
    is_unanswered,
    is_unknown_job,
    lacks_nodes,
    parse_scripts,
    query_partitions,
    query_slurm,
    start_query,
)
from lockstep.slurm.submission import limits, partitions
from lockstep.slurm.submission.associations import SHOW_CONFIG, Accounting
from lockstep.slurm.submission.batch_script import PASSED_PREFIX, JobRequest, batch_script, make_executor

_INHERITED_VARIABLES = re.compile(
    r"(SLURM_(?!CONF$)|SBATCH_|SRUN_|SALLOC_|SUBMITIT_|PMI|WANDB_SERVICE$|TORCHELASTIC_|LOCKSTEP_(?!PROFILE$)|GOMP_CPU_AFFINITY$|KMP_AFFINITY$"
    r"|OMP_PROC_BIND$|OMP_PLACES$|RANK$|WORLD_SIZE$|LOCAL_RANK$|LOCAL_WORLD_SIZE$|GROUP_RANK$|MASTER_ADDR$|MASTER_PORT$"
    r"|CUDA_VISIBLE_DEVICES$|ROCR_VISIBLE_DEVICES$|GPU_DEVICE_ORDINAL$)"
)
"""Variables that an enclosing job has set in the shell; the new job must not inherit them."""

_RETRY_SECONDS = 60.0
"""How long to retry a command of Slurm while its controller does not answer: it may be restarting."""


def scrub_environment(env: MutableMapping[str, str]) -> list[str]:
    """Remove the variables of an enclosing job from ``env`` and return their names; ``SLURM_CONF`` stays."""
    names = [name for name in env if _INHERITED_VARIABLES.match(name)]
    for name in names:
        del env[name]
    return names


class Trial:
    """A job that Slurm is asked to judge, while this process does something else; a context manager.

    It judges the resources only, so it can be asked before the config has been checked.
    """

    def __init__(self, request: JobRequest, env: Mapping[str, str]) -> None:
        self._script, self._env = batch_script(request), {**env, "SBATCH_JOB_NAME": request.name}
        self._config = start_query(SHOW_CONFIG, env)
        self._sbatch: subprocess.Popen[str] | None = self._start()

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *_: object) -> None:
        for process in filter(None, (self._sbatch, self._config)):
            with process:
                process.kill()  # its answer is not needed any more

    def judge(self) -> "tuple[subprocess.CompletedProcess[str], Accounting]":
        """The answer of ``sbatch --test-only``, and what slurmctld says about accounting."""
        answer = _with_retries(self._ask)
        shown = self._config.communicate()[0] or query_slurm(SHOW_CONFIG, self._env).stdout  # it may have been down at first
        return answer, Accounting.parse(shown, self._env)

    def _ask(self) -> "subprocess.CompletedProcess[str]":
        sbatch, self._sbatch = self._sbatch or self._start(), None
        output, errors = sbatch.communicate()
        return subprocess.CompletedProcess(sbatch.args, sbatch.returncode, output, errors)

    def _start(self) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        sbatch = subprocess.Popen(["sbatch", "--test-only"], env=self._env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert sbatch.stdin is not None
        with suppress(BrokenPipeError), sbatch.stdin as script:
            script.write(self._script)
        sbatch.stdin = None  # communicate() would write to it
        return sbatch


def check_schedulable(request: JobRequest, env: Mapping[str, str], trial: Trial | None = None) -> None:
    """Raise UsageError if Slurm would reject this job, with Slurm's reason, the requested and the available resources.

    Print a note about each limit that makes the job wait for other jobs. The ``trial`` has the same resources.
    """
    with trial or Trial(request, env) as asked:
        answer, accounting = asked.judge()
    if answer.returncode:
        limits.explain_policy(answer.stderr, request, accounting)
        # Unlike a submission, --test-only considers only nodes that are up: during maintenance it rejects jobs that can wait.
        found = query_partitions(env)
        if not (lacks_nodes(answer.stderr) and partitions.fits_when_all_nodes_are_up(request, found)):
            raise UsageError(partitions.explain_rejection(answer.stderr, request, found))
    profile = request.profile
    flags = {argument[2:].partition("=")[0] for argument in profile.sbatch}
    if profile.minutes is not None and not profile.qos and not flags & {"qos", "partition", "time"}:
        partitions.check_time_limit(request, profile.minutes, query_partitions(env))
    for note in limits.check_limits(request, accounting):
        print(note, file=sys.stderr)


def check_dependency(dependency: Dependency, runs: int, env: Mapping[str, str]) -> None:
    """Raise UsageError if Slurm would ignore a condition, or could never start the job of ``runs`` runs.

    Slurm accepts a condition on an unknown job, ignores it, and starts the new job at once.
    """
    problems = [_problem(condition, runs, env) for condition in dependency.conditions]
    if any(problems) if not dependency.is_any else all(problems):
        raise UsageError(f"--after: {next(filter(None, problems))}: this job would never start.")


def _problem(condition: Condition, runs: int, env: Mapping[str, str]) -> str:
    """Why a condition can never hold; empty if it can. Raises UsageError for an unknown job."""
    for job in condition.ids:
        states = _states(job, env)
        if not states:
            raise UsageError(
                f"--after: Slurm does not know job {job}, or has forgotten it; leave it out if it ended as {condition} expects."
            )
        failed = {state for state in states if state in TERMINAL_STATES and state != "COMPLETED"}
        if (failed and condition.kind == "afterok") or (failed == states and condition.kind == "aftercorr"):
            return f"job {job} did not finish successfully ({', '.join(sorted(failed))})"
        if states == {"COMPLETED"} and condition.kind == "afternotok":
            return f"job {job} has finished successfully"
        if condition.kind == "aftercorr" and (why := _missing_counterparts(job, runs, env)):
            return why
    return ""


def _states(job: str, env: Mapping[str, str]) -> set[str]:
    """The states of a job, or of the tasks of an array; empty if Slurm does not know it."""
    answer = _with_retries(lambda: query_slurm([*STATES_OF_JOB, f"--jobs={job}"], env))
    if answer.returncode and not is_unknown_job(answer.stderr):
        raise UsageError(f"--after: Slurm does not say whether job {job} exists: {' '.join(answer.stderr.split())}")
    return set(answer.stdout.split()) or accounted_states(job, env)


def _missing_counterparts(job: str, runs: int, env: Mapping[str, str]) -> str:
    """Why some runs of a sweep have no run of the same number in ``job``; empty if all have one, or if that is unknown."""
    if runs == 1:
        return "aftercorr pairs the runs of two sweeps, and this is not a sweep; use afterok"
    with suppress(UsageError):  # not a job of lockstep
        other = find_job(job, env)
        if other.runs < runs:
            return f"aftercorr pairs the runs of two sweeps, and job {job} has only {count(other.runs, 'run')} for {runs}"
    return ""


def submit_job(request: JobRequest, tasks: Sequence[NodeTask], env: MutableMapping[str, str]) -> str:
    """Submit ``tasks``, one per run, with one ``sbatch``, and return the job id; after a UsageError nothing is queued."""
    executor = make_executor(request)
    (request.folder / "slurm").mkdir(mode=0o700, exist_ok=True)
    # Not in the script, where a line break in a name would begin a new line.
    added = {f"{PASSED_PREFIX}{name}": value for name, value in request.profile.environment.items()}
    added["SBATCH_JOB_NAME"] = request.name
    env.update(added)
    retries = _Retries()
    try:
        while True:
            try:
                if len(tasks) == 1:
                    return str(executor.submit(tasks[0]).job_id)
                with executor.batch():
                    jobs = [executor.submit(task) for task in tasks]
                return str(jobs[0].job_id).partition("_")[0]
            except SUBMISSION_ERRORS as error:
                will_retry = retries.wait_after(str(error))
                is_clean = not (will_retry or is_unanswered(str(error))) or _cancel_unconfirmed(request, env, retries)
                if not will_retry:
                    why = partitions.explain_rejection(str(error), request, query_partitions(env))
                    raise UsageError(why if is_clean else f"{why} It may be queued nevertheless: see squeue --me.") from None
    finally:
        for name in added:
            del env[name]


def release_job(job: str, env: Mapping[str, str]) -> None:
    """Let a held job start; raise UsageError if Slurm does not."""
    answer = _with_retries(lambda: query_slurm(["scontrol", "release", job], env))
    if answer.returncode:
        raise UsageError(f"job {job} cannot be released: {' '.join(answer.stderr.split())}")


def _cancel_unconfirmed(request: JobRequest, env: Mapping[str, str], retries: "_Retries") -> bool:
    """Cancel a job that Slurm queued although ``sbatch`` failed, and remove its files; return whether Slurm has answered."""
    slurm = request.folder / "slurm"
    answer = _with_retries(lambda: query_slurm([*QUEUED_SCRIPTS], env), retries)
    for job, script in parse_scripts(answer.stdout).items():
        if script.startswith(f"{slurm}/.submission_file"):
            subprocess.run(["scancel", job], env=dict(env), capture_output=True)
    for path in (*slurm.glob(".submission_file_*.sh"), *slurm.glob("*.pkl")):
        if not path.name.endswith("_submitted.pkl"):
            path.unlink()
    return not answer.returncode


def _with_retries(
    run: "Callable[[], subprocess.CompletedProcess[str]]", retries: "_Retries | None" = None
) -> "subprocess.CompletedProcess[str]":
    retries = retries or _Retries()
    while True:
        answer = run()
        if not (answer.returncode and retries.wait_after(answer.stderr)):
            return answer


class _Retries:
    """Retries of a command of Slurm while its controller does not answer."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + _RETRY_SECONDS
        self._has_retried = False

    def wait_after(self, error: str) -> bool:
        """Return whether to retry a command that failed with ``error``, after waiting for a second."""
        # Right after its restart a controller does not know its nodes yet.
        has_restarted = self._has_retried and lacks_nodes(error)
        if not (is_unanswered(error) or has_restarted) or time.monotonic() > self._deadline:
            return False
        if not self._has_retried:
            print(f"Slurm does not answer; retrying for {_RETRY_SECONDS:.0f} s.", file=sys.stderr, flush=True)
            self._has_retried = True
        time.sleep(1)
        return True
