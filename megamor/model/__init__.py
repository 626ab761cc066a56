"""The transformer with a recursion stage. Runs on one device and knows no parallelism."""

from megamor.model.kv_cache import CacheBound, KVCache
from megamor.model.transformer import ModelOutput, ParallelPlan, Transformer, build_model

__all__ = ["CacheBound", "KVCache", "ModelOutput", "ParallelPlan", "Transformer", "build_model"]
