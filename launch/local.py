#!/usr/bin/env python
"""Train on this machine: the same as ``lockstep local``."""

from lockstep.cli import run_script

if __name__ == "__main__":
    run_script("local", "python launch/local.py")
