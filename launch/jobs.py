#!/usr/bin/env python
"""Show, follow and cancel jobs: the same as ``lockstep jobs``."""

from lockstep.cli import run_script

if __name__ == "__main__":
    run_script("jobs", "python launch/jobs.py")
