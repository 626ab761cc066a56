"""Evaluate a trained model: loss in both routing modes, n-gram baselines, saved work, generation, depth maps."""
