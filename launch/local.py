#!/usr/bin/env python
"""Train on this machine: the same as ``lockstep local``."""

import sys

from lockstep.cli.local import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python launch/local.py"))
