"""Private names of submitit."""
