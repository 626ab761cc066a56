"""Bytes of the text behind tokens, for bits per byte: the loss that models with different tokenizers can share.

The text of tokens is what they decode to, in UTF-8. Special tokens, such as the end of text, have none: their loss
counts, but they add no bytes.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from megamor.codec import EndOfText, TextCodec
from megamor.data.loader import MicroBatch

_BY_CONTEXT = -1
_REMEMBERED_PAIRS = 2**20
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextBytes:
    """Counts bytes of text for ids below `vocab_size`."""

    # The bytes of a character may be spread over tokens that decode to nothing valid alone, so tokens of bytes are
    # counted by their names. Any other token is what it adds to the text of the one before it: decoders write a space
    # before each word, but not before a text's first, or after each word, but not after the last.

    def __init__(self, codec: TextCodec, vocab_size: int) -> None:
        tokenizer = codec.tokenizer
        states = [step.__getstate__() for step in (tokenizer.decoder, tokenizer.pre_tokenizer) if step is not None]
        byte_level, fallback = (any(kind in state for state in states) for kind in (b'"ByteLevel"', b'"ByteFallback"'))
        alphabet, added = set(ByteLevel.alphabet()), tokenizer.get_added_tokens_decoder()
        self._codec = codec
        self._added = lru_cache(_REMEMBERED_PAIRS)(self._decode_added)
        self._sizes = np.full(vocab_size, _BY_CONTEXT)
        for token in range(vocab_size):
            name = tokenizer.id_to_token(token)
            if name is None or (token in added and added[token].special):
                self._sizes[token] = 0
            elif byte_level:
                spelled = token not in added and alphabet.issuperset(name)
                self._sizes[token] = len(name if spelled else name.encode())
            elif fallback and _BYTE.fullmatch(name):
                self._sizes[token] = 1

    def count(self, batch: MicroBatch) -> int:
        """Bytes of the text of the labels of `batch`."""
        valid = batch.labels >= 0
        before, tokens = batch.inputs[valid].numpy(), batch.labels[valid].numpy()
        sizes = self._sizes[tokens]
        unknown = sizes == _BY_CONTEXT
        pairs = np.stack((before[unknown], tokens[unknown]), 1)
        found, counts = np.unique(pairs, axis=0, return_counts=True)
        added = (self._added(*pair) * n for pair, n in zip(found.tolist(), counts.tolist(), strict=True))
        return int(sizes[~unknown].sum() + sum(added))

    def _decode_added(self, before: int, token: int) -> int:
        """Bytes that `token` adds to the text of the token before it, or to a new text."""
        end = self._codec.end_of_text
        context = [] if end is not None and before == end.id else [before]
        texts = (self._codec.decode(ids, skip_special_tokens=False) for ids in (context, [*context, token]))
        without, whole = (len(text.encode()) for text in texts)
        return whole - without


@lru_cache(maxsize=1)
def text_bytes(tokenizer: Path, end_of_text: EndOfText | None, vocab_size: int) -> TextBytes:
    """The counter of a tokenizer. Raises DataError as `TextCodec.load` does."""
    return TextBytes(TextCodec.load(tokenizer, record=end_of_text), vocab_size)


def bits_per_byte(nats: float, num_bytes: int | None) -> float | None:
    """`nats` of negative log-likelihood over the bytes of the text; None without a text."""
    return nats / math.log(2) / num_bytes if num_bytes else None
