"""Arguments that inject a fault into a run."""

from pathlib import Path
from typing import Any


def fault(marker: str | Path, action: str, module: str = "support.fault_callbacks", **options: Any) -> list[str]:
    """Arguments that add a ``FaultCallback``.

    Args:
        marker: File that the callback creates when it acts.
        action: What it does.
        module: Name under which the run imports ``fault_callbacks``.
        options: The callback's other arguments.
    """
    options = {"action": action, "marker": marker, **options}
    return [
        f"--trainer.callbacks+={module}.FaultCallback",
        *(f"--trainer.callbacks.{name}={value}" for name, value in options.items()),
    ]
