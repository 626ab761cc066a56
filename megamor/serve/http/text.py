"""The text of a continuation as it grows: whole characters up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megamor.codec import Detokenizer


@dataclass
class TextStream:
    """Decodes one continuation token by token, into whole characters before the first stop string.

    `stopped` says that a stop string was found. Everything that `push` and `finish` return, put together, is the
    continuation up to there, with the stop string itself if `include_stop`. A stop string that is complete within the
    first `min_tokens` tokens is text like any other.
    """

    detokenizer: Detokenizer
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    stopped: bool = False
    # Text that may be the beginning of a stop string.
    _held: str = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; returns the text that can no longer become part of a stop string."""
        text = ""
        for token in tokens:
            self.min_tokens -= 1
            self._held += self.detokenizer.push([token])
            text += self._release(final=False)
        return text

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        self._held += self.detokenizer.finish()
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        if self.stopped:
            return ""
        stops = self.stop if self.min_tokens < 0 else ()
        found = [(start, stop) for stop in stops if (start := self._held.find(stop)) >= 0]
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
