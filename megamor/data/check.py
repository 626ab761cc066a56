"""Whether a run's data and tokenizer are there and fit the model, asked before the run is started or queued."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megamor.codec import read_tokenizer
from megamor.config.schema import DataConfig
from megamor.data.dataset import TrainingData, open_shards
from megamor.data.meta import sha256_of_tokenizer
from megamor.errors import ConfigError, DataError


def find_problems(config: DataConfig, *, seed: int, vocab_size: int) -> list[str]:
    """What would end a run with this data (paths expanded) and a model of `vocab_size` entries at its start."""
    problems = [*_tokenizer(config, vocab_size)]
    if problems:
        config = replace(config, tokenizer=None)  # said once is enough
    prefixes = dict.fromkeys([*(source.prefix for source in config.train), *config.validation.values()])
    for prefix in prefixes:
        try:
            open_shards({prefix: prefix}, config, vocab_size=vocab_size)
        except DataError as error:
            problems.append(str(error))
    if not problems:  # each fits by itself; what is left is whether they fit each other
        try:
            TrainingData.open(config, seed=seed, vocab_size=vocab_size)
        except (ConfigError, DataError) as error:
            problems.append(str(error))
    return problems


def _tokenizer(config: DataConfig, vocab_size: int) -> Iterator[str]:
    if config.tokenizer is None:
        return
    try:
        sha256_of_tokenizer(config.tokenizer)
        entries = read_tokenizer(config.tokenizer).get_vocab_size(with_added_tokens=True)
    except DataError as error:
        yield str(error)
    else:
        if entries > vocab_size:
            found = f"tokenizer {config.tokenizer} has {entries} entries, more than model.vocab_size {vocab_size}"
            yield f"{found}; set model.vocab_size={-(-entries // 128) * 128}, or use a smaller tokenizer"
