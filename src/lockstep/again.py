"""What comes after the ranks of a Slurm job have ended: nothing, another start right here, or the queue.

The batch script asks, outside of srun. ``again begin`` prints the number of the attempt that may begin and when the allocation
ends. ``again end STATUS`` prints ``here`` (start again in this allocation), ``queue`` (wait for another one), or the exit
status of the job. Every end is noted in ``attempts.jsonl``. No torch here.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from submitit.core.utils import DelayedSubmission

from lockstep.disk import read_whole, write_whole
from lockstep.errors import SIGNALLED, LockstepError
from lockstep.failure import Attempt, attempts, first_failure, note
from lockstep.flags import asking
from lockstep.options import RunOptions
from lockstep.run import Run, update_status
from lockstep.squeue import holds
from lockstep.verdict import exit_words, is_told, last_words, output_of

HERE, QUEUE = "here", "queue"

_PATIENCE_SECONDS = 600.0
"""How long a Slurm that does not answer is waited for."""

_ALIKE = 2
"""So many ends in a row at the same step for the same reason are a bug, and no bad luck."""

_FRUITLESS = 25
"""So many starts in a row without a new checkpoint end a run, whatever they died of."""


def begin(run: Run, slurm: Path, env: Mapping[str, str]) -> int:
    """Claim the next attempt for this job and return its number.

    Raises:
        LockstepError: Another job has the run.
    """
    number = run.begin_attempt({"job": env["SLURM_JOB_ID"]}, lambda owner: holds(owner, env, _PATIENCE_SECONDS))
    output = slurm / f"{env['LOCKSTEP_JOB']}_0_log.out"
    begun = {"job": env["LOCKSTEP_JOB"], "time": time.time(), "output": output.stat().st_size if output.exists() else 0}
    write_whole(run.folder / "logs" / str(number) / "begun.json", begun)
    _note_the_silent(run, number)
    return number


def end(run: Run, slurm: Path, status: int, env: Mapping[str, str]) -> str | int:
    """Note how an attempt has ended, and say what comes next.

    Returns:
        0 if the run is finished, ``HERE``, ``QUEUE``, or the run's exit status.
    """
    number, job = run.newest_attempt, env["SLURM_JOB_ID"]
    result, failure = read_whole(run.result), first_failure(run, number)
    if result.get("attempts") != number and result.get("status") != "finished":
        result = {}  # of the attempt before
    finished = result.get("status") == "finished"
    interrupted = result.get("status") == "interrupted" or (failure is not None and failure.interrupted) or status in SIGNALLED
    output = output_of(run, slurm, env["LOCKSTEP_JOB"])
    said = last_words(output) or exit_words(output, failure)
    if failure is not None and not failure.echo and not failure.interrupted:
        reason, interrupted = failure.reason, False
    elif said and result.get("status") != "interrupted":
        reason, interrupted = said, False
    elif failure is not None and result.get("status") != "interrupted":
        reason = failure.reason  # a signal; what rank zero says is only that a peer was gone
    else:
        reason = str(result.get("reason") or f"it ended with exit status {status}")
    before = attempts(run)
    step = int(result.get("global_step") or read_whole(run.status).get("step") or 0)
    crashed = not (finished or interrupted)
    this = Attempt(
        number, job, "" if finished else reason, status, _begun(run, number)["time"], time.time(), _saved(run), step, crashed
    )
    note(run, this)
    if status > 128:
        _end_steps(job, env)
    if finished:
        return 0
    if failure is not None and failure.final:
        return _give_up(run, status, "")
    if not holds({"job": job}, env, _PATIENCE_SECONDS):
        return status or 1  # cancelled, or Slurm queues it again by itself
    if interrupted:  # by Slurm, which wants the nodes back or whose time is up, or by somebody else
        return QUEUE if "SIGUSR2" in reason or _is_preempted(job, env) else HERE
    return _give_up(run, status, why) if (why := _hopeless(run, [*before, this], is_told(output, failure))) else HERE


def _begun(run: Run, attempt: int) -> dict[str, Any]:
    """When and by which job an attempt was begun."""
    return read_whole(run.folder / "logs" / str(attempt) / "begun.json")


def _saved(run: Run) -> int:
    """Step of the newest checkpoint; 0 before the first."""
    return max((int(path.name[5:]) for path in run.checkpoints.glob("step-*") if path.name[5:].isdigit()), default=0)


def _note_the_silent(run: Run, newest: int) -> None:
    """Note attempts of which nobody was left to note the end: Slurm had taken the batch script too."""
    noted = {attempt.attempt for attempt in attempts(run)}
    result, status = read_whole(run.result), read_whole(run.status)
    for number in range(1, newest):
        begun = _begun(run, number)
        if number in noted or not begun:
            continue
        told = str(result.get("reason", "")) if result.get("attempts") == number else ""
        reason = told or "Slurm ended the job: preempted, requeued, or a node was lost."
        ended = float(status.get("time", begun["time"])) if status.get("attempt") == number else begun["time"]
        note(run, Attempt(number, begun["job"], reason, 1, begun["time"], ended, _saved(run), status.get("step", 0), False))


def _hopeless(run: Run, ended: Sequence[Attempt], told: bool) -> str:
    """Why another start would end like these; empty if it need not.

    Args:
        run: The run.
        ended: All of its attempts.
        told: Whether the last one told its reason; a kill from outside has none, and may come twice.
    """
    last = ended[-1]
    config = yaml.safe_load(run.config.read_text()) if run.config.exists() else {}
    limit = config.get("run", {}).get("max_restarts", RunOptions.max_restarts)
    if sum(a.crashed for a in ended) > limit:
        return f"It has crashed more than run.max_restarts={limit} times; the last: {last.reason}"
    alike = [a for a in ended[-_ALIKE:] if a.crashed and (a.reason, a.saved) == (last.reason, last.saved)]
    if len(alike) == _ALIKE and told:
        return f"It has ended {_ALIKE} times in a row after the checkpoint of step {last.saved}: {last.reason}"
    fruitless = [a for a in ended[-_FRUITLESS:] if a.crashed and a.saved == last.saved]
    if len(fruitless) == _FRUITLESS:
        many = f"{_FRUITLESS} starts in a row have come to no new checkpoint after that of step {last.saved}"
        return f"{many}; the last: {last.reason}"
    return ""


def _end_steps(job: str, env: Mapping[str, str]) -> None:
    """End ranks that live on because somebody has killed srun: they and those of the next attempt must not both train."""
    command = ["squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%i"]
    own = f"{job}.{env.get('SLURM_STEP_ID', '')}"
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        answer = subprocess.run(command, env=asking(env), capture_output=True, text=True)
        left = [step for step in answer.stdout.split() if step.rpartition(".")[2].isdigit() and step != own]
        if answer.returncode == 0 and not left:
            return
        if left:
            subprocess.run(["scancel", *left], env=dict(env), capture_output=True)
        time.sleep(0.5)


def _give_up(run: Run, status: int, why: str) -> int:
    """Write down that nothing comes after this."""
    if why:
        write_whole(run.result, {"world_size": 0} | read_whole(run.result) | {"status": "failed", "reason": why})
    update_status(run, "failed")
    return status or 1


def _ends(job: str, env: Mapping[str, str]) -> int:
    """When the allocation is over, in seconds since 1970; 0 where there is no such time."""
    command = ["squeue", "--all", "--noheader", f"--jobs={job}", "--Format=EndTime"]
    told = subprocess.run(command, env=asking(env), capture_output=True, text=True).stdout.strip()
    try:
        return int(time.mktime(time.strptime(told, "%Y-%m-%dT%H:%M:%S")))
    except ValueError:
        return 0


def _is_preempted(job: str, env: Mapping[str, str]) -> bool:
    """Whether Slurm has begun to take the job's nodes."""
    command = ["scontrol", "--oneliner", "show", "job", job]
    told = subprocess.run(command, env=asking(env), capture_output=True, text=True).stdout
    return re.search(r" PreemptTime=(?!None)\S", told) is not None


def _run_of(slurm: Path, env: Mapping[str, str]) -> Run:
    """The run of this job, or of this task of an array."""
    job = env["LOCKSTEP_JOB"]
    train: Any = DelayedSubmission.load(slurm / f"{job}_submitted.pkl").function
    return Run(Path(train.folder))


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """``again FOLDER begin`` or ``again FOLDER end STATUS``."""
    folder, what, *rest = arguments
    try:
        run = _run_of(Path(folder), env)
        if what == "begin":
            print(begin(run, Path(folder), env), _ends(env["SLURM_JOB_ID"], env))
            return 0
        print(end(run, Path(folder), int(rest[0]), env))
        return 0
    except LockstepError as error:
        print(f"lockstep: {error.sentence}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"lockstep: {error.filename} cannot be read or written ({error.strerror}).", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
