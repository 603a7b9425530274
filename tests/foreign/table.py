"""The table: how people use Lightning, and what lockstep does with it. Each area is a module with ``ROWS``."""

from foreign import callbacks, hooks, loaders, logs, modules, optimizers, randomness, samplers, stopping
from foreign.base import Row

TABLE: dict[str, tuple[Row, ...]] = {
    "Callbacks": callbacks.ROWS,
    "Logging": logs.ROWS,
    "Samplers": samplers.ROWS,
    "Loaders and datasets": loaders.ROWS,
    "Random numbers": randomness.ROWS,
    "Optimizers": optimizers.ROWS,
    "Hooks": hooks.ROWS,
    "Modules": modules.ROWS,
    "Precision": stopping.PRECISION,
    "Limits": stopping.LIMITS,
}
