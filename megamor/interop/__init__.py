"""Checkpoints of other code: import from the paper authors' release, export to Hugging Face and back."""
