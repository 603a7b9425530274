"""A metric that should rank checkpoints and is not logged: misspelt or late, in this process; then a run of two ranks."""

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from support.runs import SMALL, Launch

from lockstep.checkpoint.checksums import FileSums, write_file
from lockstep.checkpoint.monitor import check_monitor


class Late(Callback):
    """Logs a metric of each tenth epoch."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch % 10 == 9:
            for name in ("val", "test"):
                pl_module.log(f"{name}/fid", 1.0)


class Own(LightningModule):
    def on_train_epoch_end(self) -> None:
        self.log("summary", 1.0)


@pytest.mark.parametrize("name", ["val/fid", "summary_epoch", "accuracy of another module"])
def test_a_metric_that_may_come_later_only_warns(caplog: pytest.LogCaptureFixture, name: str) -> None:
    settings: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(accelerator="cpu", callbacks=[Late()], enable_checkpointing=False, **settings)
    logged = {"val/fix": 1.0, "summery": 1.0}
    with mock.patch.object(Trainer, "callback_metrics", logged):
        check_monitor(name, trainer, Own())
    assert f"checkpoint.monitor: '{name}' is not logged yet" in caplog.text


def test_a_misspelt_metric_ends_the_run_at_its_first_validation(
    launch: Launch, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_slowly(path: Path, content: Any) -> FileSums:
        time.sleep(1)  # validation ends before the save
        return write_file(path, content)

    monkeypatch.setattr("lockstep.checkpoint.writer.write_file", write_slowly)
    run = launch("--ranks", "2", *SMALL, "--checkpoint.monitor", "val_acc")
    assert run.status == 1 and len(list(run.folder.glob("checkpoints/step-*"))) == 1
    sentence = "lockstep: checkpoint.monitor: 'val_acc' is not logged; did you mean 'val/accuracy'? Resume with --checkpoint."
    assert sentence in capfd.readouterr().err
