"""What submitit carries to each rank of a Slurm job. No torch here until the rank has begun to train."""

import logging
import os
import platform
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

from lockstep.core import Interrupted, LockstepError, RunError, Stopped, World, atomic_write_json, read_json, setup_logging
from lockstep.runs import Failure, Run, record_failure, update_status, verify_snapshot, wait_for_first_failure

log = logging.getLogger(__name__)

ENTRY_POINT = "lockstep.trainer.session:run_rank"
"""What a rank runs, by name: the trainer is in a room below this one and imports torch."""


@dataclass(frozen=True)
class TrainTask:
    """One training, as every rank of its Slurm job carries it out.

    Attributes:
        folder: The run folder.
        command: fit, validate, test or predict.
        arguments: Keys of the config; files in them are copies in the run folder.
        digest: Of the snapshot of the code; empty without one.
        cpus: CPUs that each rank was promised; None where nobody said.
    """

    folder: Path
    command: str
    arguments: tuple[str, ...]
    digest: str
    cpus: int | None

    def __call__(self) -> None:
        """Train as the rank that the environment describes; leave with the run's exit status if that fails."""
        run, attempt = Run(self.folder), int(os.environ["LOCKSTEP_ATTEMPT"])
        world = World.from_env(os.environ)
        _redirect_output(run.log(attempt, world.rank))
        setup_logging(world)
        logging.getLogger("submitit").setLevel(logging.WARNING)
        signal.signal(signal.SIGTERM, _raise_interrupted)
        # Before training there is nothing to save, and the job's time is not over yet.
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        if read_json(run.result).get("status") == "finished":
            log.info("the run is finished already: %s", run.folder)
            return
        try:
            self._check_environment(world)
            # Imported only now: torch takes seconds, which a failed check should not cost.
            run_rank = resolve_name(ENTRY_POINT)
            run_rank(self.command, self.arguments, world, run, attempt)
            sys.stdout.flush()
            sys.stderr.flush()
            # Not by way of Python's own end: it would wait for workers of DataLoaders, which heed no signals.
            os._exit(0)
        except BaseException as error:
            status = 1
            try:
                stopped = error.__cause__
                # With 0, where all have stopped together: else srun would end rank zero before it has closed W&B.
                alone = not (isinstance(stopped, Stopped) and stopped.together)
                status = _record_failure(error, world, run, attempt) if alone else 0
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                # Not sys.exit: a thread of a broken process group must not keep this rank, and with it the job, alive.
                os._exit(status)

    def _check_environment(self, world: World) -> None:
        """Say where this rank is; check the snapshot and what Slurm gave."""
        if world.local_rank == 0 and self.digest:
            files = verify_snapshot(self.folder, self.digest)
            log.info("code: snapshot %s, %d files", self.digest[:12], files)
        log.info("run folder %s", self.folder)
        log.info("%d ranks on %d nodes, meeting at %s", world.size, world.nodes, world.rendezvous or "home")
        mine = len(os.sched_getaffinity(0))
        if self.cpus is not None and mine < self.cpus:
            log.warning("rank %d may use %d CPUs, but %d were asked for; see --cpu-bind of srun", world.rank, mine, self.cpus)
        if scratch := os.environ.get("LOCKSTEP_SCRATCH"):  # not TMPDIR itself: where that is missing, Slurm replaces it
            try:
                os.makedirs(scratch, exist_ok=True)
            except OSError as error:
                raise RunError(f"scratch: {scratch} cannot be made on {platform.node()} ({error.strerror}).") from None
            os.environ["TMPDIR"] = scratch


def _redirect_output(path: Path) -> None:
    """Send all that this process and its children print to ``path``."""
    print(f"log of this rank: {path}", flush=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _raise_interrupted(*_: object) -> None:
    raise Interrupted(143)


def _record_failure(error: BaseException, world: World, run: Run, attempt: int) -> int:
    """Write down how this rank failed, unless another one failed first, and return its exit status."""
    if isinstance(error, LockstepError):
        status, report = error.exit_status, error.message
    elif isinstance(error, Interrupted):
        status = int(error.code or 1)
        report = f"it was ended by {'Ctrl-C' if status == 130 else signal.Signals(status - 128).name}."
    elif isinstance(error, SystemExit):
        status, report = 1, f"it was ended by sys.exit({error.code!r})."
    else:
        status, report = 1, "".join(traceback.format_exception(error))
    echo = world.size > 1 and _is_connection_loss(error)
    final = isinstance(error, LockstepError)
    mine = Failure(world.rank, world.size, world.node_rank, platform.node(), report, status, echo, final)
    first = (wait_for_first_failure(run, attempt) if echo else None) or record_failure(run, attempt, mine)
    if first.rank != world.rank:
        print(f"lockstep: rank {world.rank} ended because of {first.reason}", flush=True)
        if first.report != report and not echo:
            print(report, flush=True)
    elif world.rank:
        print(f"lockstep: {report}", flush=True)
    if first.rank == world.rank or world.is_rank_zero:
        _write_result(run, attempt, first)
    return status


def _write_result(run: Run, attempt: int, first: Failure) -> None:
    """Say in ``result.json`` why the run failed; rank zero may have had no time to, or no idea."""
    result = read_json(run.result) or {"world_size": first.size, "attempts": attempt}
    if not first.interrupted or "status" not in result:
        status = "interrupted" if first.interrupted else "failed"
        atomic_write_json(run.result, result | {"status": status, "reason": first.reason})
        update_status(run, status)


def _is_connection_loss(error: BaseException) -> bool:
    """Whether ``error`` is that of a collective whose other side is gone."""
    torch = sys.modules.get("torch")  # not there yet: no collective either
    if torch is None:
        return False
    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport", "NCCL")
    return isinstance(error, RuntimeError) and not isinstance(error, RunError) and any(word in str(error) for word in words)
