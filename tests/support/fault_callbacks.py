"""Callbacks that inject one fault, or record steps. A job imports a copy of this file from its own folder."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer


class FaultCallback(Callback):
    """Injects a fault when a hook is called on one rank.

    Args:
        action: A signal's name; or raise, exit, leave, sleep, ignore, allocate, wandb, pause, fill, empty, vanish, hang, claim.
        marker: File that is created just before. Where it exists, nothing happens.
        hook: The hook.
        step: First optimizer step at which the fault may happen.
        rank: The rank.
        repeat: Inject the fault each time, whether or not the marker exists.
    """

    def __init__(
        self,
        action: str,
        marker: str,
        hook: str = "on_train_batch_end",
        step: int = 0,
        rank: int = 0,
        repeat: bool = False,
    ) -> None:
        self.action, self.marker, self.step, self.rank, self.repeat = action, Path(marker), step, rank, repeat
        setattr(self, hook, self.inject)

    def inject(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_rank != self.rank or trainer.global_step < self.step or trainer.sanity_checking:
            return
        if self.marker.exists() and not self.repeat:
            return
        self.marker.touch()
        folder = Path(trainer.default_root_dir)
        match self.action:
            case "raise":
                raise ValueError("injected fault")
            case "ignore":  # does not end by itself any more
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(1000)
            case "exit":
                sys.exit("there are no data")
            case "leave":
                os._exit(9)
            case "sleep":
                time.sleep(1000)
            case "allocate":
                blocks = []
                while True:
                    blocks.append(bytearray(os.urandom(2**20)) * 50)
                    time.sleep(0.02)
            case "wandb":
                subprocess.run(["pkill", "-KILL", "-P", str(os.getpid()), "wandb-core"], check=True)
            case "pause":  # until the test creates the file
                while not self.marker.with_suffix(".over").exists():
                    time.sleep(0.01)
            case "fill":
                with contextlib.suppress(OSError), (folder / "filler").open("wb") as filler:
                    while filler.write(bytes(4096)):
                        filler.flush()
            case "empty":
                (folder / "filler").unlink()
            case "hang":  # as a disk that does not answer
                os.fsync = lambda fd: time.sleep(1000)
            case "vanish":
                (folder / "checkpoints").rename(folder / "gone")
            case "claim":  # as another job does that takes this one for lost
                from lockstep.monitoring.csv_logger import CsvMetricsLogger
                from lockstep.runs import OWNER_SECONDS, Owner, Run

                Run(folder).claim_attempt(Owner(job="another"))
                CsvMetricsLogger(folder / "metrics.csv", lambda: 0).close()
                time.sleep(OWNER_SECONDS)
                for name in ("result.json", "status.json"):
                    (folder / name).write_text("{}")
            case name:
                os.kill(os.getpid(), signal.Signals[name])


class StepRecorder(Callback):
    """Records every step of rank zero, and makes steps last.

    Args:
        diary: File that gets a line per step.
        seconds: Time added to each step.
    """

    def __init__(self, diary: str, seconds: float = 0.0) -> None:
        self.diary, self.seconds = Path(diary), seconds

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        time.sleep(self.seconds)
        if trainer.is_global_zero:
            with self.diary.open("a") as file:
                file.write(f"{trainer.global_step}\n")
