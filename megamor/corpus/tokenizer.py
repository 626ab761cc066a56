"""Tokenizers for corpora: loading or making them, and encoding many texts by the rule of `megamor.codec`."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from megamor.codec import DEFAULT_EOD_TOKENS, TextCodec, find_end_of_text, read_end_of_text, read_tokenizer
from megamor.corpus.cuts import cut, find_cuts, longest_fragment
from megamor.data.shard import dtype_for_vocab
from megamor.errors import DataError, MegamorError, TextError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Characters in a fragment of a text, and in the fragments encoded at a time: small enough for the processor's cache.
_FRAGMENT = 2**12
_BATCH = 2**14
# Fragments that can't be cut further need much memory: above the first limit they are encoded one at a time, above the
# second one they are rejected.
_LARGE_FRAGMENT = 2**18
MAX_FRAGMENT = 2**22
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer set up for corpora. `encode` is thread-safe."""

    codec: TextCodec
    vocab_size: int

    @classmethod
    def load(cls, path: str, *, eod_token: str | None = None, need_eod: bool = False) -> TextEncoder:
        """Read a `tokenizers` JSON file.

        The end-of-document token is `eod_token`, or else that of the model beside whose weights the file lies, or else
        the first of `DEFAULT_EOD_TOKENS` that the vocabulary has. Raises DataError if the file isn't a tokenizer, or if
        it lacks an end-of-document token that is named or needed.
        """
        if not Path(path).is_file():
            raise DataError(f"--tokenizer {path}: no such file; give a tokenizer.json of the tokenizers library")
        record = read_end_of_text(Path(path).parent)
        eod_token = eod_token or (record.token if record else None)
        return cls.of(read_tokenizer(path), path, eod_token=eod_token, need_eod=need_eod)

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, name: str, *, eod_token: str | None = None, need_eod: bool = False
    ) -> TextEncoder:
        """Set up `tokenizer`, called `name` in messages. Raises DataError as `load` does."""
        codec = TextCodec(tokenizer, name, find_end_of_text(tokenizer, name, eod_token))
        if need_eod and codec.end_of_text is None:
            defaults = " or ".join(DEFAULT_EOD_TOKENS)
            raise DataError(f"{name} has no token {defaults} to end texts with; name one that it has with --eod-token")
        return cls(codec, max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the library."""
        return self.codec.tokenizer

    @property
    def eod_token(self) -> str | None:
        """The end-of-document token."""
        return self.codec.end_of_text.token if self.codec.end_of_text else None

    @property
    def eod_id(self) -> int | None:
        """Id of the end-of-document token."""
        return self.codec.end_of_text.id if self.codec.end_of_text else None

    @property
    def dtype(self) -> np.dtype:
        """The item type of its ids."""
        return dtype_for_vocab(self.vocab_size)

    @cached_property
    def json(self) -> str:
        """The tokenizer as JSON, as it is set up here."""
        return self.tokenizer.to_str()

    @cached_property
    def cuts(self) -> re.Pattern[str] | None:
        """Boundaries at which long texts may be cut; see `megamor.corpus.cuts`."""
        return find_cuts(self.tokenizer, self.json)

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Ids of each text [n] in `dtype`. Uses one thread if TOKENIZERS_PARALLELISM is false.

        Raises TextError for a character that the tokenizer lacks, and DataError for more than `MAX_FRAGMENT`
        characters without a boundary to cut at.
        """
        for text in texts if self.codec.can_lose_text else ():
            self.codec.require_encodable(text)
        try:
            return self._encode(texts)
        except MegamorError:
            raise
        except Exception as error:  # the library raises nothing more specific
            for text in texts:
                self.codec.require_encodable(text)
            raise TextError(f"{self.codec.source} can't encode a text: {error}") from error

    def _encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        arrays: list[list[NDArray[Any]]] = [[] for _ in texts]
        fragments = ((owner, each) for owner, text in enumerate(texts) for each in cut(text, _FRAGMENT, self.cuts))
        for batch in _batches(fragments):
            owners = [owner for owner, _ in batch]
            for owner, ids in zip(owners, self._encode_batch([each for _, each in batch]), strict=True):
                arrays[owner].append(ids)
        return [own[0] if len(own) == 1 else np.concatenate(own) for own in arrays]

    def require_cuttable(self, text: str) -> None:
        """Raise DataError if `text` has more than `MAX_FRAGMENT` characters without a boundary to cut at."""
        longest = longest_fragment(text, MAX_FRAGMENT // 4, self.cuts) if len(text) > MAX_FRAGMENT else 0
        if longest > MAX_FRAGMENT:
            raise DataError(
                f"{longest:,} characters without a space in a document that begins {text[:40]!r} are too many to "
                f"tokenize in one go (at most {MAX_FRAGMENT:,}); split the document, or remove it"
            )

    def _encode_batch(self, fragments: list[str]) -> list[NDArray[Any]]:
        largest = max(fragments, key=len)
        self.require_cuttable(largest)
        with _one_at_a_time if len(largest) > _LARGE_FRAGMENT else nullcontext():
            # The fast variant doesn't compute character offsets, which nothing here needs.
            encodings = self.tokenizer.encode_batch_fast(fragments, add_special_tokens=False)
            return [np.array(encoding.ids, self.dtype) for encoding in encodings]


def _batches(fragments: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch, size = [], 0
    for each in fragments:
        batch.append(each)
        size += len(each[1])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def find_tokenizer(name: str) -> str:
    """Path of the `tokenizer.json` that `name` means: a file, a directory or a repository of the hub (downloaded).

    Raises DataError if there is none, or if the hub can't be reached.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise DataError(f"--tokenizer {name}: there is no tokenizer.json in that directory")
        return str(path / "tokenizer.json")
    if path.exists() or path.suffix == ".json" or not _HUB_NAME.fullmatch(name):
        return name
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(name, "tokenizer.json")
    except Exception as error:  # the hub's client and its HTTP library have unrelated classes of errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"--tokenizer {name} is not a file or directory, and no tokenizer.json could be fetched under that name "
            f"from the Hugging Face hub: {reason}"
        ) from error


def char_tokenizer(texts: Iterable[str], special: Sequence[str] = ()) -> Tokenizer:
    """A token for each character that occurs in `texts`, ids in the order of code points, then the `special` tokens.

    Encoding any other character is an error: there is no token for unknown ones.
    """
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocabulary = {character: number for number, character in enumerate(sorted(characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def byte_tokenizer(special: Sequence[str] = ()) -> Tokenizer:
    """A token for each byte of UTF-8, with the byte as its id, and the `special` tokens from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    # The byte-level alphabet: printable bytes stand for themselves, the others for characters from 256 on, in order.
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({character: byte for byte, character in alphabet.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
