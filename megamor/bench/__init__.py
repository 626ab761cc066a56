"""Measurements of training, data, checkpoints and serving, and the tables made from them."""
