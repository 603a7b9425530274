"""Start the W&B run of a run folder, online or offline, and read its local files."""

import contextlib
import http.client
import logging
import shlex
import signal
import ssl
import time
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.config import WandbOptions
from lockstep.core import fsync, is_on_path, python_command, shell_command
from lockstep.distributed import STOP_SIGNALS
from lockstep.monitoring.wandb_history import GLOBAL_STEP
from lockstep.runs import METRICS_ROW, OWNER_SECONDS, Owner, Run

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 0.1
"""How often W&B's service writes rows to its local file; a restarted run reads there what W&B has."""

_SERVICE_SECONDS = 3.0
"""How long W&B's service outlives a killed process; measured: about two seconds."""

_FINISH_SECONDS = 60.0
"""How long finishing a run waits for uploads; the rest stays on disk."""

_CONNECT_SECONDS = 5.0
"""How long to wait for the server before the run starts offline."""


@dataclass(frozen=True)
class WandbClient:
    """Start the W&B run of a run folder; both have the same id.

    Attributes:
        config: What W&B shows as the config.
        online: Whether to use the server if it can be reached.
    """

    run: Run
    options: WandbOptions
    config: Mapping[str, Any]
    online: bool

    def start(self) -> tuple["wandb.Run", int, int]:
        """Start or resume the W&B run, and send it the rows that earlier attempts left in local files.

        Returns:
            The W&B run, the number of the first row that it lacks, and how many rows of ``metrics.csv`` it has.
        """
        self._wait_for_earlier_attempts()
        stored = self._stored_rows()
        # W&B's service inherits the mask, so that a signal to the whole job does not kill it.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            try:
                wandb_run = self._init()
            except ConnectionError:  # the service of a previous start is dead
                _teardown_service()
                wandb_run = self._init()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        # As Lightning's logger does for a run that it starts itself: optimizer steps are the x axis.
        wandb_run.define_metric(GLOBAL_STEP)
        wandb_run.define_metric("*", step_metric=GLOBAL_STEP, step_sync=True)
        wandb_run.define_metric(METRICS_ROW, hidden=True)
        end = wandb_run.starting_step  # not run.step, which is 0 for a moment after the start
        if wandb_run.offline:
            log.info("W&B is offline; upload the run with: %s", sync_command(self.run))
        else:
            log.info("W&B: %s", wandb_run.url)
            for number in sorted(number for number in stored if number >= end):
                _send_stored_row(wandb_run, number, *stored[number])
        metrics_rows = _count_metrics_rows(stored)
        if not stored and end:  # the run folder has lost W&B's files
            metrics_rows = int(dict(wandb_run.summary).get(METRICS_ROW, 0))
        return wandb_run, max([end, *(number + 1 for number in stored)]), metrics_rows

    def _init(self) -> "wandb.Run":
        """Start the W&B run; offline if the server cannot be reached or rejects it, so that training continues."""
        import wandb  # takes a second and a half, on rank zero only

        arguments: dict[str, Any] = {
            **vars(self.options),
            "tags": self.options.tags or None,
            "id": self.run.id,
            "resume": "allow",
            "name": f"{self.run.name}-{self.run.id}",
            "dir": self.run.folder,
            "config": dict(self.config),
            "mode": "online" if self.online else "offline",
            # Silent: what matters in its messages is logged here.
            "settings": wandb.Settings(
                silent=True,
                finish_timeout=_FINISH_SECONDS,
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=_FLUSH_SECONDS,
            ),
        }
        if self.online and not is_reachable(wandb.setup().settings.base_url):
            log.warning("W&B cannot be reached; the run is offline, and lockstep retries at its end")
            arguments["mode"] = "offline"
        try:
            return wandb.init(**arguments)
        except wandb.Error as error:
            log.warning("W&B rejects the run (%s); the run is offline", one_line(error))
            _teardown_service()
            return wandb.init(**arguments | {"mode": "offline"})

    def metrics_rows_on_disk(self) -> int:
        """How many rows of ``metrics.csv`` W&B's local files have."""
        return _count_metrics_rows(self._stored_rows())

    def flush(self, sent_at: float) -> None:
        """Wait until W&B's service has written all rows so far to its local file, and flush that to disk.

        Args:
            sent_at: When the newest row was sent, by the monotonic clock.
        """
        time.sleep(min(max(0.0, sent_at + 2 * _FLUSH_SECONDS - time.monotonic()), 2 * _FLUSH_SECONDS))
        try:
            fsync(max(self._files(), key=lambda file: file.stat().st_mtime))
        except (OSError, ValueError) as error:  # ValueError: no file exists
            log.warning("W&B's rows could not be flushed to disk (%s)", one_line(error))

    def _wait_for_earlier_attempts(self) -> None:
        """Wait for the last rows of an attempt that was just killed, or has not noticed yet that it lost the run.

        Do not wait in the Slurm job of that attempt: its agents, or srun, end all processes before the next attempt.
        """
        owner = Owner.read(self.run.owner)
        if owner is not None and owner == self.run.owner_of(owner.attempt - 1):
            return
        if written := [file.stat().st_mtime for file in self._files()]:
            claimed = self.run.owner.stat().st_mtime if self.run.owner.exists() else 0.0
            end = max(*written, claimed - _SERVICE_SECONDS + 2 * OWNER_SECONDS) + _SERVICE_SECONDS
            time.sleep(min(max(0.0, end - time.time()), _SERVICE_SECONDS))

    def _stored_rows(self) -> dict[int, tuple[dict[str, Any], Path]]:
        """The rows in the local files of all attempts, by number, each with the folder of its media."""
        from lockstep.compat.wandb import read_history

        files = sorted(self._files(), key=lambda file: file.stat().st_mtime)
        histories = ((read_history(file, _FINISH_SECONDS), file.parent / "files") for file in files)
        return {number: (row, media) for history, media in histories for number, row in history.items()}

    def _files(self) -> Iterable[Path]:
        return self.run.folder.glob("wandb/*run-*/run-*.wandb")


