"""Distributed training that keeps every rank in lockstep.

The functions for notebooks and scripts are imported at their first use, so that ``import lockstep`` takes no time.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers take it as True; importing typing would take longer than this module

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
else:  # hidden from type checkers, which would accept any name

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
