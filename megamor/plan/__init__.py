"""Estimates before a run: memory, traffic, FLOPs and time, from the configuration alone."""
