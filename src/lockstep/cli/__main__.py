"""``python -m lockstep.cli COMMAND …``, where the command ``lockstep`` is not on the PATH."""

import sys

from lockstep.cli import main

if __name__ == "__main__":
    sys.exit(main())
