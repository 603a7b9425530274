"""What comes after the ranks of a Slurm job have ended: nothing, another start right here, or the queue.

The batch script asks, outside of srun. ``start`` prints the number of the next attempt and when the allocation ends.
``finish STATUS`` prints ``restart`` (in this allocation), ``requeue`` (wait for another one), or the exit status of the job.
Every end is noted in ``attempts.jsonl``.
"""

from collections.abc import Sequence

import yaml

from lockstep.config import RunOptions
from lockstep.runs import Attempt, Run

RESTART, REQUEUE = "restart", "requeue"


_SAME_FAILURE_LIMIT = 2
"""So many ends in a row at the same step for the same reason are a bug, and no bad luck."""


_NO_PROGRESS_LIMIT = 25
"""So many starts in a row without a new checkpoint end a run, whatever they died of."""


def reason_to_give_up(run: Run, ended: Sequence[Attempt], told: bool) -> str:
    """Why another start would end like these; empty if it need not.

    Args:
        run: The run.
        ended: All of its attempts.
        told: Whether the last one told its reason; a kill from outside has none, and may come twice.
    """
    last = ended[-1]
    config = yaml.safe_load(run.config.read_text()) if run.config.exists() else {}
    limit = config.get("run", {}).get("max_restarts", RunOptions.max_restarts)
    if sum(a.crashed for a in ended) > limit:
        return f"It has crashed more than run.max_restarts={limit} times; the last: {last.reason}"
    alike = [a for a in ended[-_SAME_FAILURE_LIMIT:] if a.crashed and (a.reason, a.saved) == (last.reason, last.saved)]
    if len(alike) == _SAME_FAILURE_LIMIT and told:
        return f"It has ended {_SAME_FAILURE_LIMIT} times in a row after the checkpoint of step {last.saved}: {last.reason}"
    fruitless = [a for a in ended[-_NO_PROGRESS_LIMIT:] if a.crashed and a.saved == last.saved]
    if len(fruitless) == _NO_PROGRESS_LIMIT:
        many = f"{_NO_PROGRESS_LIMIT} starts in a row have come to no new checkpoint after that of step {last.saved}"
        return f"{many}; the last: {last.reason}"
    return ""
