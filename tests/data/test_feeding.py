"""Batches are copied one ahead on a side stream, which a fake records; what a run computes does not change."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from support.faults import fault
from support.runs import Launch, resume_run
from support.toy_model import ToyData
from torch import Tensor
from torch.utils.data import DataLoader

from lockstep.data.loading import feeding
from lockstep.data.loading.feeding import DeviceFeeder, FeedingFetcher


class FakeStream:
    """A stream that records its calls."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record_event(self) -> str:
        self.log.append(f"{self.name} records")
        return f"event {sum('records' in line for line in self.log)}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


class FakeStreams:
    """What ``torch.cuda`` has."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def Stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self.log, "side")

    def current_stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self.log, "main")

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.log.append(f"{stream.name} copies")
        yield


class Unsized:
    """A loader without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@pytest.mark.parametrize("sized", [True, False])
def test_a_batch_is_sent_before_the_one_before_it_is_used(sized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    streams, other = FakeStreams(), object()
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: streams.log.append(f"{stream.name} uses"))
    fetcher = FeedingFetcher(DeviceFeeder(torch.device("meta"), streams))
    batches = [{"x": torch.ones(number), "other": other} for number in range(3)]
    loader: Any = DataLoader(batches, batch_size=None) if sized else Unsized(batches)  # type: ignore[arg-type]
    fetcher.setup(CombinedLoader(loader, "min_size"))
    found = []
    for batch, number, _ in fetcher:
        assert batch["x"].device.type == "meta" and len(batch["x"]) == number and batch["other"] is other
        assert len(fetcher.batches) == (number < 2) and fetcher.done == (number == 2)
        found.append(number)
    assert found == [0, 1, 2]
    copy, uses = (
        ["side copies", "side records"],
        [["main waits for event 1", "main uses"], ["main waits for event 2", "main uses"]],
    )
    assert streams.log == [*copy, *copy, *uses[0], *copy, *uses[1], "main waits for event 3", "main uses"]


class MovesItself(ToyData):
    """Moves its batches itself."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


def test_a_run_that_is_fed_computes_and_resumes_the_same(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = (
        *("--model", "support.toy_model.TiedAndFrozen", "--trainer.max_epochs", "2", "--trainer.limit_val_batches", "0"),
        *("--checkpoint.every_n_steps", "5", "--checkpoint.async_save", "false", "--run.test_after_fit", "false"),
    )
    data = ("--data", "support.toy_model.ToyData")
    plain = launch(*toy, *data)
    streams = FakeStreams()
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(feeding, "make_feeder", lambda device: DeviceFeeder(device, streams))
    killed = launch(*toy, *data, *fault(tmp_path / "once", "SIGKILL", step=27))
    assert killed.status != 0 and killed.newest.step == 25
    resumed = resume_run(launch, killed)
    assert resumed.status == 0 and resumed.result["weights_sha256"] == plain.result["weights_sha256"]
    own = launch(*toy, "--data", f"{__name__}.MovesItself")
    text = "MovesItself defines transfer_batch_to_device, which gets batches on the CPU"
    assert text in Path(own.folder, "logs/1/node-0/0.log").read_text()
    assert own.result["weights_sha256"] == plain.result["weights_sha256"]
