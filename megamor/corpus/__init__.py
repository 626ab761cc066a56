"""Turning text into token shards: reading, tokenizing, writing, merging and checking.

The names below are plain data, so that `megamor preprocess --help` needs none of the libraries.
"""

from megamor.codec import DEFAULT_EOD_TOKENS

__all__ = ["ACCELERATORS", "BUILT_IN_TOKENIZERS", "DEFAULT_EOD_TOKENS"]

ACCELERATORS = ("auto", "none", "gigatoken")
BUILT_IN_TOKENIZERS = ("char", "byte")
