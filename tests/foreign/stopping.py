"""Limits, validation intervals and precision."""

from typing import Any

from support.runs import Outcome

from foreign.base import Regression, Row


class StopsItself(Regression):
    """Stops from a hook of the module, at the end of the first epoch that is good enough."""

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == 1:
            self.trainer.should_stop = True


class StopsInStep(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 9:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


def steps(number: int) -> Any:
    """A check that the run took ``number`` steps."""

    def check(run: Outcome) -> None:
        assert run.result["global_step"] == number

    return check


LIMITS = (
    Row("`max_steps`", "--trainer.max_epochs -1 --trainer.max_steps 10", check=steps(10)),
    Row("`max_time`, not reached", "--trainer.max_time 00:01:00:00", check=steps(12)),
    Row("`should_stop` in a hook of the module", "--trainer.max_epochs 5", StopsItself, check=steps(12)),
    Row("`should_stop` in `training_step`", "--trainer.max_epochs 5", StopsInStep, check=steps(10)),
    Row("… with `min_epochs`", "--trainer.max_epochs 5 --trainer.min_epochs 3", StopsInStep, kill_step=15, check=steps(18)),
    Row("`limit_train_batches`, a number", "--trainer.limit_train_batches 5 --trainer.limit_val_batches 2", check=steps(10)),
    Row(
        "`limit_train_batches`, a fraction",
        "--trainer.limit_train_batches 0.5 --trainer.max_epochs 4",
        kill_step=11,
        check=steps(12),
    ),
    Row("`val_check_interval`, a number", "--trainer.val_check_interval 2"),
    Row("`val_check_interval`, a fraction", "--trainer.val_check_interval 0.5"),
    Row(
        "`val_check_interval` over epochs",
        "--trainer.val_check_interval 5 --trainer.check_val_every_n_epoch null",
        kill_step=11,
    ),
    Row("`check_val_every_n_epoch`", "--trainer.check_val_every_n_epoch 2 --trainer.max_epochs 3", kill_step=15),
    Row("`overfit_batches`", "--trainer.overfit_batches 2 --trainer.max_epochs 6", kill_step=11, check=steps(12)),
    Row("`num_sanity_val_steps: 0`", "--trainer.num_sanity_val_steps 0"),
    Row("`limit_val_batches: 0`", "--trainer.limit_val_batches 0"),
)

PRECISION = (
    Row("`precision: 32-true`", "--trainer.precision 32-true"),
    Row("`precision: 64-true`", "--trainer.precision 64-true"),
    Row("`precision: bf16-mixed`", "--trainer.precision bf16-mixed", per_rank="bfloat16 rounds to two digits"),
    Row("`precision: bf16-true`", "--trainer.precision bf16-true", per_rank="bfloat16 rounds to two digits"),
)
