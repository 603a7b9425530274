#!/usr/bin/env python
"""Submit a run, or a sweep, to Slurm: the same as ``lockstep submit``."""

from lockstep.cli import run_script

if __name__ == "__main__":
    run_script("submit", "python launch/slurm.py")
