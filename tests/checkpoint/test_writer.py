"""Write and keep checkpoints: unloadable state and manifests, then the writers of forked ranks, then runs."""

import hashlib
import json
import os
import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import SMALL, Launch

from lockstep.checkpoint import checksums, writer
from lockstep.checkpoint.manifest import Manifest, Progress
from lockstep.checkpoint.reader import latest_checkpoint, published_checkpoints, read_checkpoint
from lockstep.checkpoint.serialization import allow_numpy_globals, check_loadable
from lockstep.checkpoint.writer import CheckpointWriter
from lockstep.config.schema import CheckpointOptions
from lockstep.core.errors import RunError, SaveError
from lockstep.core.world import World
from lockstep.distributed.consensus import StopConsensus
from lockstep.distributed.process_group import destroy_process_group, init_process_group
from lockstep.distributed.ranks import fork_ranks
from lockstep.distributed.signals import SignalReceiver
from lockstep.runs.attempts import Attempt, append_attempt, read_attempts
from lockstep.runs.run import Run


class Thing:
    """A class that ``weights_only`` refuses."""


def test_unloadable_state_is_refused_and_located() -> None:
    allow_numpy_globals()
    check_loadable({"weights": {"a": torch.ones(3)}, "numbers": [1, 2.5, None, "text"], "more": np.float64(1), "n": np.ones(2)})
    with pytest.raises(RunError, match=r"cannot hold \['callbacks'\]\['Mine'\] \(\S*test_writer\.Thing\)"):
        check_loadable({"callbacks": {"Mine": Thing()}})
    with pytest.raises(RunError, match=r"cannot hold \['function'\]"):
        check_loadable({"function": lambda: 0})


def test_a_partial_line_of_attempts_is_ignored(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "x")
    for number in (1, 2):
        append_attempt(run, Attempt(number, "7", "Killed", 137, 0.0, 1.0, 0, 0, True))
        with (run.folder / "attempts.jsonl").open("a") as file:
            file.write('{"attempt": 9\n' if number == 1 else '{"att')
    assert [attempt.attempt for attempt in read_attempts(run)] == [1, 2]


PROGRESS = Progress(1, 0, 1, 0, 0.0, 0.0, 0.0)


def test_a_manifest_that_lacks_a_key_or_is_foreign_is_named(tmp_path: Path) -> None:
    (tmp_path / "rank-0.pt").write_bytes(b"123")
    Manifest(PROGRESS, 1, 1, 0.0, {"rank-0.pt": (3, hashlib.sha256(b"123").hexdigest())}).write(tmp_path)
    found = read_checkpoint(tmp_path)
    assert found is not None and found.manifest.progress == PROGRESS
    content = json.loads((tmp_path / "manifest.json").read_text())
    damages: list[dict[str, Any]] = [{"files": {}}, {"world_size": None}, {"world_size": 2}]
    for damage in damages:
        (tmp_path / "manifest.json").write_text(json.dumps(content | damage))
        assert read_checkpoint(tmp_path) is None
    del content["progress"]["epoch"]
    for text in (json.dumps(content), "[]", "{}", "1", '{"files": [], "progress": 1}', "{"):
        (tmp_path / "manifest.json").write_text(text)
        complaints: list[str] = []
        assert read_checkpoint(tmp_path, complain=complaints.append) is None
        assert complaints[0].startswith(f"checkpoint {tmp_path} is damaged and is ignored: manifest.json is not a manifest (")


@pytest.mark.parametrize(("content", "digits"), [(b"123", 0), (b"123", 63), (b"123", 128), (b"", 0), (b"1" * 100, 64)])
def test_a_manifest_without_a_checksum_of_each_piece_is_not_trusted(
    tmp_path: Path, content: bytes, digits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "PIECE_BYTES", 64)
    (tmp_path / "rank-0.pt").write_bytes(content)
    sums = "".join(hashlib.sha256(content[start : start + 64]).hexdigest() for start in range(0, len(content) or 1, 64))
    Manifest(PROGRESS, 1, 1, 0.0, {"rank-0.pt": (len(content), sums)}).write(tmp_path)
    assert read_checkpoint(tmp_path) is not None
    Manifest(PROGRESS, 1, 1, 0.0, {"rank-0.pt": (len(content), (sums * 2)[:digits])}).write(tmp_path)
    complaints: list[str] = []
    assert read_checkpoint(tmp_path, complain=complaints.append) is None
    assert complaints == [
        f"checkpoint {tmp_path} is damaged and is ignored: rank-0.pt of {len(content)} bytes needs {len(sums)} digits of "
        f"checksums instead of {digits}: they are damaged or of another format."
    ]


