"""Checkpoints that are there whole or not at all: how they are written, published, found again and cleaned up.

``checkpoints/step-00000120/`` holds ``model.ckpt`` (lightning's own: weights, optimizer, schedule, loops, callbacks),
``rank-0.pt`` … (what each rank alone knows, see ``state``) and ``manifest.json`` (size and SHA-256 of each file, step, epoch,
batches, world size). Every rank writes its files into a hidden folder beside and flushes them to disk; rank zero reads all
of them back, writes the manifest and renames the folder. Nobody needs a pointer to the newest one: it is the last whole one.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.core import UsageError, World

log = logging.getLogger(__name__)

MODEL_FILE, MANIFEST_FILE = "model.ckpt", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        folder: Where it lies.
        facts: What its manifest says.
    """

    folder: Path
    facts: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.facts["step"])

    @property
    def model(self) -> Path:
        """lightning's checkpoint."""
        return self.folder / MODEL_FILE

    @property
    def world_size(self) -> int:
        """Ranks that wrote it."""
        return int(self.facts["world_size"])

    def rank(self, rank: int) -> dict[str, Any]:
        """What a rank alone knew."""
        state: dict[str, Any] = torch.load(self.folder / f"rank-{rank}.pt", map_location="cpu", weights_only=True)
        return state

    def states_for(self, world: World) -> list[dict[str, Any]]:
        """The states that a rank of ``world`` goes on with; in another world, those of every ``size``-th rank from its own."""
        return [self.rank(rank) for rank in range(world.rank, self.world_size, world.size)]


def published_checkpoints(checkpoints: Path) -> list[Path]:
    """All published checkpoints, newest first."""
    return sorted((path for path in checkpoints.glob("step-*") if path.is_dir()), reverse=True)


def read_checkpoint(folder: Path, complain: Callable[[str], None] = log.warning) -> Checkpoint | None:
    """The checkpoint in ``folder`` if every byte of it is as it was written; else a complaint."""
    try:
        facts = json.loads((folder / MANIFEST_FILE).read_text())
        for name, (size, digest) in facts["files"].items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} has {(folder / name).stat().st_size} bytes instead of {size}")
            if file_sha256(folder / name) != digest:
                raise ValueError(f"{name} is not as it was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{Path(error.filename).name}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        complain(f"checkpoint {folder} is damaged and left out: {reason}.")
        return None
    return Checkpoint(folder, facts)


def latest_checkpoint(checkpoints: Path, complain: Callable[[str], None] = log.warning) -> Checkpoint | None:
    """The newest whole checkpoint of a run."""
    return next((found for folder in published_checkpoints(checkpoints) if (found := read_checkpoint(folder, complain))), None)


def find_checkpoint(place: Path, key: str) -> Checkpoint | Path:
    """The checkpoint at ``place``: a file of lightning's, one of a run's, or the newest whole one of a run folder.

    Raises:
        UsageError: There is none; it names ``key``, which gave the place.
    """
    folder = place.parent if place.name == MODEL_FILE else place
    found = read_checkpoint(folder) if (folder / MANIFEST_FILE).exists() else latest_checkpoint(place / "checkpoints")
    if found is None and not place.is_file():
        raise UsageError(f"{key}: {place} is no whole checkpoint, nor a run folder with one below checkpoints/.")
    return found or place


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
