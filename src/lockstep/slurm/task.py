"""The task that srun starts: one rank of a Slurm job."""

import logging
import os
import platform
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

from lockstep.core import Interrupted, RunError, Stopped, World, setup_logging
from lockstep.runs import Failure, Run, RunResult, failure, verify_snapshot

log = logging.getLogger(__name__)

ENTRY_POINT = "lockstep.trainer.session:run_rank"
"""Entry point of a rank, resolved by name so that the launcher does not import torch."""


@dataclass(frozen=True)
class TrainTask:
    """One training, as submitit pickles it for every rank of the job.

    Attributes:
        folder: The run folder.
        arguments: Keys of the config; files in them are copies in the run folder.
        digest: SHA-256 of the code snapshot; empty without one.
        cpus: CPUs that each rank was promised; None if unknown.
    """

    folder: Path
    command: str
    arguments: tuple[str, ...]
    digest: str
    cpus: int | None

    def __call__(self) -> None:
        """Train as the rank that the environment describes, and exit with the status of the rank."""
        run, attempt = Run(self.folder), int(os.environ["LOCKSTEP_ATTEMPT"])
        world = World.from_env(os.environ)
        _redirect_output(run.log(attempt, world.rank))
        setup_logging(world)
        logging.getLogger("submitit").setLevel(logging.WARNING)
        signal.signal(signal.SIGTERM, _raise_interrupted)
        # Before training there is nothing to save, and the time of the job is not over yet.
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        result = RunResult.read(run.result)
        if result is not None and result.is_finished:
            log.info("the run is finished already: %s", run.folder)
            return
        status = 1
        try:
            self._check_environment(world)
            # Resolved only now: torch takes seconds to import, which a failed check should not cost.
            resolve_name(ENTRY_POINT)(self.command, self.arguments, world, run, attempt)
            status = 0
        except BaseException as error:
            stopped = error.__cause__
            # 0 where all ranks stopped together: any other status makes srun end rank zero before it has closed W&B.
            together = isinstance(stopped, Stopped) and stopped.together
            status = 0 if together else _record_failure(error, world, run, attempt)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # Not sys.exit: it waits for DataLoader workers, which ignore signals, and for threads of a broken group.
            os._exit(status)

    def _check_environment(self, world: World) -> None:
        """Log the place of this rank; verify the snapshot and what Slurm has allocated."""
        if world.local_rank == 0 and self.digest:
            files = verify_snapshot(self.folder, self.digest)
            log.info("code: snapshot %s, %d files", self.digest[:12], files)
        log.info("run folder %s", self.folder)
        log.info("%d ranks on %d nodes, rendezvous %s", world.size, world.nodes, world.rendezvous or "none")
        mine = len(os.sched_getaffinity(0))
        if self.cpus is not None and mine < self.cpus:
            log.warning("rank %d may use %d CPUs, but %d were requested; see --cpu-bind of srun", world.rank, mine, self.cpus)
        if scratch := os.environ.get("LOCKSTEP_SCRATCH"):  # not TMPDIR itself: Slurm replaces it where the folder is missing
            try:
                os.makedirs(scratch, exist_ok=True)
            except OSError as error:
                raise RunError(f"scratch: {scratch} cannot be made on {platform.node()} ({error.strerror}).") from None
            os.environ["TMPDIR"] = scratch


def _redirect_output(path: Path) -> None:
    """Send everything that this process and its children print to ``path``."""
    print(f"log of this rank: {path}", flush=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _raise_interrupted(*_: object) -> None:
    raise Interrupted(143)


def _record_failure(error: BaseException, world: World, run: Run, attempt: int) -> int:
    """Record why this rank failed, unless another failed first, and return its exit status."""
    mine = Failure.from_exception(error, world)
    first = failure.wait_for_first_failure(run, attempt) if mine.is_secondary else None
    first = first or failure.record_failure(run, attempt, mine)
    if first.rank != world.rank:
        print(f"lockstep: rank {world.rank} ended because of {first.reason}", flush=True)
        if first.report != mine.report and not mine.is_secondary:
            print(mine.report, flush=True)
    elif world.rank:
        print(f"lockstep: {mine.report}", flush=True)
    if first.rank == world.rank or world.is_rank_zero:
        failure.write_failed_result(run, attempt, first)
    return mine.exit_status
