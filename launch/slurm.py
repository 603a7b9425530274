#!/usr/bin/env python
"""Submit a run, or a sweep, to Slurm: the same as ``lockstep submit``."""

import sys

from lockstep.cli.submit import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python launch/slurm.py"))
