"""Find checkpoints and verify them.

A checkpoint is a folder such as ``checkpoints/step-00000120``, or ``step-00000120-end``, which is saved after training if the
other lacks the final weights. It contains:

- ``model.ckpt``: Lightning's checkpoint with weights, optimizers, schedules, loops and callbacks
- ``rank-0.pt`` …: per-rank state that Lightning omits, see ``rank_state``
- ``shard-0.pt`` …: with ZeRO, each rank's part of weights and optimizer state, see ``ShardedState``
- ``shards.pt``: their index
- ``manifest.json``: the files with their checksums, see ``manifest``

No file points to the newest checkpoint: it is the last one whose files match its manifest.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.checkpoint.checksums import share_pieces, verify_pieces
from lockstep.checkpoint.manifest import MANIFEST_FILE, Manifest, Progress
from lockstep.checkpoint.serialization import allow_plain_classes
from lockstep.core import StorageError, UsageError, World, may_pass
from lockstep.data.loading import DataPosition, derive_seed
from lockstep.distributed import all_gather, broadcast_from_rank_zero
from lockstep.runs import checkpoint_order
from lockstep.strategies import ResumePoint, ShardedState

log = logging.getLogger(__name__)

MODEL_FILE = "model.ckpt"

_ONE_RANK = World()


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
        path = self.folder / f"rank-{rank}.pt"
        allow_plain_classes(path)  # a stream's state may contain them
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Validating sparse tensor invariants")  # gradients
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def weights(self) -> Iterator[tuple[str, Any]]:
        """Entries of the module's ``state_dict``, sorted by name; weights that ZeRO has partitioned are float32."""
        state_dict = torch.load(self.model, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        sharded = ShardedState.from_shards(self.folder) or ShardedState()
        for name in sorted({*state_dict, *sharded.slices, *sharded.aliases}):
            yield name, state_dict[name] if name in state_dict else sharded.full_tensor(sharded.aliases.get(name, name))


def published_checkpoints(checkpoints: Path) -> list[Path]:
    """All published checkpoints, newest first; OSError if they cannot be listed."""
    try:
        paths = [checkpoints / name for name in os.listdir(checkpoints)]  # glob would hide an error
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [path for path in paths if path.name.startswith("step-") and checkpoint_order(path) and path.is_dir()]
    return sorted(found, key=checkpoint_order, reverse=True)


def read_checkpoint(folder: Path, world: World = _ONE_RANK, complain: Callable[[str], None] = log.warning) -> Checkpoint | None:
    """The checkpoint in ``folder`` if every file matches its manifest; else ``complain`` gets the reason on rank zero.

    Every rank of ``world`` must call, and verifies an equal share of the bytes.

    Raises:
        StorageError: It cannot be read now, so that it is not known whether it is complete.
    """
    manifest, problem, passes = broadcast_from_rank_zero(lambda: _read_manifest(folder), world, (Manifest, Progress))
    if manifest is not None:
        try:
            verify_pieces(folder, share_pieces(manifest.files, world.size)[world.rank])
        except (OSError, ValueError) as error:
            problem, passes = _reason(error), may_pass(error)
        found = all_gather((passes, problem), world)
        passes, problem = max(found, key=lambda one: (one[0], bool(one[1])))
    if passes:
        raise StorageError(f"checkpoint {folder} cannot be read: {problem}.")
    if manifest is not None and not problem:
        return Checkpoint(folder, manifest)
    if world.is_rank_zero:
        complain(f"checkpoint {folder} is damaged and is ignored: {problem}.")
    return None


def _read_manifest(folder: Path) -> tuple[Manifest | None, str, bool]:
    """The manifest in ``folder``, or why it cannot be read, and whether that may pass."""
    try:
        return Manifest.read(folder), "", False
    except (OSError, ValueError) as error:
        return None, _reason(error), may_pass(error)


def _reason(error: OSError | ValueError) -> str:
    return f"{Path(error.filename).name}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


def latest_checkpoint(
    checkpoints: Path, world: World = _ONE_RANK, complain: Callable[[str], None] = log.warning, set_aside: bool = False
) -> Checkpoint | None:
    """The newest complete checkpoint of a run; every rank of ``world`` must call.

    Args:
        set_aside: Rename damaged ones that are newer, so that they do not count as those to keep. Only for the run itself.

    Raises:
        StorageError: One that is newer cannot be read now.
    """
    for folder in broadcast_from_rank_zero(lambda: _list_checkpoints(checkpoints), world):
        if found := read_checkpoint(folder, world, complain):
            return found
        if set_aside and world.is_rank_zero:
            try:
                folder.rename(folder.with_name(f"damaged-{folder.name}"))
            except OSError as error:
                complain(f"checkpoint {folder} could not be renamed ({error.strerror}).")
    return None


def _list_checkpoints(checkpoints: Path) -> list[Path]:
    try:
        return published_checkpoints(checkpoints)
    except OSError as error:
        raise StorageError(f"{checkpoints} cannot be listed ({error.strerror}).") from error


def find_checkpoint(place: Path, key: str, world: World = _ONE_RANK) -> Checkpoint | Path:
    """The checkpoint at ``place``: a checkpoint of a run, the newest one of a run folder, or a checkpoint file of Lightning.

    Every rank of ``world`` must call; rank zero searches.

    Raises:
        UsageError: There is none; names ``key``, which was set to ``place``.
    """
    folder = place.parent if place.name == MODEL_FILE else place
    is_published, is_file = broadcast_from_rank_zero(lambda: ((folder / MANIFEST_FILE).exists(), place.is_file()), world)
    found = read_checkpoint(folder, world) if is_published else latest_checkpoint(place / "checkpoints", world)
    if found is None and is_published:
        raise UsageError(f"{key}: {place} is damaged; give another checkpoint, or a copy of {MODEL_FILE} to load it as it is.")
    if found is None and not is_file:
        raise UsageError(f"{key}: {place} is neither a complete checkpoint nor a run folder with one in checkpoints/.")
    return found or place
