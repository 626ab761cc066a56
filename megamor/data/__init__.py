"""Token shards on disk, the order of samples, blends and loaders: everything that training reads."""
