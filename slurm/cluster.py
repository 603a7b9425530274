#!/usr/bin/env python
"""Start and stop a Slurm cluster on this machine: the same as ``lockstep cluster``."""

import sys

from lockstep.cli.cluster import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python slurm/cluster.py"))
