"""Saving and keeping: state that cannot be saved, then the writers of real ranks, then real runs."""

import hashlib
import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import SMALL, Launch

from lockstep.checkpoint.manifest import Manifest, Progress
from lockstep.checkpoint.reader import latest_checkpoint, published_checkpoints, read_checkpoint
from lockstep.checkpoint.serialization import allow_numpy_globals, check_loadable
from lockstep.checkpoint.writer import CheckpointWriter
from lockstep.config.schema import CheckpointOptions
from lockstep.core.errors import RunError
from lockstep.core.world import World
from lockstep.distributed.consensus import StopConsensus
from lockstep.distributed.process_group import destroy_process_group, init_process_group
from lockstep.distributed.ranks import fork_ranks
from lockstep.runs.attempts import Attempt, append_attempt, read_attempts
from lockstep.runs.run import Owner, Run


class Thing:
    """What no checkpoint can hold."""


def test_what_could_not_be_loaded_again_is_refused_with_its_place() -> None:
    allow_numpy_globals()
    check_loadable({"weights": {"a": torch.ones(3)}, "numbers": [1, 2.5, None, "text"], "more": np.float64(1), "n": np.ones(2)})
    with pytest.raises(RunError, match=r"cannot hold \['callbacks'\]\['Mine'\] \(\S*test_writer\.Thing\)"):
        check_loadable({"callbacks": {"Mine": Thing()}})
    with pytest.raises(RunError, match=r"cannot hold \['function'\]"):
        check_loadable({"function": lambda: 0})


def test_half_a_line_of_attempts_is_left_out(tmp_path: Path) -> None:
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
    del content["progress"]["epoch"]
    for text in (json.dumps(content), "[]", "{}", "1", '{"files": [], "progress": 1}', "{"):
        (tmp_path / "manifest.json").write_text(text)
        complaints: list[str] = []
        assert read_checkpoint(tmp_path, complaints.append) is None
        assert complaints[0].startswith(f"checkpoint {tmp_path} is damaged and is ignored: manifest.json is not a manifest (")


def save_three(world: World, run: Run) -> tuple[list[str], list[str]]:
    """Save thrice; the second time, rank one cannot write its part. What each rank says, and what is there each time."""
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
        consensus.reduce_max(0)  # nobody begins to save again before all have looked
    destroy_process_group()
    return said, there


def test_nobody_waits_for_a_rank_that_cannot_write_its_part(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "x")
    assert run.claim_attempt(Owner(job="7")) == 1
    (zero, there), (one, _) = fork_ranks(lambda world: save_three(world, run), ranks=2)
    assert zero == ["", "the checkpoint of step 2 could not be written (rank 1 could not write its part; its log says why)", ""]
    assert one[0] == one[2] == "" and "the checkpoint of step 2 could not be written" in one[1]
    assert there == ["step-00000001", "step-00000001", "step-00000001 step-00000003"]
    found = latest_checkpoint(run.checkpoints)
    assert found is not None and (found.step, found.manifest.world_size) == (3, 2)


def test_saved_every_so_many_minutes(launch: Launch) -> None:
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
    # The last one is saved before its validation, which is after the cleaning up.
    ranked = sorted((int(step) for step in scores if step != "120"), key=lambda step: (scores[str(step)], step), reverse=True)
    there = {int(path.name.removeprefix("step-")) for path in published_checkpoints(run.folder / "checkpoints")}
    assert there == {120, *ranked[:2]}
