"""Where a long text may be cut so that the tokens of the fragments are the tokens of the whole.

The `tokenizers` library keeps some 130 bytes for each byte of a text until it has encoded all of it. Cut into fragments
of a few KiB, a document of any length needs a few hundred KiB, and is also encoded faster.

A cut is made before a space that follows no other white space, before a line feed that follows a letter or digit, and
before a Chinese or Japanese comma or full stop that follows a letter of these languages. This provably changes no token
under these conditions:

- The normalizer is none or NFC, which never combines any of these characters with the one before.
- No added token that would be recognised contains such a boundary or looks at its surroundings.
- The pre-tokenizer is one of `_PRE_TOKENIZERS` and `_PATTERNS`. Each of them ends a word at such a boundary, whatever
  follows, and begins the next word there without looking back.

The model then sees the same words. For any other tokenizer texts stay whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import msgspec
from tokenizers import Tokenizer

# A cut follows each match. Only characters that all versions of Unicode agree about: the pre-tokenizer's Unicode tables
# may be of another version than Python's, and white space for one must not be a letter for the other.
_BOUNDARY = re.compile("[\\w!-~](?= )|[A-Za-z0-9](?=\n)|[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5](?=[，。、])")
# The patterns of GPT-2 (which ByteLevel uses itself), Llama 3 and tiktoken's cl100k, Qwen 2, and the built-in `char`.
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


class _Model(msgspec.Struct):
    dropout: float | None = None


class _Spec(msgspec.Struct):
    """What matters here of a tokenizer's JSON. The vocabulary and the merges, nearly all of it, aren't decoded."""

    normalizer: Any
    pre_tokenizer: Any
    added_tokens: list[dict[str, Any]]
    model: _Model


def find_cuts(tokenizer: Tokenizer, text: str | None = None) -> re.Pattern[str] | None:
    """The boundaries at which texts for `tokenizer` may be cut, after each match; None if none are known.

    `text` is the tokenizer's JSON, if it is at hand.
    """
    spec = msgspec.json.decode(text or tokenizer.to_str(), type=_Spec)
    normalizer, pre_tokenizer = spec.normalizer, spec.pre_tokenizer
    specials_are_text = tokenizer.encode_special_tokens
    steps = pre_tokenizer["pretokenizers"] if (pre_tokenizer or {}).get("type") == "Sequence" else [pre_tokenizer]
    harmless = (
        (normalizer is None or normalizer["type"] == "NFC")
        and all(_is_plain(each) or (each["special"] and specials_are_text) for each in spec.added_tokens)
        and all(step is not None and _allows_cuts(step) for step in steps)
        # Digits and a byte-level step without a pattern don't end words, and the latter hides spaces from later steps.
        and any(_ends_words(step) for step in steps)
        and all(step["type"] != "ByteLevel" for step in steps[:-1])
        and not spec.model.dropout
    )
    return _BOUNDARY if harmless else None


def cut(text: str, size: int, cuts: re.Pattern[str] | None) -> list[str]:
    """`text` in fragments of about `size` characters, cut at boundaries only; longer where there is none."""
    return [text[begin:end] for begin, end in pairwise(_bounds(text, size, cuts))]


def longest_fragment(text: str, size: int, cuts: re.Pattern[str] | None) -> int:
    """Characters of the longest of the fragments that `cut` would make."""
    return max(end - begin for begin, end in pairwise(_bounds(text, size, cuts)))


def _bounds(text: str, size: int, cuts: re.Pattern[str] | None) -> Iterator[int]:
    begin = 0
    yield begin
    while cuts and len(text) - begin > 2 * size:
        match = cuts.search(text, begin + size)
        if match is None:
            break
        begin = match.end()
        yield begin
    yield len(text)


def _is_plain(token: Mapping[str, Any]) -> bool:
    within = _BOUNDARY.search(token["content"])
    return not (within or token["lstrip"] or token["rstrip"] or token["single_word"])


def _allows_cuts(step: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer works on both sides of a cut as it would without it."""
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    if step["type"] == "Split":
        return step["pattern"].get("Regex") in _PATTERNS and step["behavior"] == "Isolated" and not step["invert"]
    return step["type"] in _PRE_TOKENIZERS


def _ends_words(step: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer always ends a word at a boundary."""
    return step["type"] in {"Split", *_PRE_TOKENIZERS} - {"Digits"} or bool(step.get("use_regex"))
