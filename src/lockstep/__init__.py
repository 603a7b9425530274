"""Distributed training that keeps every rank in lockstep."""
