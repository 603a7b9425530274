"""One line names the bottleneck of the input; the times are measured in the workers."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from support.runs import Launch
from support.toy_model import ToyData
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lockstep.core import World
from lockstep.data.loading import DataSharding
from lockstep.monitoring.data_wait import DataWaitAdvisor, InputTimes


@pytest.mark.parametrize(
    ("times", "workers", "line"),
    [
        (InputTimes(70, 2, 30, 60, 0, 600), 3, "waited 46% .*bottleneck is the copy to the device \\(43%\\); .*pin_memory"),
        (
            InputTimes(70, 30, 0, 60, 50, 600),
            3,
            "the bottleneck is the disk \\(100.0 ms for a sample, 83.3 of them to read it\\); .* pack",
        ),
        (InputTimes(70, 30, 0, 30, 5, 600), 0, "the training process itself .* on one of 4 CPUs .*; set data.num_workers to 3"),
        (InputTimes(70, 30, 0, 65, 5, 600), 1, "too few workers, 1 for 4 CPUs .*; set data.num_workers to 3"),
        (InputTimes(70, 30, 0, 200, 0, 600), 3, "the bottleneck is decoding .*--cpus-per-rank.*data.decode gpu"),
        (InputTimes(70, 30, 0, 20, 0, 600), 3, "its 3 workers are busy for only 10%"),
        (InputTimes(70, 30, 0, 0, 0, 0), 3, "the loader is not its own"),
    ],
)
def test_one_line_names_the_bottleneck(times: InputTimes, workers: int, line: str) -> None:
    advisor = DataWaitAdvisor(cpus=4)
    said = advisor.update(times, workers)
    assert said is not None and re.search(line, said), said
    assert advisor.update(times, workers) is None  # once


def test_a_short_wait_says_nothing() -> None:
    advisor, half = DataWaitAdvisor(cpus=4), InputTimes(40, 20, 0, 100, 0, 600)
    assert advisor.update(half, 3) is None and advisor.update(InputTimes(1, 0.1), 3) is None
    assert advisor.update(half, 3) is None and advisor.update(half, 3) is not None


class Slow(Dataset[int]):
    """Samples of a millisecond, half of it to read."""

    read_seconds = 0.0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> int:
        time.sleep(0.001)
        self.read_seconds += 0.0005
        return index


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_measure_their_time(workers: int) -> None:
    loader: Any = DataSharding(World(), 0).shard(DataLoader(Slow(), batch_size=4, num_workers=workers))
    for _ in range(2):
        assert len(list(loader)) == 6
    busy, read, samples = loader.preparation_times
    assert samples == 48 and read == pytest.approx(0.024) and busy >= 0.048


class SlowPoints(Dataset[tuple[Tensor, Tensor]]):
    """Points that take a millisecond each."""

    def __init__(self, points: Dataset[tuple[Tensor, Tensor]]) -> None:
        self.points = points

    def __len__(self) -> int:
        return len(self.points)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(0.001)
        return self.points[index]


class SlowData(ToyData):
    """Slow points, prepared by the training process."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(SlowPoints(super().train_dataloader().dataset), batch_size=12)


def test_a_run_says_that_it_waits(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lockstep.monitoring.data_wait.SECONDS", 0.05)
    toy = ("--model", "support.toy_model.TiedAndFrozen", "--data", f"{__name__}.SlowData", "--trainer.limit_val_batches", "0")
    run = launch(*toy, "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "2", "--run.test_after_fit", "false")
    assert run.status == 0
    text = Path(run.folder, "logs/1/node-0/0.log").read_text()
    assert text.count("the training process itself prepares samples") == 1
