"""Distributed training that keeps every rank in lockstep."""

__version__ = "0.1.0"
