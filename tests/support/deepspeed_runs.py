"""Arguments of small ZeRO runs."""

from support.runs import REPO

RUN = (
    *("--config", str(REPO / "configs/digits.yaml"), "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1"),
    *("--model.network", "lockstep.models.MLP", "--model.network.hidden", "[64,96]", "--checkpoint.every_n_steps", "7"),
    *("--data.batch_size", "128"),
)
"""Three epochs of 10 steps; saved after steps 7, 10, 14, 20, …"""


def zero(stage: int, ranks: int) -> list[str]:
    """Arguments for a ZeRO stage and a number of ranks."""
    return ["--strategy", "deepspeed", "--deepspeed.stage", str(stage), "--ranks", str(ranks)]
