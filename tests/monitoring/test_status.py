"""Progress counts optimizer steps, also where several optimizers step in one batch."""

import json
import re
from pathlib import Path
from typing import cast

import pytest
from lightning.pytorch.core.optimizer import LightningOptimizer
from support.faults import fault
from support.runs import Launch, resume_run
from support.toy_model import TwoOptimizers
from torch import Tensor

TOY = (
    *("--model", f"{__name__}.Alternating", "--data", "support.toy_model.ToyData", "--data.workers", "0"),
    *("--trainer.limit_val_batches", "0", "--trainer.limit_train_batches", "8", "--trainer.log_every_n_steps", "1"),
)


class Alternating(TwoOptimizers):
    """Each batch is a step of both optimizers."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in cast(list[LightningOptimizer], self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


@pytest.mark.parametrize(("limits", "steps"), [(("--trainer.max_epochs", "2"), 32), (("--trainer.max_steps", "20"), 20)])
def test_several_optimizers(launch: Launch, tmp_path: Path, limits: tuple[str, ...], steps: int) -> None:
    saved = ("--checkpoint.every_n_steps", "5", "--checkpoint.keep_last", "9", "--checkpoint.async_save", "false")
    run = launch(*TOY, *limits, *saved, *fault(tmp_path / "once", "SIGKILL", step=18))
    assert resume_run(launch, run).status == 0
    status = json.loads((run.folder / "status.json").read_text())
    assert (run.result["global_step"], status["step"], status["steps"]) == (steps, steps, steps)
    published = {path.name for path in (run.folder / "checkpoints").glob("step-*")}
    assert {f"step-{step:08}" for step in (6, 10, 16, 20)} <= published  # the first steps past the multiples of five
    # A line for each epoch, with what the module logs, also at the end of the epoch, which Lightning logs last.
    text = (run.folder / "logs/2/node-0/0.log").read_text()
    names = ("loss_epoch", "loss_step", "mean", "most")
    assert re.search(
        r"epoch 2/(2|20)  " + "  ".join(rf"train/{name} \S+" for name in names) + r"  \d+% waiting for data$",
        text,
        re.MULTILINE,
    )
