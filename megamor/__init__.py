"""megamor: pretraining and serving of Mixture-of-Recursions language models (arXiv 2507.10524)."""

__version__ = "0.1.0"
