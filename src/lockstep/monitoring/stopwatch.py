"""Measure where the seconds of a run go."""

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lockstep.runs import AttemptStart, Durations, Run


class Stopwatch(Callback):
    """Attribute each second of a run to one part of ``Durations``, over all attempts.

    Args:
        run: The run.
        attempt: This attempt; earlier ones count as lost unless ``resume`` is called.
    """

    def __init__(self, run: Run, attempt: int) -> None:
        now = time.time()
        starts = (AttemptStart.read(run.start_record(number)) for number in (1, attempt))
        first, own = (now if start is None else min(now, start.time) for start in starts)
        self._seconds = {"starting": now - own, "lost": max(0.0, own - first)}
        self._part, self._since = "starting", time.monotonic()

    def resume(self, seconds: Mapping[str, float], saved_at: float) -> None:
        """Continue from a checkpoint with ``seconds`` by part; ``saved_at`` is the time of saving, in seconds since 1970."""
        self._seconds = dict(seconds)
        self._seconds["lost"] = self._seconds.get("lost", 0.0) + max(0.0, time.time() - saved_at)
        self._part, self._since = "lost", time.monotonic()

    def seconds(self) -> dict[str, float]:
        """Seconds until now, by part."""
        current = self._seconds.get(self._part, 0.0) + time.monotonic() - self._since
        return {**self._seconds, self._part: current}

    def durations(self) -> Durations:
        """Seconds until now, to the millisecond."""
        parts = {part: round(seconds, 3) for part, seconds in self.seconds().items()}
        return Durations(**parts, total=round(sum(parts.values()), 3))

    def enter(self, part: str) -> None:
        """Attribute the time from now on to this ``part``."""
        self._seconds, self._part, self._since = self.seconds(), part, time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.enter("training")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.enter("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.enter("training" if trainer.state.fn == "fit" else "other")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.enter("test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.enter("prediction")

    def _enter_other(self, *_: Any, **__: Any) -> None:
        self.enter("other")

    on_train_start = on_train_epoch_end = on_test_end = on_predict_end = on_exception = _enter_other
