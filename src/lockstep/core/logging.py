"""Log to standard error with the rank in front; ranks other than zero, and Lightning, log warnings and errors only."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

from lockstep.core.terminal import columns, fold
from lockstep.core.world import World


def setup_logging(world: World, file: Path | None = None) -> None:
    """Send the log of lockstep to standard error and, on rank zero, to ``file`` as well."""
    prefix = f"[rank {world.rank}] " if world.size > 1 else ""
    formatter = logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S")
    logger = logging.getLogger("lockstep")
    reset_logging()
    logger.addHandler(_StandardError())
    if file is not None and world.is_rank_zero:
        is_stderr = file.exists() and os.path.samestat(file.stat(), os.fstat(2))
        if not is_stderr:
            logger.addHandler(logging.FileHandler(file))
    for handler in logger.handlers:
        handler.setFormatter(formatter)
    logger.setLevel(logging.INFO if world.is_rank_zero else logging.WARNING)
    logger.propagate = False
    # Lightning 2.6 calls an API that torch 2.15 deprecates.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    # A run that starts from another run's checkpoint has its own checkpoint folder.
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    # Lightning warns wherever Slurm is installed.
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # These log only what a config asks for.
    for name in ("callbacks.early_stopping", "callbacks.model_summary", "profilers.profiler"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)


def reset_logging() -> None:
    """Remove the handlers of ``setup_logging``: a process may train more than once."""
    logger = logging.getLogger("lockstep")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to the current ``sys.stderr``, which a progress line replaces; folds long lines on a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self.stream.isatty() or "\n" in text:
            return text
        return fold(text, columns(self.stream) - 1, indent=len("10:52:59 "))
