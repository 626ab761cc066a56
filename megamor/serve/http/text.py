"""Text around the engine, which knows token ids only: encoding prompts, decoding a stream of ids, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from megamor.serve.engine.request import RequestError

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextCodec:
    """Token ids from text and back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # As in training data: what a text spells out is text.
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`; nothing is added unless asked for.

        Raises:
            RequestError: the text has half a surrogate pair, which is not Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"prompt: character {error.start} is half a surrogate pair, not Unicode text") from error
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `tokens`; bytes that are no character become U+FFFD."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def name(self, token: int) -> str:
        """What log-probabilities call a token: its text, or its number where it is only part of a character."""
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        return f"token_id:{token}" if _INCOMPLETE in text or not text else text


@dataclass
class TextStream:
    """Decodes one continuation as it comes; gives out whole characters and nothing that may belong to a stop string.

    After `push` has returned with `stopped`, or after `finish`, the text given out is the whole continuation up to the
    first stop string (that included if `include_stop`).
    """

    codec: TextCodec
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    stopped: bool = False
    text: str = ""
    """All text given out."""
    _tokens: list[int] = field(default_factory=list)
    _start: int = 0  # of the window that is decoded: earlier tokens can't change what comes
    _read: int = 0  # tokens whose text is in `_held` or given out
    _held: str = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; returns the text that is certain now."""
        self._tokens += tokens
        before = self._decode(self._start, self._read)
        now = self._decode(self._start, len(self._tokens))
        # A text that ends in the middle of a character waits for the rest of it.
        if not now.endswith(_INCOMPLETE) and len(now) > len(before):
            self._held += now[len(before) :]
            self._start, self._read = self._read, len(self._tokens)
        return self._give(final=False)

    def finish(self) -> str:
        """The rest of the text, when no token will follow."""
        before = self._decode(self._start, self._read)
        self._held += self._decode(self._start, len(self._tokens))[len(before) :]
        self._read = len(self._tokens)
        return self._give(final=True)

    def _decode(self, start: int, end: int) -> str:
        return self.codec.decode(self._tokens[start:end], self.skip_special_tokens)

    def _give(self, final: bool) -> str:
        if self.stopped:
            return ""
        found = [(place, stop) for stop in self.stop if (place := self._held.find(stop)) >= 0]
        if found:
            place, stop = min(found)
            self.stopped = True
            given = self._held[: place + (len(stop) if self.include_stop else 0)]
        else:
            keep = 0 if final else max((_overlap(self._held, stop) for stop in self.stop), default=0)
            given = self._held[: len(self._held) - keep]
            self._held = self._held[len(given) :]
        self.text += given
        return given


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
