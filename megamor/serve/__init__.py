"""Serving with continuous depth-wise batching: tokens at different recursions go through the shared core together."""
