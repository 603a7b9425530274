"""Find checkpoints and verify them.

A checkpoint is a folder such as ``checkpoints/step-00000120``, or ``step-00000120-end`` with what the end of training has
left, where that differs. It contains:

- ``model.ckpt``: Lightning's checkpoint with weights, optimizers, schedules, loops and callbacks
- ``rank-0.pt`` …: per-rank state that Lightning omits, see ``rank_state``
- ``shard-0.pt`` …: with ZeRO, each rank's part of weights and optimizer state, see ``ShardedState``
- ``manifest.json``: the files with their checksums, see ``manifest``

No file points to the newest checkpoint: it is the last one whose files match its manifest.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.checkpoint.manifest import MANIFEST_FILE, Manifest
from lockstep.core import UsageError, World
from lockstep.data import DataPosition, derive_seed
from lockstep.runs import checkpoint_order
from lockstep.strategies import ResumePoint, ShardedState

log = logging.getLogger(__name__)

MODEL_FILE = "model.ckpt"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint in ``folder``, described by ``manifest``."""

    folder: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.progress.step

    @property
    def model(self) -> Path:
        """Lightning's checkpoint."""
        return self.folder / MODEL_FILE

    def resume_point(self, world: World, seed: int) -> ResumePoint:
        """What a rank of ``world`` needs to resume from here; ``seed`` is the seed of the run."""
        progress = self.manifest.progress
        replaced = range(world.rank, self.manifest.world_size, world.size)
        states = [self._rank_state(rank) for rank in replaced]
        return ResumePoint(
            progress.epoch,
            [DataPosition(*position) for position in progress.positions],
            progress.loaded_epochs,
            progress.validation_due,
            progress.seconds_since_validation,
            states,
            states[0] if states else self._rank_state(0),
            derive_seed(seed, self.step, world.rank) >> 1,
            progress.gradient_ready_order,
            progress.should_stop,
            progress.has_ended,
        )

    def _rank_state(self, rank: int) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(self.folder / f"rank-{rank}.pt", map_location="cpu", weights_only=True)
        return state

    def weights(self) -> Iterator[tuple[str, Any]]:
        """Entries of the module's ``state_dict``, sorted by name; weights that ZeRO has partitioned are float32."""
        state_dict = torch.load(self.model, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        sharded = ShardedState.from_shards(self.folder) or ShardedState()
        for name in sorted({*state_dict, *sharded.slices, *sharded.aliases}):
            yield name, state_dict[name] if name in state_dict else sharded.full_tensor(sharded.aliases.get(name, name))


def published_checkpoints(checkpoints: Path) -> list[Path]:
    """All published checkpoints, newest first."""
    found = [path for path in checkpoints.glob("step-*") if checkpoint_order(path) and path.is_dir()]
    return sorted(found, key=checkpoint_order, reverse=True)


def read_checkpoint(folder: Path, complain: Callable[[str], None] = log.warning) -> Checkpoint | None:
    """The checkpoint in ``folder`` if every file matches its manifest; else ``complain`` gets the reason."""
    try:
        manifest = Manifest.read(folder)
        for name, (size, digest) in manifest.files.items():
            if (found := (folder / name).stat().st_size) != size:
                raise ValueError(f"{name} has {found} bytes instead of {size}")
            if file_sha256(folder / name) != digest:
                raise ValueError(f"{name} has another checksum than when it was written")
    except (OSError, ValueError) as error:
        reason = f"{Path(error.filename).name}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        complain(f"checkpoint {folder} is damaged and is ignored: {reason}.")
        return None
    return Checkpoint(folder, manifest)


def latest_checkpoint(checkpoints: Path, complain: Callable[[str], None] = log.warning) -> Checkpoint | None:
    """The newest complete checkpoint of a run."""
    return next((found for folder in published_checkpoints(checkpoints) if (found := read_checkpoint(folder, complain))), None)


def find_checkpoint(place: Path, key: str) -> Checkpoint | Path:
    """The checkpoint at ``place``: a checkpoint of a run, the newest one of a run folder, or a file of Lightning's.

    Raises:
        UsageError: There is none; names ``key``, which was set to ``place``.
    """
    folder = place.parent if place.name == MODEL_FILE else place
    found = read_checkpoint(folder) if (folder / MANIFEST_FILE).exists() else latest_checkpoint(place / "checkpoints")
    if found is None and not place.is_file():
        raise UsageError(f"{key}: {place} is neither a complete checkpoint nor a run folder with one in checkpoints/.")
    return found or place


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