def test_a_failure_to_remove_old_checkpoints_does_not_concern_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Path) -> list[Path]:
        raise OSError(5, "Input/output error")

    run = Run.create(tmp_path, "x")
    saver = CheckpointWriter(run, World(), 0, CheckpointOptions(async_save=False))
    monkeypatch.setattr(writer, "published_checkpoints", fail)
    saver.save(PROGRESS, {"rank-0.pt": torch.ones(3)}, StopConsensus(World()))
    assert not saver.error
    assert [path.name for path in published_checkpoints(run.checkpoints)] == ["step-00000001"]
    assert caplog.messages == ["old checkpoints could not be removed (Input/output error)"]


def save_three(world: World, run: Run) -> tuple[list[str], list[str]]:
    """Save three times, where rank one cannot write its second part; return the errors and checkpoints after each save."""
    init_process_group(world, torch.device("cpu"), timedelta(minutes=1))
    consensus = StopConsensus(world)
    writer = CheckpointWriter(run, world, 1, CheckpointOptions(async_save=True, keep_last=5))
    said, there = [], []
    for step in (1, 2, 3):
        part: Any = (lambda: 0) if step == 2 and world.rank == 1 else torch.full((1000,), step)
        writer.save(replace(PROGRESS, step=step), {f"rank-{world.rank}.pt": part}, consensus)
        writer.wait_until_finished(consensus)
        said.append(writer.error)
        there.append(" ".join(sorted(path.name for path in run.checkpoints.iterdir())))
        consensus.reduce_max(0)  # no rank saves again before all have looked
    destroy_process_group()
    return said, there


def test_no_rank_waits_for_one_that_cannot_write_its_part(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "x")
    run.log(1, 0)  # makes the folder of attempt 1
    (zero, there), (one, _) = fork_ranks(lambda world: save_three(world, run), ranks=2)
    said = "the checkpoint of step 2 could not be written ("
    assert zero[0] == zero[2] == one[0] == one[2] == ""
    assert zero[1].startswith(f"{said}rank 1: Can't pickle ") and one[1].startswith(f"{said}Can't pickle ")
    assert there == ["step-00000001", "step-00000001", "step-00000001 step-00000003"]
    found = latest_checkpoint(run.checkpoints)
    assert found is not None and (found.step, found.manifest.world_size) == (3, 2)


def save_with_a_hanging_disk(world: World, run: Run, options: CheckpointOptions, signalled: bool) -> str:
    """Save twice; in the second save the file of rank one cannot be opened. Return the error that ends the wait."""
    init_process_group(world, torch.device("cpu"), timedelta(minutes=1))
    consensus, signals = StopConsensus(world), SignalReceiver()
    saver = CheckpointWriter(run, world, 1, options, signals)
    try:
        for step in (1, 2):
            if step == 2 and world.rank == 1:
                (run.checkpoints / ".step-00000002.1").mkdir()
                os.mkfifo(run.checkpoints / ".step-00000002.1" / "rank-1.pt")
            saver.save(replace(PROGRESS, step=step), {f"rank-{world.rank}.pt": torch.ones(9)}, consensus)
            if signalled and step == 2:
                signals.received = signal.SIGTERM
            saver.wait_until_finished(consensus)
    except SaveError as error:
        return error.message
    return ""


@pytest.mark.parametrize("signalled", [False, True])
def test_all_ranks_name_the_rank_whose_disk_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signalled: bool) -> None:
    run = Run.create(tmp_path, "x")
    run.log(1, 0)
    monkeypatch.setattr(writer, "SHUTDOWN_SECONDS", 1)
    options = CheckpointOptions(timeout_seconds=1000 if signalled else 0.5)
    for said in fork_ranks(lambda world: save_with_a_hanging_disk(world, run, options, signalled), ranks=2):
        assert said.startswith("rank 1 has not written its files of the checkpoint of step 2 in ")
    assert [path.name for path in published_checkpoints(run.checkpoints)] == ["step-00000001"]


