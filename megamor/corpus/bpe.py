"""Byte-level BPE tokenizers trained on a sample of raw text. The same text gives the same file, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megamor.corpus.cuts import cut, find_cuts
from megamor.corpus.documents import parse_chunk
from megamor.corpus.text import FileInput
from megamor.errors import ConfigError

# Characters given to the library at a time: a document of many MB would take a hundred bytes for each of its bytes.
_FRAGMENT = 2**16


def train_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> Tokenizer:
    """A tokenizer of at most `vocab_size` entries: the `special` tokens first, all bytes, then merges of pairs.

    Words are split as GPT-2 does. It has fewer entries if `texts` have no more pairs.

    Raises:
        ConfigError: `vocab_size` leaves no room for the special tokens and the 256 bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        least = f"{len(alphabet)} bytes and the {len(special)} special tokens"
        raise ConfigError(f"--vocab-size {vocab_size}: give at least {len(alphabet) + len(special)}, for the {least}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    boundaries = find_cuts(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*special], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((part for text in texts for part in cut(text, _FRAGMENT, boundaries)), trainer)
    return tokenizer


def sample_texts(
    files: FileInput, limit: float, key: str, separator: str | None, *, skip_bad: bool, advance: Callable[[int], None]
) -> Iterator[str]:
    """Documents of about `limit` bytes of text in all, from the beginnings of all files, in proportion to their sizes.

    `advance` is called with the bytes just read. Raises DataError as `parse_chunk` does.
    """
    remaining = files.size
    for path in files.paths:
        alone = FileInput([path], key, separator)
        budget = limit * alone.size / max(remaining, 1)
        for chunk in alone.chunks() if budget > 0 else ():
            documents = parse_chunk(chunk, key, separator, skip_bad=skip_bad)
            for text, encoded in zip(documents.texts, documents.encoded, strict=True):
                if budget > 0:
                    yield text
                    advance(len(encoded))
                    budget, limit = budget - len(encoded), limit - len(encoded)
            if budget <= 0:
                break
        remaining -= alone.size
