"""Signals, the consensus on when to stop in forked ranks, and Lightning's own mechanisms disabled in a real run."""

import os
import pickle
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.runs import SMALL, Launch

from lockstep.core.world import World
from lockstep.distributed.consensus import StopConsensus
from lockstep.distributed.process_group import (
    destroy_process_group,
    enable_flight_recorder,
    init_process_group,
    write_flight_record,
)
from lockstep.distributed.ranks import fork_ranks
from lockstep.distributed.signals import SignalReceiver


def steps_until_stop(world: World) -> tuple[int, int]:
    """The step after which this rank stops, and the signal; rank 1 gets it after five steps, and is slower than rank 0."""
    init_process_group(world, torch.device("cpu"), timedelta(minutes=1))
    consensus = StopConsensus(world)
    for step in range(1, 1000):
        time.sleep(0.01 * (1 + world.rank))
        decision = consensus.poll(signal.SIGTERM if world.rank == 1 and step > 5 else 0, save=False)
        if decision.stop:
            consensus.close()
            destroy_process_group()
            return step, decision.stop
    raise AssertionError("no rank stopped")


def test_all_ranks_stop_after_the_same_step() -> None:
    stops = fork_ranks(steps_until_stop, nodes=1, ranks=3)
    assert len(set(stops)) == 1
    step, number = stops[0]
    assert 5 < step < 120 and number == signal.SIGTERM


def test_the_first_signal_is_recorded_and_a_second_ctrl_c_raises() -> None:
    signals, before = SignalReceiver(), signal.getsignal(signal.SIGTERM)
    with signals.installed():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


class AssertNoLightningSignals(Callback):
    """Fails if Lightning has replaced the signal handlers, or broadcasts at a step."""

    def on_train_start(self, trainer: Trainer, *_: object) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        assert getattr(handler, "__self__", None).__class__ is SignalReceiver, handler

        def broadcast(*_: object, **__: object) -> None:
            raise AssertionError("lightning broadcasts at each step")

        torch.distributed.broadcast = broadcast

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        assert type(trainer.fit_loop).__module__ == type(trainer.fit_loop.epoch_loop).__module__ == "lockstep.trainer.loops"


def test_lightnings_own_signal_handling_and_its_broadcast_are_off(launch: Launch) -> None:
    assert (
        launch(
            "--ranks", "2", *SMALL, f"--trainer.callbacks+={__name__}.AssertNoLightningSignals", "--run.test_after_fit", "false"
        ).status
        == 0
    )


def test_the_flight_recorder_is_enabled_and_keeps_variables_of_the_user(tmp_path: Path) -> None:
    env = {"TORCH_FR_BUFFER_SIZE": "7"}
    enable_flight_recorder(tmp_path, env)
    trace = f"{tmp_path}/nccl-trace-"
    assert env == {"TORCH_FR_BUFFER_SIZE": "7", "TORCH_FR_DUMP_ON_TIMEOUT": "1", "TORCH_FR_DUMP_TEMP_FILE": trace}


def test_a_rank_that_hangs_leaves_its_newest_collectives(tmp_path: Path) -> None:
    def hang(world: World) -> dict[str, Any]:
        enable_flight_recorder(tmp_path, os.environ)
        init_process_group(world, torch.device("cpu"), timedelta(seconds=30))
        torch.distributed.all_reduce(torch.ones(3))
        write_flight_record(world, os.environ)
        destroy_process_group()
        record: dict[str, Any] = pickle.loads((tmp_path / f"nccl-trace-{world.rank}").read_bytes())
        return record

    for record in fork_ranks(hang, 1, 2):
        (entry,) = record["entries"]
        assert entry["profiling_name"] == "gloo:all_reduce" and entry["input_sizes"] == [[3]]
        assert "hang" in [frame["name"] for frame in entry["frames"]]
    write_flight_record(World(), {"TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "none")})  # without a process group
    assert not (tmp_path / "none0").exists()
