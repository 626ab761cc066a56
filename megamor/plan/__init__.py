"""Estimates made before a run: memory, traffic, FLOPs, time."""
