"""A check that training resumes with the weights that were restored."""

import logging
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lockstep.checkpoint.weight_sums import weight_sums
from lockstep.strategies import DeepSpeed

log = logging.getLogger(__name__)


class RestoredWeights(Callback):
    """Warns if a hook changes the restored weights before training resumes: it would do so at each restart."""

    def __init__(self) -> None:
        self._sums: dict[str, int] = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        if trainer.state.fn == "fit" and not isinstance(trainer.strategy, DeepSpeed):  # whose engine restores weights later
            self._sums = _sums_by_name(pl_module)

    def check(self, trainer: Trainer) -> None:
        """Log which hooks may have changed the weights, if some have changed; called before the first step."""
        before, self._sums = self._sums, {}
        now = _sums_by_name(trainer.lightning_module) if before else {}
        if changed := [name for name, value in now.items() if before.get(name) != value]:
            hooks = [
                f"{hook} of {type(owner).__name__}"
                for owner in (*trainer.callbacks, trainer.lightning_module)  # type: ignore[attr-defined]
                for hook in ("on_fit_start", "on_train_start")
                if is_overridden(hook, owner) and not type(owner).__module__.startswith("lockstep.")
            ]
            log.warning(
                "%s changed %d restored weights, first %s: each restart overwrites what training has learned; set weights in "
                "setup or configure_model, which run before the checkpoint is restored.",
                *(" or ".join(hooks) or "a hook", len(changed), changed[0]),
            )


def _sums_by_name(module: LightningModule) -> dict[str, int]:
    state = module.state_dict()
    return dict(zip(state, weight_sums(state.values()).tolist(), strict=True))
