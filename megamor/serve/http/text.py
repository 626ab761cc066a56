"""Text for an engine that knows only token ids: encoding prompts, decoding streams of ids, stop strings."""

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
        # As for the training data: "<|endoftext|>" in a prompt is plain text and doesn't end anything.
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`, by default without special tokens.

        Raises:
            RequestError: the text contains half a surrogate pair, which is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"prompt: character {error.start} is half a surrogate pair, which is not valid Unicode"
            ) from error
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `tokens`; bytes that are not valid UTF-8 become U+FFFD."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def name(self, token: int) -> str:
        """Name of a token in log-probabilities: its text, or its id if it is only part of a character."""
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        return f"token_id:{token}" if _INCOMPLETE in text or not text else text


@dataclass
class TextStream:
    """Decodes one continuation token by token, into whole characters before the first stop string.

    `stopped` says that a stop string was found. Everything that `push` and `finish` return, put together, is the
    continuation up to there, with the stop string itself if `include_stop`.
    """

    codec: TextCodec
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    stopped: bool = False
    _tokens: list[int] = field(default_factory=list)
    # A token's text depends on the token before it (spaces, split characters), so a window of tokens is decoded with
    # and without the new ones, and the difference is the new text. Decoding everything would cost O(n²).
    # First token of the window.
    _start: int = 0
    # Tokens whose text has been returned or is in `_held`.
    _read: int = 0
    # Text that may be the beginning of a stop string.
    _held: str = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; returns the text that can no longer become part of a stop string."""
        self._tokens += tokens
        before = self._decode(self._start, self._read)
        now = self._decode(self._start, len(self._tokens))
        # A window that ends in the middle of a character waits for the tokens with the rest of it.
        if not now.endswith(_INCOMPLETE) and len(now) > len(before):
            self._held += now[len(before) :]
            self._start, self._read = self._read, len(self._tokens)
        return self._release(final=False)

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        before = self._decode(self._start, self._read)
        self._held += self._decode(self._start, len(self._tokens))[len(before) :]
        self._read = len(self._tokens)
        return self._release(final=True)

    def _decode(self, start: int, end: int) -> str:
        return self.codec.decode(self._tokens[start:end], self.skip_special_tokens)

    def _release(self, final: bool) -> str:
        if self.stopped:
            return ""
        found = [(start, stop) for stop in self.stop if (start := self._held.find(stop)) >= 0]
        if found:
            start, stop = min(found)
            self.stopped = True
            return self._held[: start + (len(stop) if self.include_stop else 0)]
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self.stop), default=0)
        released = self._held[: len(self._held) - keep]
        self._held = self._held[len(released) :]
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
