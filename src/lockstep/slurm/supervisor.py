"""The supervisor of a Slurm job, which its batch script calls before and after each attempt, outside of srun.

``python -m lockstep.slurm.supervisor FOLDER start [SEEN]`` claims an attempt and prints its number, when the job ends, and the
port and the key of the agents. ``… FOLDER finish STATUS`` records the attempt and prints what follows: ``restart`` (in this
allocation), ``requeue`` (wait for another one), or the exit status of the job.

It may run in a container without Slurm's commands, so the batch script pipes in the output of squeue for
``client.RUNNING_JOBS``. The last line is ``end`` if Slurm has answered.
"""

import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from lockstep.compat.submitit import load_task
from lockstep.core import LockstepError
from lockstep.runs import Run
from lockstep.slurm.restart_policy import ALREADY_FINISHED, ASK_AGAIN
from lockstep.slurm.restarts import AlreadyFinished, SlurmView, UnknownOwner, finish, start


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """Run ``FOLDER start [SEEN]`` or ``FOLDER finish STATUS`` and return the exit status."""
    slurm, what, *rest = Path(arguments[0]), *arguments[1:]
    jobs = ""
    try:
        run = Run(load_task(slurm / f"{env['LOCKSTEP_JOB']}_submitted.pkl").folder)
        jobs = sys.stdin.read()
        if what == "start":
            view = SlurmView.parse(jobs, env, *map(int, rest))
            end = view.my_job.end if view.my_job is not None else 0
            print(start(run, slurm, view, env), end, _free_port(), secrets.token_hex(32))
        else:
            print(finish(run, slurm, int(rest[0]), SlurmView.parse(jobs, env), env))
        return 0
    except UnknownOwner as unknown:
        print(unknown.attempt)
        return ASK_AGAIN
    except AlreadyFinished:
        return ALREADY_FINISHED
    except LockstepError as error:
        is_unknown = what == "start" and jobs.splitlines()[-1:] != ["end"]  # whether the owner of the run still runs
        print(f"lockstep: {'Slurm does not answer. ' if is_unknown else ''}{error.message}", file=sys.stderr)
        return 1 if is_unknown else error.exit_status
    except OSError as error:
        path = error.filename or slurm.parent  # a write to a full disk names no file
        print(f"lockstep: {path} cannot be read or written ({error.strerror}).", file=sys.stderr)
        return 1


def _free_port() -> int:
    """A random port of this node, the first of the job, that is not in use; below those that systems give to clients."""
    while True:
        port = 15000 + secrets.randbelow(10000)
        with socket.socket() as server, suppress(OSError):
            server.bind(("", port))
            return port


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