def _count_metrics_rows(stored: Mapping[int, tuple[dict[str, Any], Path]]) -> int:
    return max((int(row.get(METRICS_ROW, 0)) for row, _ in stored.values()), default=0)


def _send_stored_row(wandb_run: "wandb.Run", number: int, row: Mapping[str, Any], media: Path) -> None:
    """Send a row from a local file, with its images and other media."""
    for value in (value for value in row.values() if isinstance(value, dict)):
        for name in (value.get("path"), *value.get("filenames", ())):
            if name and (media / name).is_file():
                wandb_run.save(media / name, base_path=media, policy="now")
    wandb_run.log({key: value for key, value in row.items() if key not in ("_step", "_runtime")}, step=number, commit=True)


def is_reachable(address: str) -> bool:
    """Whether the server at ``address`` answers within five seconds; W&B itself tries for a minute and a half."""
    try:
        request = urllib.request.Request(address, method="HEAD")
        urllib.request.urlopen(request, timeout=_CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # W&B's client has its own certificates
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


def _teardown_service() -> None:
    """Stop W&B's service, which is dead or still holds the id of the run."""
    import wandb

    with contextlib.suppress(ConnectionError):
        wandb.teardown()


def sync_command(run: Run) -> str:
    """The command that uploads an offline run; ``lockstep sync`` if the server already has part of it."""
    is_partly_online = any(run.folder.glob("wandb/run-*"))
    if is_partly_online:
        return shell_command("sync", run.folder)
    program = "wandb" if is_on_path("wandb") else f"{shlex.quote(python_command())} -m wandb"
    return f"{program} sync {shlex.quote(f'{run.folder}/wandb')}/offline-run-*"


def one_line(error: BaseException) -> str:
    """Type and message of an error, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
