#!/usr/bin/env python
"""Show, follow and cancel jobs: the same as ``lockstep jobs``."""

import sys

from lockstep.cli.jobs import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python launch/jobs.py"))
