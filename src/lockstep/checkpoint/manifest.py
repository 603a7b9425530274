"""The manifest of a checkpoint: how far the run had come, and the size and checksums of every file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lockstep.checkpoint.checksums import FileSums, check_sums
from lockstep.core import atomic_write_json

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class Progress:
    """How far a run has come when it saves.

    Attributes:
        step, epoch: Optimizer steps and epochs done.
        batch: Batches used of the current epoch.
        metric_rows: Rows written to ``metrics.csv``.
        train_seconds: Time spent in training steps, over all attempts.
        lost_seconds: Time lost to restarts: from each checkpoint to the first step after it.
        other_seconds: Time spent in the other parts of ``Durations``, by part.
        saved_at: When the save began, in seconds since 1970.
        gradient_ready_order, should_stop, has_ended: See ``ResumePoint``.
        end_step: Step after which training ends, if some rank has set ``Trainer.should_stop`` alone.
        positions: See ``ResumePoint``; the fields of each ``DataPosition``.
        loaded_epochs, validation_due, seconds_since_validation: See ``ResumePoint``.
        wandb_position: W&B's number of the next row, and its values so far.
    """

    step: int
    epoch: int
    batch: int
    metric_rows: int
    train_seconds: float
    lost_seconds: float
    saved_at: float
    gradient_ready_order: list[str] | None = None
    should_stop: bool = False
    has_ended: bool = False
    end_step: int | None = None
    positions: list[list[int]] = field(default_factory=list)
    loaded_epochs: list[int | None] = field(default_factory=lambda: [None, None])
    validation_due: bool = False
    seconds_since_validation: float = 0.0
    wandb_position: list[Any] = field(default_factory=lambda: [0, {}])
    other_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent in each part of ``Durations``."""
        return {**self.other_seconds, "training": self.train_seconds, "lost": self.lost_seconds}


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` records.

    Attributes:
        published_at: When the checkpoint was complete, in seconds since 1970.
        files: Checksums of each file, by name.
    """

    progress: Progress
    world_size: int
    attempt: int
    published_at: float
    files: Mapping[str, FileSums]

    def write(self, folder: Path) -> None:
        atomic_write_json(folder / MANIFEST_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest in ``folder``.

        Raises:
            OSError: It cannot be read.
            ValueError: It is damaged, lacks checksums or files, or another program has written it.
        """
        try:
            content = json.loads((folder / MANIFEST_FILE).read_text())
            files = {name: (int(size), str(sums)) for name, (size, sums) in content.pop("files").items()}
            manifest = cls(Progress(**content.pop("progress")), files=files, **content)
            missing = [name for name in (f"rank-{rank}.pt" for rank in range(max(1, manifest.world_size))) if name not in files]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{MANIFEST_FILE} is not a manifest ({type(error).__name__}: {error})") from None
        for name, file in manifest.files.items():
            check_sums(name, file)
        if missing:
            raise ValueError(f"{MANIFEST_FILE} does not list {missing[0]}")
        return manifest
