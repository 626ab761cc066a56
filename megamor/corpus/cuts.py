"""Where a long text may be cut so that the tokens of the parts are the tokens of the whole.

The `tokenizers` library keeps some 130 bytes for each byte of a text until it has encoded all of it. Cut into parts of
a few KiB, a document of any length needs a few hundred KiB, and is encoded faster, too.

A cut is made before a space that follows no other white space, before a line feed that follows a letter or digit, and
before a Chinese or Japanese comma or full stop that follows a letter of these languages. It is provably harmless where

- the normalizer is none or NFC, which never combines any of these with what stands before it;
- no added token that would be recognised has such a place within it or looks at its surroundings;
- the pre-tokenizer is one of `_PRE_TOKENIZERS` and `_PATTERNS`: each ends a word at such a place, whatever comes next,
  and begins the next word there without looking back.

The model then sees the same words. For any other tokenizer texts stay whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import msgspec
from tokenizers import Tokenizer

# Characters about which all versions of Unicode agree: what one takes for white space must not be a letter for another.
_PLACE = re.compile("[\\w!-~](?= )|[A-Za-z0-9](?=\n)|[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5](?=[，。、])")
# Of GPT-2 (also what ByteLevel uses itself), Llama 3 and tiktoken's cl100k, Qwen 2, and of the built-in `char`.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    _LLAMA3,
    _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
    r"[\s\S]",
}
_PRE_TOKENIZERS = {"Digits", "Whitespace", "BertPreTokenizer"}


def find_cuts(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """The places where texts for `tokenizer` may be cut: after each match. None if it isn't known to have any."""
    spec = msgspec.json.decode(tokenizer.to_str())
    normalizer, pre_tokenizer, model = spec["normalizer"], spec["pre_tokenizer"], spec["model"]
    parts = pre_tokenizer["pretokenizers"] if (pre_tokenizer or {}).get("type") == "Sequence" else [pre_tokenizer]
    recognised = [
        token for token in spec["added_tokens"] if not token["special"] or not tokenizer.encode_special_tokens
    ]
    harmless = (
        (normalizer is None or normalizer["type"] == "NFC")
        and all(_is_plain(token) for token in recognised)
        and all(part is not None and _allows_cuts(part) for part in parts)
        # Digits and a byte-level step without a pattern don't end words, and the latter hides spaces from what follows.
        and any(_ends_words(part) for part in parts)
        and all(part["type"] != "ByteLevel" for part in parts[:-1])
        and not model.get("dropout")
    )
    return _PLACE if harmless else None


def cut(text: str, size: int, places: re.Pattern[str] | None) -> list[str]:
    """`text` in parts of about `size` characters, cut at `places` only; longer where there is none."""
    return [text[begin:end] for begin, end in pairwise(_bounds(text, size, places))]


def longest_part(text: str, size: int, places: re.Pattern[str] | None) -> int:
    """Characters of the longest of the parts that `cut` would make."""
    return max(end - begin for begin, end in pairwise(_bounds(text, size, places)))


def _bounds(text: str, size: int, places: re.Pattern[str] | None) -> Iterator[int]:
    begin = 0
    yield begin
    while places and len(text) - begin > 2 * size:
        place = places.search(text, begin + size)
        if place is None:
            break
        begin = place.end()
        yield begin
    yield len(text)


def first_and_last(text: str, size: int, places: re.Pattern[str] | None) -> list[str]:
    """A part of at least `size` characters from each end of `text`; all of it as one part if it has no such two."""
    first = places.search(text, size) if places and len(text) > 2 * size else None
    if places is None or first is None:
        return [text]
    window = max(size, 1)
    while window < len(text):
        # Looked for near the end only, further and further from it: a long text isn't gone through.
        window *= 2
        last = places.search(text, max(first.end(), len(text) - window), len(text) - size + 1)
        if last:
            return [text[: first.end()], text[last.end() :]]
    return [text]


def _is_plain(token: Mapping[str, Any]) -> bool:
    within = _PLACE.search(token["content"])
    return not (within or token["lstrip"] or token["rstrip"] or token["single_word"])


def _allows_cuts(part: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer works on both sides of a cut as it would without it."""
    if part["type"] == "ByteLevel":
        return not part["add_prefix_space"]
    if part["type"] == "Split":
        return part["pattern"].get("Regex") in _PATTERNS and part["behavior"] == "Isolated" and not part["invert"]
    return part["type"] in _PRE_TOKENIZERS


def _ends_words(part: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer always ends a word where a cut may be."""
    return part["type"] in {"Split", *_PRE_TOKENIZERS} - {"Digits"} or bool(part.get("use_regex"))
