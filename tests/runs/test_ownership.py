"""One owner: simultaneous claims of a run, owners that have ended, and attempts whose run another owner has claimed.

Cheapest first: files alone, then processes that claim, then trainings that lose their run.
"""

import errno
import multiprocessing
import os
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
from support.faults import fault
from support.runs import Launch
from support.waiting import wait_until
from support.wandb_reader import read_history

from lockstep.core import Superseded, UsageError
from lockstep.runs import Failure, Owner, Run, RunProgress, RunResult, claim_heartbeat, write_failed_result
from lockstep.slurm import is_owner_alive

ROUNDS, CLAIMANTS = 200, 6


def test_a_run_whose_owner_cannot_be_read_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path, "x")
    run.claim_attempt(Owner(job="7"))

    def stale(path: Path) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", stale)
        with pytest.raises(OSError, match="Stale"):
            run.claim_attempt(Owner(job="8"))
    assert run.newest_attempt == 1


def claim(run: Run, owner: Owner) -> int | None:
    """The attempt that ``owner`` gets; None where another owner has the run."""
    try:
        return run.claim_attempt(owner, lambda other: is_owner_alive(other, {"PATH": ""}))
    except UsageError:
        return None


def claim_all(runs: list[Run], start: Any, results: Any) -> None:
    """Claim one run after another, each at the same moment as all other processes, and stay alive until all have claimed."""
    won = []
    for run in runs:
        start.wait()
        won.append(claim(run, Owner.this_process()))
    start.wait()
    results.send(won)


def test_of_many_processes_that_claim_a_run_at_once_one_gets_it(tmp_path: Path) -> None:
    runs = [Run.create(tmp_path, "x", str(number)) for number in range(ROUNDS)]
    context = multiprocessing.get_context("fork")
    start, pipes, processes = context.Barrier(CLAIMANTS), [], []
    for _ in range(CLAIMANTS):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=claim_all, args=(runs, start, sender)))
        processes[-1].start()
        sender.close()
        pipes.append(receiver)
    claims = [pipe.recv() for pipe in pipes if wait([pipe])]
    for process in processes:
        process.join()
    owners = [[attempt for attempt in attempts if attempt is not None] for attempts in zip(*claims, strict=True)]
    assert owners == [[1]] * ROUNDS
    assert not list(tmp_path.glob("*/*/logs/.claim-*"))


def test_an_owner_that_has_ended_is_replaced_and_its_process_number_may_be_used_again(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "x")
    gone = multiprocessing.get_context("fork").Process(target=lambda: claim(run, Owner.this_process()))
    gone.start()
    gone.join()
    assert claim(run, Owner.this_process()) == 2
    assert claim(run, Owner(job="7")) is None
    other = Run.create(tmp_path, "y")
    same_number = Owner(host=Owner.this_process().host, pid=os.getpid(), started="1")
    assert (claim(other, same_number), claim(other, Owner.this_process())) == (1, 2)


@pytest.mark.parametrize("owner", [Owner(job="7"), Owner(host="elsewhere", pid=1, started="1")])
def test_an_owner_that_cannot_be_queried_lives_while_it_reports(tmp_path: Path, owner: Owner) -> None:
    run = Run.create(tmp_path, "x")
    assert claim(run, owner) == 1
    RunProgress("training").write(run.status)
    assert claim(run, Owner.this_process()) is None
    assert run.living_owner(lambda owner: None) == owner
    ago = time.time() - 600
    RunProgress("interrupted").write(run.status)
    assert run.living_owner(lambda owner: None) is None
    RunProgress("training", time=ago).write(run.status)
    assert run.living_owner(lambda owner: None) == owner  # a long validation: it touches its claim
    os.utime(run.claim(1), (ago, ago))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lockstep.runs.ownership._HEARTBEAT_SECONDS", 0.01)
        with claim_heartbeat(run, 1):
            wait_until(lambda: run.living_owner(lambda owner: None) == owner, 5)
    os.utime(run.claim(1), (ago, ago))
    assert run.living_owner(lambda owner: None) is None
    assert claim(run, Owner.this_process()) == 2


def test_a_superseded_attempt_writes_no_result(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "x")
    assert (run.claim_attempt(Owner(job="7")), run.claim_attempt(Owner(job="8"))) == (1, 2)
    RunResult("finished", attempts=2).write(run.result)
    write_failed_result(run, 1, Failure(0, 1, 0, "", "ValueError: late"))
    assert RunResult.read(run.result) == RunResult("finished", attempts=2)
    with pytest.raises(Superseded, match=r"^job 8 has claimed the run .*: attempt 1 stops and writes nothing more\.$"):
        run.check_owner(1)
    run.check_owner(2)


