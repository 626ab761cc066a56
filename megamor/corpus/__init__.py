"""Turning text into token shards: reading, tokenizing, writing, merging and checking."""
