"""Distributed training that keeps every rank in lockstep.

The functions for notebooks and scripts are imported when they are used first: ``import lockstep`` costs nothing.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # but for type checkers; to import typing takes longer than this module

if TYPE_CHECKING:
    from lockstep.cli.functions import (
        FinishedRun,
        LockstepError,
        RunError,
        RunResult,
        UsageError,
        fit,
        load,
        predict,
        read_metrics,
        read_result,
        submit,
        test,
        validate,
    )
else:  # not for type checkers, which would take any name for one that exists

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module 'lockstep' has no attribute {name!r}")
        from lockstep.cli import functions

        return getattr(functions, name)


__all__ = [
    "FinishedRun",
    "LockstepError",
    "RunError",
    "RunResult",
    "UsageError",
    "fit",
    "load",
    "predict",
    "read_metrics",
    "read_result",
    "submit",
    "test",
    "validate",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
