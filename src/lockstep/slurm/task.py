"""The task that srun starts on each node: its agent, which forks the ranks of the node."""

import faulthandler
import logging
import os
import platform
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

from lockstep.core import Interrupted, World, count, fast_imports, file_error, setup_logging, use_writable_caches
from lockstep.runs import Failure, Run, failure, report_phase, verify_snapshot

log = logging.getLogger(__name__)

ENTRY_POINT = "lockstep.trainer.node:Node"
"""What the agent runs, resolved by name so that the launcher does not import torch."""

EXPORT_ENTRY_POINT = "lockstep.checkpoint.export:ExportNode"
"""What the agent of an export runs."""

_IMPORT_SECONDS = 600.0
"""How long the imports of an agent may take; from a cold shared file system they take minutes."""


@dataclass(frozen=True)
class NodeTask:
    """One training on one node, as submitit pickles it for every node of the job.

    Attributes:
        folder: The run folder.
        slurm: Folder of the scripts and the output of the job.
        command: fit, validate, test, predict or export.
        arguments: Keys of the config; files in them are copies in the run folder. Of an export, those of ``lockstep export``.
        digest: SHA-256 of the code snapshot; empty without one.
        ranks: Ranks of each node.
        cpus: CPUs that each rank was promised; None if unknown.
    """

    folder: Path
    slurm: Path
    command: str
    arguments: tuple[str, ...]
    digest: str
    ranks: int
    cpus: int | None

    def __call__(self) -> None:
        """Train with the ranks of this node, and exit with the status of the run."""
        run, attempt = Run(self.folder), int(os.environ["LOCKSTEP_ATTEMPT"])
        agents = World.from_env(os.environ)
        setup_logging(agents)
        logging.getLogger("submitit").setLevel(logging.WARNING)
        signal.signal(signal.SIGTERM, _raise_interrupted)
        # Before training there is nothing to save, and the job still has time.
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        if run.is_finished_by(os.environ.get("LOCKSTEP_JOB", "")):
            log.info("the run is finished already: %s", run.folder)
            return
        status = 1
        try:
            notes = self._check_environment(agents)
            with self._watch_imports(run, attempt, agents), fast_imports():
                entry_point = EXPORT_ENTRY_POINT if self.command == "export" else ENTRY_POINT
                node = resolve_name(entry_point)(self, agents, run, attempt, notes)
            status = node.run()
        except BaseException as error:
            mine = Failure.from_exception(error, self._first_rank(agents))
            first = failure.record_failure(run, attempt, mine)
            failure.write_failed_result(run, attempt, first)
            status = mine.exit_status
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            weakref.finalize._exitfunc()  # type: ignore[attr-defined]  # removes the temporary folders that W&B makes at import
            os._exit(status)  # srun waits for this task, not for threads of the libraries

    def _first_rank(self, agents: World) -> World:
        """The first rank of this node."""
        return World(agents.rank * self.ranks, agents.size * self.ranks, 0, self.ranks)

    def _check_environment(self, agents: World) -> list[str]:
        """Verify the snapshot and the allocated CPUs, and create the scratch folder; return lines for the log."""
        notes = [f"run folder {self.folder}"]
        if warning := use_writable_caches(os.environ):
            notes.append(warning)
        if self.digest:
            files = verify_snapshot(self.folder, self.digest)
            notes.append(f"code: snapshot {self.digest[:12]}, {count(files, 'file')}")
        mine = len(os.sched_getaffinity(0))
        if self.cpus is not None and mine < self.cpus * self.ranks:
            log.warning(
                "the ranks of node %d may use %d CPUs, but %d were requested; see --cpu-bind of srun",
                agents.rank,
                mine,
                self.cpus * self.ranks,
            )
        if scratch := os.environ.get("LOCKSTEP_SCRATCH"):  # not TMPDIR itself: Slurm replaces it where the folder is missing
            try:
                os.makedirs(scratch, exist_ok=True)
            except OSError as error:
                raise file_error(
                    error, f"scratch: {scratch} cannot be created on {platform.node()} ({error.strerror})."
                ) from None
            os.environ["TMPDIR"] = scratch
        return notes

    @contextmanager
    def _watch_imports(self, run: Run, attempt: int, agents: World) -> Iterator[None]:
        """Report this node, with its stack, if its imports hang."""
        if agents.is_rank_zero:
            report_phase(run, attempt, "imports")

        def give_up() -> None:
            faulthandler.dump_traceback(all_threads=True)
            what = f"The imports on node {agents.rank} have not finished after {_IMPORT_SECONDS:.0f} s"
            report = f"{what}; its stack is in its output in {self.slurm}."
            try:
                failure.record_failure(run, attempt, Failure.from_report(report, self._first_rank(agents)))
            finally:
                os._exit(1)

        timer = threading.Timer(_IMPORT_SECONDS, give_up)
        timer.daemon = True
        timer.start()
        # If the timer fails: this needs neither the GIL, which an import that hangs in the linker holds, nor the run folder.
        faulthandler.dump_traceback_later(_IMPORT_SECONDS + 30, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            timer.cancel()
            timer.join()  # a process with threads must not fork


def _raise_interrupted(*_: object) -> None:
    raise Interrupted(143)
