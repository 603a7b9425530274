"""``python -m lockstep.pack``: the command ``lockstep pack``."""

import sys

from lockstep.core import LockstepError
from lockstep.pack.command import main

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], "python -m lockstep.pack"))
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        sys.exit(error.exit_status)
