"""All ranks verify a checkpoint together: shares of its bytes, then real saves of forked ranks, cheapest first."""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from lockstep.checkpoint import checksums, writer
from lockstep.checkpoint.checksums import FileSums, share_pieces, verify_pieces, write_file
from lockstep.checkpoint.manifest import Progress
from lockstep.checkpoint.reader import find_checkpoint, latest_checkpoint
from lockstep.checkpoint.writer import CheckpointWriter
from lockstep.config.schema import CheckpointOptions
from lockstep.core.errors import UsageError
from lockstep.core.world import World
from lockstep.distributed.consensus import StopConsensus
from lockstep.distributed.process_group import destroy_process_group, init_process_group
from lockstep.distributed.ranks import fork_ranks
from lockstep.runs.run import Run

GB, MB = 10**9, 10**6


def sums(size: int) -> FileSums:
    """Checksums of a file that need not exist."""
    return size, "0" * 64 * -(-size // checksums.PIECE_BYTES)


def shared_bytes(files: dict[str, FileSums], shares: int) -> list[int]:
    """Bytes of each share."""
    divided = share_pieces(files, shares)
    assert sorted(piece for share in divided for piece in share) == sorted(share_pieces(files, 1)[0])
    piece = checksums.PIECE_BYTES
    return [sum(min(piece, size - number * piece) for _, size, number, _ in share) for share in divided]


@pytest.mark.parametrize("part", [1000, 20 * MB, 70 * MB, GB, GB + 12345])
def test_as_many_ranks_as_before_verify_their_own_parts(part: int) -> None:
    files = {f"{kind}-{rank}.pt": sums(size) for rank in range(64) for kind, size in (("rank", 900), ("shard", part + rank))}
    for rank, share in enumerate(share_pieces(files, 64)):
        assert {piece[0] for piece in share} >= {f"shard-{rank}.pt"}
    assert max(shared_bytes(files, 64)) <= part + max(part // 8, 2000)


@pytest.mark.parametrize(("parts", "ranks"), [(64, 8), (64, 9), (4, 64), (1, 64), (7, 3)])
def test_each_rank_verifies_an_equal_share_whatever_the_number_of_parts(parts: int, ranks: int) -> None:
    files = {f"shard-{part}.pt": sums(8 * GB) for part in range(parts)}
    assert max(shared_bytes(files, ranks)) <= parts * 8 * GB / ranks + checksums.PIECE_BYTES


@pytest.mark.parametrize("piece", [1, 7, 100, 10**6])
def test_a_change_of_any_byte_or_of_the_size_is_found(tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "PIECE_BYTES", max(piece, 40))
    file = tmp_path / "part"
    files = {"part": write_file(file, torch.arange(50))}
    pieces = share_pieces(files, 1)[0]
    verify_pieces(tmp_path, pieces)
    content = file.read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match="part has a checksum mismatch"):
            verify_pieces(tmp_path, pieces)
    for wrong in (content[:-1], content + b"0"):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"part has {len(wrong)} bytes instead of {len(content)}"):
            verify_pieces(tmp_path, pieces[-1:])


