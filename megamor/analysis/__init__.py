"""What a trained router does, and where a run's samples come from."""
