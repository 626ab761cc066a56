"""Text to token ids and back: one rule for preprocessing, generation, serving, evaluation and exports.

- The ids are those of the text alone. Nothing is truncated or padded, and a template of the tokenizer that would add a
  beginning of text is left out: the training data has none.
- Special tokens that a text spells out (`<|endoftext|>` on a page about tokenizers) are plain text.
- A text that the tokenizer can't represent is an error. Text is never left out silently.
- The end of text is the token that the record of the data or of the checkpoint names. Without a record it is the first
  of `DEFAULT_EOD_TOKENS` in the vocabulary.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megamor.errors import CheckpointError, DataError, TextError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT_FILE = "end_of_text.json"
DEFAULT_EOD_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Tokens of the prompt that decide how the text after it begins.
_CONTEXT_TOKENS = 16
# A character has at most four bytes. Bytes that still don't form one after this many tokens never will.
_MAX_PENDING_TOKENS = 64
# A text with every byte that occurs in UTF-8; vocabularies made from text lack the other 13.
_ALL_BYTES = "".join(map(chr, [*range(0x801), *range(0x1000, 0x10000, 0x1000), *range(0x10000, 0x110000, 0x10000)]))
_REMEMBERED_PIECES = 2**18


class EndOfText(NamedTuple):
    """The token that ends a text, and its id."""

    token: str
    id: int

    def to_json(self) -> str:
        """The record that a checkpoint keeps."""
        return json.dumps(self._asdict()) + "\n"


def read_end_of_text(directory: Path) -> EndOfText | None:
    """The record of a checkpoint or an export, or None if it has none. Raises CheckpointError if it is damaged."""
    path = directory / END_OF_TEXT_FILE
    if not os.path.lexists(path):
        return None
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("no regular file")
        content = json.loads(path.read_text(encoding="utf-8"))
        return EndOfText(str(content["token"]), int(content["id"]))
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read ({error}); copy the directory again") from error


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`. Raises DataError if the file isn't one."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise DataError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error


def find_end_of_text(
    tokenizer: Tokenizer, source: str, token: str | None = None, record: EndOfText | None = None
) -> EndOfText | None:
    """The end of text of `tokenizer`, called `source` in messages: the `token` asked for, the `record` or a default.

    Raises:
        DataError: the vocabulary lacks the token, or has it under another id than the record.
    """
    names = (token,) if token else (record.token,) if record else DEFAULT_EOD_TOKENS
    ids = ((name, tokenizer.token_to_id(name)) for name in names)
    found = next((EndOfText(name, number) for name, number in ids if number is not None), None)
    if token and found is None:
        raise DataError(f"{source} has no token {token} to end texts with; name one that it has")
    if record and not token and found != record:
        has = f"has that token as id {found.id}" if found else "has no such token"
        raise DataError(
            f"texts end with {record.token} (id {record.id}) according to the record of the data, but {source} {has}: "
            "give the tokenizer that wrote the data"
        )
    return found


class TextCodec:
    """A tokenizer, set up to follow the rule of this module. Thread-safe.

    Args:
        tokenizer: is changed.
        source: name or path of the tokenizer, for messages.
        end_of_text: what `find_end_of_text` found.
    """

    def __init__(
        self, tokenizer: Tokenizer, source: str = "the tokenizer", end_of_text: EndOfText | None = None
    ) -> None:
        from tokenizers import AddedToken

        tokenizer.no_truncation()
        tokenizer.no_padding()
        if end_of_text is not None:
            # Marked as special: otherwise its spelling within a text would end the text.
            tokenizer.add_special_tokens([AddedToken(end_of_text.token, special=True, normalized=False)])
        tokenizer.encode_special_tokens = True
        self.adds_tokens = tokenizer.num_special_tokens_to_add(is_pair=False) > 0
        self._template = tokenizer.post_processor
        # Removed, so that every caller of this tokenizer gets the same ids.
        tokenizer.post_processor = None
        self.tokenizer, self.source, self.end_of_text = tokenizer, source, end_of_text
        self._whole_pieces: set[str] = set()
        self._names: dict[int, str] = {}

    @classmethod
    def load(cls, path: str | Path, *, token: str | None = None, record: EndOfText | None = None) -> TextCodec:
        """Read a `tokenizer.json`; `token` and `record` as in `find_end_of_text`.

        Raises:
            DataError: the file isn't a tokenizer, or what `find_end_of_text` raises.
        """
        tokenizer = read_tokenizer(path)
        return cls(tokenizer, str(path), find_end_of_text(tokenizer, str(path), token, record))

    def encode(
        self, text: str, what: str = "text", *, add_special_tokens: bool = False, special_tokens: bool = False
    ) -> list[int]:
        """Ids of `text`, which messages call `what`; on request with what the tokenizer's template adds.

        With `special_tokens`, those that the text spells out are no plain text: for texts of a chat template.

        Raises:
            TextError: the tokenizer can't represent the text, or it isn't valid Unicode.
        """
        try:
            text.encode()
            if self.can_lose_text:
                self.require_encodable(text, what)
            tokenizer = self._recognizing if special_tokens else self.tokenizer
            encoding = tokenizer.encode(text, add_special_tokens=False)
        except UnicodeEncodeError as error:
            raise TextError(
                f"{what}: character {error.start} is half a surrogate pair, which is not valid Unicode"
            ) from error
        except TextError:
            raise
        except Exception as error:  # the library raises nothing more specific
            self.require_encodable(text, what)
            raise TextError(f"{what}: {self.source} can't encode it: {error}") from error
        if add_special_tokens and self._template is not None:
            encoding = self._template.process(encoding)
        return list(encoding.ids)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `tokens`; bytes that are not valid UTF-8 become U+FFFD."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def name(self, token: int) -> str:
        """Text of a token inside a text, with its space; `token_id:N` if it has none or is only part of a character."""
        if token not in self._names:
            # Many decoders drop the space before the first token, and only there.
            once, twice = (self.decode([token] * count, skip_special_tokens=False) for count in (1, 2))
            text = twice[len(once) :]
            self._names[token] = f"token_id:{token}" if _INCOMPLETE in text or not text else text
        return self._names[token]

    @cached_property
    def _recognizing(self) -> Tokenizer:
        """The tokenizer, but special tokens in a text are what they spell."""
        from tokenizers import Tokenizer

        copied = Tokenizer.from_str(self.tokenizer.to_str())
        copied.encode_special_tokens = False
        return copied

    @cached_property
    def begin_of_text(self) -> str:
        """The token that the tokenizer's template puts before a text, or nothing."""
        empty = self.tokenizer.encode("", add_special_tokens=False)
        tokens = self._template.process(empty).tokens if self._template is not None else []
        return next((str(token) for token in tokens[:1] if token != (self.end_of_text and self.end_of_text.token)), "")

    @cached_property
    def can_lose_text(self) -> bool:
        """Whether the tokenizer leaves out unknown characters without an error, so that texts need a check."""
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel

        # All other models have a token for what they don't know, or fail.
        model = self.tokenizer.model
        if not isinstance(model, BPE) or (model.unk_token and model.token_to_id(model.unk_token) is not None):
            return False
        steps = [step.__getstate__() for step in (self.tokenizer.normalizer, self.tokenizer.pre_tokenizer) if step]
        plain = not (model.end_of_word_suffix or model.continuing_subword_prefix)
        needed = {f"<0x{byte:02X}>" for byte in _ALL_BYTES.encode()} if model.byte_fallback else set()
        if plain and any(b'"ByteLevel"' in step for step in steps):
            needed = set(ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(_ALL_BYTES)[0][0])
        return not needed or any(model.token_to_id(letter) is None for letter in needed)

    def require_encodable(self, text: str, what: str = "text") -> None:
        """Raise TextError naming the first character or word of `text` that has no token, and its position."""
        lost = self._first_lost(text)
        if lost is not None:
            piece, position = lost
            named = f"character {piece!r} (U+{ord(piece):04X})" if len(piece) == 1 else repr(piece)
            raise TextError(
                f"{what}: {named} at position {position} has no token in {self.source}, which has none for unknown "
                "text either; leave it out, or use a tokenizer of bytes"
            )

    def _first_lost(self, text: str) -> tuple[str, int] | None:
        """The first character or word that the model has no token for, and where it begins."""
        from tokenizers.models import BPE, Unigram

        position = 0
        for number, part in enumerate(self._added_tokens.split(text) if self._added_tokens else [text]):
            for piece, (begin, end) in self._pieces(part) if number % 2 == 0 else ():
                if self._is_whole(piece):
                    continue
                # These models work with characters, the others with words.
                if isinstance(self.tokenizer.model, BPE | Unigram):
                    for index, letter in enumerate(part):
                        if not all(self._is_whole(own) for own, _ in self._pieces(letter)):
                            return letter, position + index
                return part[begin:end], position + begin
            position += len(part)
        return None

    def _pieces(self, text: str) -> list[tuple[str, tuple[int, int]]]:
        """What the model is given of `text`, and where that is: exactly there only if a normalizer moves nothing."""
        normalizer, splitter = self.tokenizer.normalizer, self.tokenizer.pre_tokenizer
        normal = text if normalizer is None else normalizer.normalize_str(text)
        return [(normal, (0, len(normal)))] if splitter is None else splitter.pre_tokenize_str(normal)

    def _is_whole(self, piece: str) -> bool:
        """Whether the tokens of a piece of text contain all of it."""
        if piece in self._whole_pieces or not piece:
            return True
        try:
            tokens = self.tokenizer.model.tokenize(piece)
        except Exception:  # the library raises nothing more specific
            return False
        # The offsets of BPE count the bytes of what was kept.
        if self.can_lose_text and (tokens[-1].offsets[1] if tokens else 0) < len(piece.encode()):
            return False
        if len(self._whole_pieces) < _REMEMBERED_PIECES:
            self._whole_pieces.add(piece)
        return True

    @cached_property
    def _added_tokens(self) -> re.Pattern[str] | None:
        """Matches what never reaches the model: added tokens that are recognised in a text."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        special = {self.end_of_text.token} if self.end_of_text else set()
        found = [token.content for token in added if not token.special and token.content not in special]
        return re.compile(f"({'|'.join(map(re.escape, sorted(found, key=len, reverse=True)))})") if found else None


class Detokenizer:
    """Text of tokens that arrive one after the other: whole characters, with the spaces that they have in the text.

    `context` are the tokens before the first one, such as the prompt. The texts that `push` and `finish` return are
    together what `context` and all tokens decode to, without the text of `context`.
    """

    # A token's text depends on the tokens before it (spaces, split characters), so a window of tokens is decoded with
    # and without the new ones, and the difference is the new text. Decoding everything would cost O(n²).

    def __init__(self, codec: TextCodec, context: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._codec, self._skip = codec, skip_special_tokens
        self._window = list(context[-_CONTEXT_TOKENS:])
        if _INCOMPLETE in self._decode():
            self._window = list(context)
        text = self._decode()
        # A character that the context leaves incomplete belongs to the text that completes it, if that happens.
        self._given = whole = text
        self._read = len(self._window)
        for end in range(len(self._window), max(len(self._window) - 4, -1), -1):
            own = self._codec.decode(self._window[:end], self._skip)
            if not own.endswith(_INCOMPLETE):
                self._read, whole = end, own
                break
        begun = text.rstrip(_INCOMPLETE)
        # Characters of the window's text that have been returned.
        self._shown = len(begun if begun.startswith(whole) else whole)

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; returns the text that is certain: all but a character whose last bytes haven't come."""
        self._window += tokens
        text = self._decode()
        certain = len(self._window) - self._read > _MAX_PENDING_TOKENS or not text.endswith(_INCOMPLETE)
        shown = text if certain else text.rstrip(_INCOMPLETE)
        new = self._after_given(shown)
        self._shown = max(self._shown, len(shown))
        if certain and new:
            # From here on the newest tokens are the context.
            self._window, self._given = self._window[self._read :], ""
            self._read, self._shown = len(self._window), len(self._decode())
        elif certain and len(self._window) - self._read > _MAX_PENDING_TOKENS:
            del self._window[self._read :]  # tokens without text, such as skipped special ones
        return new

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        return self._after_given(self._decode())

    def _after_given(self, text: str) -> str:
        if self._given and text.startswith(self._given):
            self._shown = max(self._shown, len(self._given))
        return text[self._shown :]

    def _decode(self) -> str:
        return self._codec.decode(self._window, self._skip)


def texts_of_tokens(codec: TextCodec, tokens: Sequence[int]) -> list[str]:
    """The text of each token [T], special ones included; together they are the text of the whole.

    A character that several tokens form belongs to the last of them, and the others are empty.
    """
    detokenizer = Detokenizer(codec, skip_special_tokens=False)
    texts = [detokenizer.push([token]) for token in tokens]
    if texts:
        texts[-1] += detokenizer.finish()
    return texts