def test_a_new_attempt_is_noticed_before_its_owner_is_in_the_run_folder(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "x")
    run.claim_attempt(Owner(job="7"))
    first = run.owner.read_text()
    run.claim_attempt(Owner(job="8"))
    run.owner.write_text(first)  # the claim of job 8 was interrupted, or this node does not see it yet
    assert run.is_superseded(1) and not run.is_superseded(2)


@pytest.mark.parametrize(
    ("mode", "group", "said"), [(0o775, 65534, True), (0o777, 0, True), (0o775, 0, False), (0o1777, 0, False)]
)
def test_a_folder_whose_runs_others_could_replace_is_refused(tmp_path: Path, mode: int, group: int, said: bool) -> None:
    if os.geteuid():
        pytest.skip("only root gives a folder to another group")
    root = tmp_path / "shared"
    root.mkdir()
    os.chown(root, 0, group)
    root.chmod(mode)
    if said:
        with pytest.raises(UsageError, match=f"others can write to {root}, .* choose another with --run.root"):
            Run.create(root, "x")
        assert not list(root.glob("*/*"))
    if mode == 0o777:  # anybody can rename what is anywhere in it
        with pytest.raises(UsageError, match=f"others can write to {root}, "):
            Run.create(root / "new/folder", "x")
        with pytest.raises(UsageError, match=f"others can write to {root}, "):  # before torch is imported
            Run.check_place(root / "new/folder", "x")
        assert not list(root.glob("*"))
        return
    old = os.umask(0o002)
    try:
        made = Run.create(root / "new", "x")
    finally:
        os.umask(old)
    assert made.folder.stat().st_mode & 0o777 == 0o700 and made.folder.parent.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("place", [".", "..", "../.."])
def test_a_run_that_others_could_replace_is_not_resumed(tmp_path: Path, place: str) -> None:
    run = Run.create(tmp_path, "x")
    run.config.touch()
    assert Run.open(run.folder) == run
    (run.folder / place).chmod(0o777)
    with pytest.raises(UsageError, match=r"others can write to .*, and so replace what a run keeps there; .*\(chmod go-w "):
        Run.open(run.folder)


@pytest.mark.parametrize("place", [".", "..", "../.."])
def test_a_run_of_another_user_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    run = Run.create(tmp_path, "x")
    run.config.touch()
    if os.geteuid():
        pytest.skip("only root gives a folder to another user")
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert Run.open(run.folder) == run  # root's
    os.chown(run.folder / place, 4321, -1)
    with pytest.raises(UsageError, match=r"belongs to another user \(uid 4321\), who may replace what a run keeps there"):
        Run.open(run.folder)


def test_runs_that_draw_the_same_id_get_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(["a", "a", "b"])
    monkeypatch.setattr("lockstep.runs.run.new_run_id", lambda: next(drawn))
    assert [Run.create(tmp_path, "x").id for _ in range(2)] == ["a", "b"]
    with pytest.raises(UsageError, match="cannot be written"):
        Run.create(tmp_path, "x", "a")
    (tmp_path / "y").touch()
    drawn = iter(["c"])
    with pytest.raises(UsageError, match="cannot be written"):
        Run.create(tmp_path, "y")


TOY = (
    *("--model", "support.toy_model.ToyModel", "--data", "support.toy_model.ToyData"),
    *("--data.samples", "96", "--data.workers", "0", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"),
)
"""16 steps, and a validation after each eight."""


@pytest.mark.usefixtures("drawn_report")
@pytest.mark.parametrize(
    ("ranks", "hook", "step", "rows", "options"),
    [
        ("1", "on_train_batch_end", 7, 6, ("--wandb.mode", "offline")),
        ("2", "on_train_batch_end", 1, 0, ("--trainer.log_every_n_steps", "8", "--model.seconds", "0.5")),
        ("2", "on_validation_batch_start", 8, 8, ()),
        ("1", "on_train_end", 0, 16, ()),
    ],
)
def test_whoever_loses_the_run_stops_and_writes_nothing(
    launch: Launch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    ranks: str,
    hook: str,
    step: int,
    rows: int,
    options: tuple[str, ...],
) -> None:
    run = launch("--ranks", ranks, *TOY, *options, *fault(tmp_path / "marker", "claim", hook=hook, step=step))
    assert run.status == 1
    assert "job another has claimed the run" in capfd.readouterr().err
    assert (run.folder / "result.json").read_text() == (run.folder / "status.json").read_text() == "{}"
    assert not (run.folder / "report.png").exists()
    metrics = run.folder / "metrics.csv"
    assert (len(run.series("train/loss_step")) if metrics.exists() else 0) == rows
    sent = rows if "offline" in options else 0
    # Its W&B service, which has not been told of an end, writes on for a moment.
    wait_until(lambda: len(read_history(run.folder)) == sent, 10, lambda: read_history(run.folder))
    assert not any(path.name > f"step-{max(rows, step):08}" for path in run.folder.glob("checkpoints/step-*"))