def bytes_read() -> int:
    """Bytes that this process has read from files so far, from a disk or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


PROGRESS = Progress(1, 0, 1, 0, 0.0, 0.0, 0.0)
OPTIONS = CheckpointOptions(async_save=False)


def save_and_find(world: World, run: Run, size: int) -> tuple[int, int, str]:
    """Save a part of ``size`` bytes and search for the checkpoint; return what this rank has read in each, and an error."""
    init_process_group(world, torch.device("cpu"), timedelta(minutes=1))
    saver, consensus = CheckpointWriter(run, world, 1, OPTIONS), StopConsensus(world)
    before = bytes_read()
    saver.save(PROGRESS, {f"rank-{world.rank}.pt": torch.zeros(size, dtype=torch.uint8)}, consensus)
    saved = bytes_read()
    latest_checkpoint(run.checkpoints, world)
    resumed = bytes_read()
    destroy_process_group()
    return saved - before, resumed - saved, saver.error


def test_no_rank_reads_more_than_twice_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "PIECE_BYTES", MB)
    run = Run.create(tmp_path, "x")
    run.log(1, 0)
    for saved, found, error in fork_ranks(lambda world: save_and_find(world, run, 4 * MB), nodes=2, ranks=2):
        assert not error
        assert 4 * MB <= saved < 5.5 * MB and 4 * MB <= found < 5.5 * MB


def test_what_the_disk_has_not_kept_is_found_on_another_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_badly(path: Path, content: object) -> FileSums:
        written = write_file(path, content)
        if path.name == "rank-2.pt":
            os.truncate(path, written[0] - 1)
        return written

    run = Run.create(tmp_path, "x")
    run.log(1, 0)
    monkeypatch.setattr(writer, "write_file", write_badly)
    (*_, zero), *others = fork_ranks(lambda world: save_and_find(world, run, 4 * MB), nodes=2, ranks=2)
    assert zero.startswith("the checkpoint of step 1 could not be written (rank-2.pt has ")
    assert [error for *_, error in others] == ["", "", ""]
    assert not list(run.checkpoints.iterdir())


def save_with_a_failing_rank(world: World, run: Run) -> str:
    """Save where rank one cannot verify its share, for a reason without a text; return the error of this rank."""
    init_process_group(world, torch.device("cpu"), timedelta(seconds=20))
    saver, consensus = CheckpointWriter(run, world, 1, OPTIONS), StopConsensus(world)
    saver.save(PROGRESS, {f"rank-{world.rank}.pt": torch.zeros(9)}, consensus)
    destroy_process_group()
    return saver.error


def test_any_failure_to_verify_is_reported_to_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_on_rank_one(folder: Path, pieces: Sequence[checksums.Piece]) -> None:
        if any(piece[0] == "rank-0.pt" for piece in pieces):
            raise MemoryError

    run = Run.create(tmp_path, "x")
    run.log(1, 0)
    monkeypatch.setattr(writer, "verify_pieces", fail_on_rank_one)
    errors = fork_ranks(lambda world: save_with_a_failing_rank(world, run), nodes=2, ranks=1)
    failed = "the checkpoint of step 1 could not be written (%s)"
    assert errors == [failed % "rank 1: MemoryError", failed % "MemoryError"]
    assert not list(run.checkpoints.iterdir())


def find_together(world: World, run: Run, elsewhere: Path) -> tuple[int, int, list[str]]:
    """Search on all ranks; return the steps that are found in two ways, and the complaints and errors of this rank."""
    init_process_group(world, torch.device("cpu"), timedelta(minutes=1))
    said: list[str] = []
    latest, given = latest_checkpoint(run.checkpoints, world, said.append), find_checkpoint(run.folder, "ckpt_path", world)
    assert latest is not None and not isinstance(given, Path)
    with pytest.raises(UsageError) as error:
        find_checkpoint(elsewhere, "ckpt_path", world)
    destroy_process_group()
    return latest.step, given.step, [*said, error.value.message]


def save(run: Run, steps: Sequence[int]) -> None:
    """Save as one rank, which is not the number that reads it."""
    saver = CheckpointWriter(run, World(), 0, CheckpointOptions(async_save=False, keep_last=9))
    for step in steps:
        content = {"rank-0.pt": torch.ones(2 * MB), "model.ckpt": torch.ones(9)}
        saver.save(Progress(step, 0, 1, 0, 0.0, 0.0, 0.0), content, StopConsensus(World()))


def test_a_damaged_part_is_named_once_and_all_ranks_take_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "PIECE_BYTES", MB)
    run = Run.create(tmp_path, "x")
    save(run, [1, 2, 3])
    damaged = run.checkpoints / "step-00000003" / "rank-0.pt"
    with damaged.open("r+b") as file:
        file.seek(7 * MB)  # the share of the last rank
        file.write(b"!")
    (run.checkpoints / "step-00000002" / "manifest.json").write_text("{}")
    results = fork_ranks(lambda world: find_together(world, run, tmp_path / "none"), ranks=3)
    assert [found for *found, _ in results] == [[1, 1]] * 3
    nothing = f"ckpt_path: {tmp_path / 'none'} is neither a complete checkpoint nor a run folder with one in checkpoints/."
    (part, other, *zero), *others = (said for *_, said in results)
    assert part == f"checkpoint {damaged.parent} is damaged and is ignored: rank-0.pt has a checksum mismatch."
    assert "step-00000002 is damaged and is ignored: manifest.json is not a manifest (" in other
    assert [zero, *others] == [[nothing]] * 3
