"""Classes of tokens: by their text, and by part of speech where a tagger is installed."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from megamor.analysis.statistics import Array
from megamor.codec import TextCodec, texts_of_tokens

CLASSES = ("white space", "punctuation", "digits", "word start", "continuation", "other")
WHITE_SPACE, PUNCTUATION, DIGITS, WORD_START, CONTINUATION, OTHER = range(len(CLASSES))
Tagger = Callable[[str], Iterator[tuple[int, int, str]]]
"""Yields (begin, end, tag) of the words of a text, in order."""


def token_classes(codec: TextCodec, ids: Array, begins: Array) -> Array:
    """Index into CLASSES of each token `ids` [n]; `begins` [n] is true where the text before isn't known.

    A token with a letter is a word start, unless it begins with a letter, digit or underscore and so does the token
    before it end: then it continues a word. Symbols count as punctuation; end of text and parts of characters: other.
    """
    end = codec.end_of_text
    kinds, opens, closes = {}, {}, {}
    for token in np.unique(ids).tolist():
        text = codec.name(token)
        special = text == f"token_id:{token}" or (end is not None and token == end.id)
        kinds[token] = OTHER if special else text_class(text)
        opens[token], closes[token] = (not special and (c.isalnum() or c == "_") for c in (text[0], text[-1]))
    found, first, last = (np.array([table[token] for token in ids.tolist()]) for table in (kinds, opens, closes))
    joined = first & np.append(False, last[:-1]) & ~begins
    return np.where((found == WORD_START) & joined, CONTINUATION, found)


def text_class(text: str) -> int:
    """The class of a token's text by itself."""
    bare = text.strip()
    if not bare:
        return WHITE_SPACE
    if any(character.isalpha() for character in bare):
        return WORD_START
    if any(character.isnumeric() for character in bare):
        return DIGITS
    return PUNCTUATION if all(unicodedata.category(c)[0] in "PSZ" for c in bare) else OTHER


def installed_tagger() -> tuple[str, Tagger] | None:
    """Name and tagger of parts of speech, of spaCy with any model, else of NLTK. Nothing is downloaded."""
    try:
        import spacy

        if names := spacy.util.get_installed_models():
            model = spacy.load(names[0])
            return f"spaCy, {names[0]}", lambda text: ((w.idx, w.idx + len(w), w.pos_) for w in model(text))
    except ImportError:
        pass
    try:
        import nltk

        nltk.pos_tag(["word"])
    except (ImportError, LookupError):  # the library, or its data
        return None

    def tag(text: str) -> Iterator[tuple[int, int, str]]:
        spans = list(nltk.tokenize.NLTKWordTokenizer().span_tokenize(text))
        tagged = nltk.pos_tag([text[begin:end] for begin, end in spans])
        return ((begin, end, tag[:2]) for (begin, end), (_, tag) in zip(spans, tagged, strict=True))

    return "NLTK", tag


def parts_of_speech(codec: TextCodec, tagger: Tagger, windows: Sequence[Array]) -> list[str]:
    """The tag of the word that each token of `windows` has its first letter in; empty for tokens without a letter."""
    found = []
    for ids in windows:
        texts = texts_of_tokens(codec, ids.tolist())
        words = list(tagger("".join(texts)))
        begins, offset = np.array([begin for begin, _, _ in words]), 0
        for text in texts:
            letter = next((offset + i for i, character in enumerate(text) if character.isalpha()), None)
            word = -1 if letter is None else int(np.searchsorted(begins, letter, side="right")) - 1
            found.append(words[word][2] if word >= 0 and letter is not None and letter < words[word][1] else "")
            offset += len(text)
    return found
