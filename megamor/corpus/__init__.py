"""Turning text into token shards: reading, tokenizing, writing, merging and checking.

The names below are plain data, so that `megamor preprocess --help` needs none of the libraries.
"""

ACCELERATORS = ("auto", "none", "gigatoken")
BUILT_IN_TOKENIZERS = ("char", "byte")
DEFAULT_EOD_TOKENS = ("<|endoftext|>", "</s>")
