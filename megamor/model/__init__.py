"""The transformer with a recursion stage. Runs on one device and knows no parallelism."""

from megamor.model.transformer import ModelOutput, ParallelPlan, Transformer, build_model

__all__ = ["ModelOutput", "ParallelPlan", "Transformer", "build_model"]