def test_a_save_may_take_longer_the_more_it_writes(tmp_path: Path) -> None:
    options = CheckpointOptions(timeout_seconds=0.5, min_mb_per_second=1e-3, async_save=False)
    saver = CheckpointWriter(Run.create(tmp_path, "x"), World(), 0, options)
    saver.save(PROGRESS, {"rank-0.pt": torch.ones(1000)}, StopConsensus(World()))
    assert saver._limit == pytest.approx(0.5 + 4000 / 1e3)


def test_the_best_that_is_published_stays_when_a_better_one_was_not_saved(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "x")
    saver = CheckpointWriter(run, World(), 0, CheckpointOptions(monitor="val/accuracy", keep_last=1, async_save=False))
    for step, score in ((1, 0.8), (2, 0.9), (3, 0.5), (4, 0.7)):
        part: Any = (lambda: 0) if step == 2 else torch.ones(3)
        saver.save(replace(PROGRESS, step=step), {"rank-0.pt": part}, StopConsensus(World()))
        saver.scores[step] = score
    assert [path.name for path in published_checkpoints(run.checkpoints)] == ["step-00000004", "step-00000001"]


def fail_to_save(world: World, run: Run) -> list[str]:
    """Save three times without success, where rank one is late; return what is in the folder after each save."""
    init_process_group(world, torch.device("cpu"), timedelta(minutes=1))
    consensus = StopConsensus(world)
    saver = CheckpointWriter(run, world, 2, CheckpointOptions())
    if world.is_rank_zero:
        saver.remove_debris()
        (run.folder / ".weights.safetensors.999999").touch()  # an export of the run that trains
    found = []
    for step in (1, 2, 3):
        parts: Any = [lambda: 0, Late()][world.rank]
        saver.save(replace(PROGRESS, step=step), {f"rank-{world.rank}.pt": parts}, consensus)
        saver.wait_until_finished(consensus)
        found.append(" ".join(path.name for path in run.checkpoints.iterdir()))
        consensus.reduce_max(0)
    destroy_process_group()
    return found


class Late:
    """Takes a moment to pickle, and fails."""

    def __reduce__(self) -> str:
        time.sleep(0.3)
        raise ValueError("late")


def test_failed_and_killed_saves_leave_nothing(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "x")
    run.log(2, 0)
    for name in (".step-00000007.1", ".step-00000009.2", ".step-00000003.gone", ".step-00000009.3"):
        (run.checkpoints / name).mkdir()
    for name in (".metrics.csv.999999", ".result.json.999999", ".status.json.999999"):
        (run.folder / name).touch()
    (zero, _) = fork_ranks(lambda world: fail_to_save(world, run), ranks=2)
    assert zero == [".step-00000009.3"] * 3  # a newer attempt may be writing that
    assert [path.name for path in run.folder.glob(".*")] == [".weights.safetensors.999999"]


def test_every_n_minutes(launch: Launch) -> None:
    often = (
        "--checkpoint.every_n_minutes",
        "0.001",
        "--checkpoint.keep_last",
        "99",
        "--trainer.limit_val_batches",
        "0",
        "--trainer.max_epochs",
        "10",
    )
    run = launch("--ranks", "2", *SMALL, *often)
    assert run.status == 0
    assert len(published_checkpoints(run.folder / "checkpoints")) > 2


def test_the_best_are_kept_beside_the_newest(launch: Launch) -> None:
    best = ("--checkpoint.monitor", "val/accuracy", "--checkpoint.save_top_k", "2", "--checkpoint.keep_last", "1")
    run = launch(*SMALL, *best, "--trainer.max_epochs", "6", "--model.lr", "0.03")
    scores = json.loads((run.folder / "checkpoints" / "scores.json").read_text())
    assert len(scores) == 6
    # The last checkpoint is saved, and old ones are removed, before its validation.
    ranked = sorted((int(step) for step in scores if step != "120"), key=lambda step: (scores[str(step)], step), reverse=True)
    there = {int(path.name.removeprefix("step-")) for path in published_checkpoints(run.folder / "checkpoints")}
    assert there == {120, *ranked[:2]}


def test_checkpoints_are_in_the_order_of_their_steps_beyond_eight_digits(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "x")
    for step in (99_999_998, 100_000_000, 99_999_999):
        (run.checkpoints / f"step-{step:08}").mkdir()
    steps = [int(path.name.removeprefix("step-")) for path in published_checkpoints(run.checkpoints)]
    assert steps == [100_000_000, 99_999_999, 99_999_998] and run.latest_saved_step == 100_000_000
