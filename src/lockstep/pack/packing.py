"""Pack a source into one folder of shards: plan, shards, index and manifest, each written atomically."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lockstep.core import RunError, UsageError, atomic_write, atomic_write_json, fsync, read_json
from lockstep.data.packed import INDEX_FILE, MANIFEST_FILE, WORK_FOLDER, ShardFile, ShardIndex, index_shards, locked
from lockstep.pack.images import ImageOptions
from lockstep.pack.shard import ShardRecord, ShardWriter
from lockstep.pack.sources import Source
from lockstep.pack.workers import Totals, Workers

_PLAN_FILE = "plan.json"
_FORMAT = 1
_LOCK_SECONDS = 2.0  # the workers of a killed call hold its lock until they end too


@dataclass(frozen=True)
class Packed:
    """A finished packing.

    Attributes:
        records: Its shards.
        left_out: Names of files and samples that are not in them, and why.
        written: Number of shards that this call has written.
    """

    records: list[ShardRecord]
    left_out: list[tuple[str, str]]
    written: int

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(record.samples for record in self.records)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(record.bytes for record in self.records)


def pack(
    source: Source,
    folder: Path,
    options: ImageOptions,
    shard_size: int,
    workers: int,
    show: Callable[[str, Totals, int], None] = lambda what, totals, samples: None,
) -> Packed:
    """Write the shards of ``source`` to ``folder``; shards of an interrupted call are checked and kept.

    Args:
        workers: Number of processes; 0: this one.
        show: Called several times a second with the activity, the work done, and the number of samples to pack.

    Raises:
        UsageError: The folder holds something else, or another process packs into it.
        RunError: The shards cannot be written, or no sample of a shard can be packed.
    """
    if not len(source):
        raise UsageError("SRC: the source has no samples; there is nothing to pack.")
    writer = ShardWriter(source, folder, options, shard_size)
    plan = _plan(writer)
    work = folder / WORK_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, _LOCK_SECONDS):
            manifest = _read(folder / MANIFEST_FILE)
            _check_same(plan, manifest or _read(work / _PLAN_FILE), folder)
            known = _known_records(writer, manifest)
            checks = Workers(workers, lambda totals: show("checking", totals, 0))
            intact = checks.run(lambda number, packed: writer.is_intact(known[number]), sorted(known)) if known else {}
            missing = [number for number in range(writer.shards) if not intact.get(number)]
            if missing or not manifest or not _has_index(folder, known):
                work.mkdir(exist_ok=True)
                atomic_write_json(work / _PLAN_FILE, plan)
                samples = sum(len(writer.samples_of(number)) for number in missing)
                written = Workers(workers, lambda totals: show("packing", totals, samples)).run(writer.write, missing)
                known |= written
                _publish(writer, plan, [known[number] for number in range(writer.shards)])
            if work.exists():
                shutil.rmtree(work)
            records = [known[number] for number in range(writer.shards)]
            skipped = [sample for record in records for sample in record.left_out]
            return Packed(records, [*source.left_out, *skipped], len(missing))
    except OSError as error:
        raise UsageError(f"OUT: {folder} cannot be written ({error.strerror}); choose another folder.") from error


def _plan(writer: ShardWriter) -> dict[str, Any]:
    """Everything that determines the bytes of the shards."""
    encodes = writer.options.encodes or writer.source.encodes
    libraries = {name: version(name) for name in ("torch", "torchvision", "torchcodec")} if encodes else {}
    return {
        "format": _FORMAT,
        "source": dict(writer.source.description),
        "options": {**asdict(writer.options), "shard_size": writer.shard_size},
        "libraries": libraries,
        "classes": writer.source.classes,
    }


def _known_records(writer: ShardWriter, manifest: Mapping[str, Any]) -> dict[int, ShardRecord]:
    """The records of shards that have been written, by their numbers."""
    if manifest:
        records = dict(enumerate(map(ShardRecord.read, manifest.get("shards", []))))
    else:
        records = {number: writer.find(number) for number in range(writer.shards)}
    return {number: record for number, record in records.items() if record is not None and number < writer.shards}


def _has_index(folder: Path, known: Mapping[int, ShardRecord]) -> bool:
    """Whether the index in ``folder`` is intact and lists these shards."""
    try:
        index = ShardIndex.open(folder / INDEX_FILE)
        index.verify()
    except (OSError, RunError):
        return False
    return index.shards == [_shard_file(known[number]) for number in sorted(known)]


def _shard_file(record: ShardRecord) -> ShardFile:
    return ShardFile(record.name, record.bytes, None)


def _publish(writer: ShardWriter, plan: Mapping[str, Any], records: list[ShardRecord]) -> None:
    """Write the index, then the manifest."""
    folder = writer.folder
    content = index_shards(folder, list(map(_shard_file, records)), writer.source.classes)
    manifest = {**plan, "left_out": writer.source.left_out, "shards": [asdict(record) for record in records]}
    work = folder / WORK_FOLDER  # which is removed with what a killed process leaves in it
    atomic_write(work / INDEX_FILE, lambda temporary: temporary.write_bytes(content))
    atomic_write_json(work / MANIFEST_FILE, manifest)
    for name in (INDEX_FILE, MANIFEST_FILE):
        (work / name).replace(folder / name)
    fsync(folder)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError:
        raise UsageError(f"OUT: {path} is damaged; remove its folder, and pack again.") from None


def _check_same(plan: Mapping[str, Any], other: Mapping[str, Any], folder: Path) -> None:
    """Raise UsageError if ``folder`` holds shards of another plan, or shards without a plan."""
    if not other:
        if any(folder.glob("*.tar")):
            raise UsageError(f"OUT: {folder} holds .tar files that lockstep pack has not made; choose another folder.")
        return
    for group in ("format", "source", "options", "libraries", "classes"):
        own, found = plan[group], other.get(group)
        if own == found:
            continue
        if isinstance(own, Mapping) and isinstance(found, Mapping):
            name = next(name for name in {**own, **found} if own.get(name) != found.get(name))
            own, found = own.get(name), found.get(name)
            group = f"--{name.replace('_', '-')}" if group == "options" else f"its {name.replace('_', ' ')}"
        raise UsageError(
            f"OUT: {folder} holds another packing: {group} was {_short(found)} and is {_short(own)}; choose another folder, or "
            "remove that one."
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
