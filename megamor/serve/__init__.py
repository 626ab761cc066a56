"""Serving with continuous depth-wise batching: tokens at different recursions share one launch of the shared core."""
