"""The serving engine: requests of token ids in, tokens out. Knows nothing of HTTP or text."""
