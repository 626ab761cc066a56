"""Raw text to token shards: reads, has it encoded, writes in order, and can be interrupted at any point.

The state of a run is the number of the next chunk and the sizes of the partial files; see `megamor.corpus.journal`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from megamor.corpus.dedup import HashLog, hash_log_path
from megamor.corpus.encode import ChunkEncoder, EncodedChunk, encode_in_order
from megamor.corpus.journal import Journal, Progress
from megamor.corpus.text import Place, Share, TextInput
from megamor.corpus.writer import ShardWriter, publish_finished
from megamor.data.meta import ShardMeta
from megamor.errors import DataError
from megamor.files import replace_file

JOURNAL_SECONDS = 10.0
_BAD_SHOWN = 10
_COUNTS = ("text_bytes", "empty", "blank", "short", "held_out", "duplicates", "bad")


@dataclass
class Totals:
    """What has been done so far. `documents` and `tokens` count by (split, source); the rest was left out.

    `position` is how far the input has been read. `resumed_bytes` of `text_bytes` are of earlier runs.
    """

    prefixes: Sequence[str]
    names: Sequence[str]
    documents: Counter[tuple[int, int]] = field(default_factory=Counter)
    tokens: Counter[tuple[int, int]] = field(default_factory=Counter)
    text_bytes: int = 0
    empty: int = 0
    blank: int = 0
    short: int = 0
    held_out: int = 0
    duplicates: int = 0
    bad: int = 0
    bad_shown: list[str] = field(default_factory=list)
    position: int = 0
    resumed_bytes: int = 0
    resumed_position: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, chunk: EncodedChunk) -> None:
        """Count one chunk."""
        source = chunk.chunk.place.source
        for split, lengths in enumerate(chunk.lengths):
            self.documents[split, source] += len(lengths)
            self.tokens[split, source] += len(chunk.tokens[split])
        for name in ("text_bytes", "empty", "blank", "short", "held_out"):
            setattr(self, name, getattr(self, name) + getattr(chunk, name))
        self.bad += len(chunk.bad)
        self.bad_shown += chunk.bad[: _BAD_SHOWN - len(self.bad_shown)]
        self.position = chunk.chunk.position

    def sources_of(self, split: int) -> list[dict[str, object]]:
        """Documents and tokens of each source in one split, for the side file."""
        return [
            {"name": name, "documents": self.documents[split, source], "tokens": self.tokens[split, source]}
            for source, name in enumerate(self.names)
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything that a later run can't find out again, as plain values."""
        return {
            **{name: getattr(self, name) for name in (*_COUNTS, "bad_shown", "position")},
            **{name: [[*key, n] for key, n in getattr(self, name).items() if n] for name in ("documents", "tokens")},
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `to_json` returned."""
        for name in (*_COUNTS, "bad_shown", "position"):
            setattr(self, name, saved[name])
        for name in ("documents", "tokens"):
            setattr(self, name, Counter({(split, source): count for split, source, count in saved[name]}))
        self.resumed_bytes, self.resumed_position = self.text_bytes, self.position

    def speed(self) -> str:
        """Text and tokens so far, and the text per second of this run."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        return (
            f"{self.text_bytes / 1e6:,.1f} MB of text, {self.tokens.total() / 1e6:,.2f} M tokens in {seconds:,.0f} s "
            f"({(self.text_bytes - self.resumed_bytes) / 1e6 / seconds:,.2f} MB/s)"
        )


@dataclass(frozen=True)
class Plan:
    """What a run is to do: `share` of `texts` into one shard for each of `prefixes`, in `dtype`.

    `tokenizer` is written to `tokenizer_path`, if that is given.

    `identity` is whatever else decides the output, but for `skip_bad`, which only does if there are bad lines.
    With `deduplicate` only the first of equal documents is kept; with `allow_empty` a shard may turn out to have none.
    """

    texts: TextInput
    share: Share
    prefixes: Sequence[str]
    journal_prefix: str
    dtype: np.dtype
    meta: ShardMeta
    tokenizer: bytes
    tokenizer_path: Path | None
    identity: Mapping[str, Any]
    skip_bad: bool = False
    deduplicate: bool = False
    allow_empty: bool = False
    restart: bool = False


class Interrupted(Exception):
    """The run was asked to stop by `signum`; what there is will be gone on from if `kept`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.kept = False


class StopSignals:
    """Turns Ctrl-C and SIGTERM into `Interrupted`, but never within `shielded`: what was begun there is finished."""

    def __init__(self) -> None:
        self._shielded = False
        self._received: int | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals meanwhile. Only the main thread of a program can, elsewhere this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Put off what arrives to the end of the block."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        if self._received is not None:
            raise Interrupted(self._received)

    def ignore(self) -> None:
        """From now on nothing is raised."""
        self._shielded = True

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum
        if not self._shielded:
            raise Interrupted(signum)


class Run:
    """One run of preprocessing, from the first chunk or from where an earlier run stopped."""

    def __init__(self, plan: Plan, encoder: ChunkEncoder, tell: Callable[[str], None]) -> None:
        self._plan = plan
        self._encoder = encoder
        self._tell = tell
        self._journal = Journal(plan.journal_prefix, plan.identity)
        self._signals = StopSignals()
        self._next = Place(0, 0)
        self._writers: list[ShardWriter] = []
        self._logs: list[HashLog] = []
        self.totals = Totals(plan.prefixes, plan.texts.names)

    def execute(self, workers: int, show: Callable[[Totals], None]) -> Totals:
        """Do it. `show` is called after every chunk.

        Raises DataError for damaged input, for a shard that gets no document, and if the output can't be written;
        Interrupted after Ctrl-C and SIGTERM. Once there is a journal, all of them leave behind what a later run needs.
        """
        with self._signals.caught():
            found, reason = self._find_journal()
            if found and found.complete:
                self.totals.restore(found.counts)
                self._publish_left_over()
                return self.totals
            with ExitStack() as stack:
                self._open(stack, keep=found is not None)
                self._go_on(found, reason)
                try:
                    self._encode(workers, show)
                    with self._signals.shielded():
                        self._finish()
                        self._publish()
                except Interrupted as stop:
                    self._signals.ignore()
                    self._record()
                    stop.kept = True
                    raise
                except DataError:
                    if self._journal.exists:
                        self._tell("what was done before is kept: mend the cause, and the same command goes on from it")
                    raise
        return self.totals

    def _find_journal(self) -> tuple[Progress | None, str]:
        if self._plan.restart:
            return None, "--restart"
        found, reason = self._journal.read()
        if found and found.counts["bad"] and not self._plan.skip_bad:
            return None, f"{self._journal.path} is of a run that skipped bad lines"
        return found, reason

    def _open(self, stack: ExitStack, *, keep: bool) -> None:
        for prefix in self._plan.prefixes:
            self._writers.append(stack.enter_context(ShardWriter(prefix, self._plan.dtype, resume=True)))
            self._keep_partial(keep)  # at once, since the next may be refused
        for prefix in self._plan.prefixes if self._plan.deduplicate else ():
            self._logs.append(stack.enter_context(HashLog(prefix)))
            self._keep_partial(keep)

    def _files(self) -> list[ShardWriter | HashLog]:
        return [*self._writers, *self._logs]

    def _keep_partial(self, keep: bool) -> None:
        for file in self._files():
            file.keep_partial = keep

    def _rewind(self, written: Sequence[tuple[int, int]]) -> bool:
        documents = [counts[0] for counts in written]
        return all(writer.rewind(*counts) for writer, counts in zip(self._writers, written, strict=True)) and all(
            log.rewind(count) for log, count in zip(self._logs, documents, strict=False)
        )

    def _go_on(self, found: Progress | None, reason: str) -> None:
        """Bring the partial files to the point where the journal ends, or to the beginning."""
        if found and self._rewind(found.written):
            self._next = found.next
            self.totals.restore(found.counts)
            self._tell(f"continuing an interrupted run after {self.totals.text_bytes / 1e6:,.1f} MB of text")
            return
        if found:
            reason = f"the partial files are shorter than {self._journal.path} says"
        if reason:
            self._tell(f"starting from the beginning: {reason}")
        self._keep_partial(False)
        self._journal.remove()
        self._rewind([(0, 0)] * len(self._writers))

    def _encode(self, workers: int, show: Callable[[Totals], None]) -> None:
        recorded = time.monotonic()
        chunks = self._plan.texts.chunks(self._plan.share, self._next)
        with closing(encode_in_order(chunks, self._encoder, workers)) as results:
            for chunk in results:
                with self._signals.shielded():
                    self._write(chunk)
                    if time.monotonic() - recorded >= JOURNAL_SECONDS:
                        self._record()
                        recorded = time.monotonic()
                show(self.totals)

    def _write(self, chunk: EncodedChunk) -> None:
        for split, log in enumerate(self._logs):
            self.totals.duplicates += log.drop_seen(chunk, split)
        for writer, tokens, lengths in zip(self._writers, chunk.tokens, chunk.lengths, strict=True):
            writer.add_documents(tokens, lengths)
        self.totals.add(chunk)
        source, number = chunk.chunk.place
        self._next = Place(source, number + 1)

    def _record(self) -> None:
        """Make what there is durable, then say so in the journal."""
        for file in self._files():
            file.sync()
        written = [(writer.num_documents, writer.num_tokens) for writer in self._writers]
        self._journal.write(Progress(self._next, written, self.totals.to_json()))
        self._keep_partial(True)

    def _finish(self) -> None:
        for split, writer in enumerate(self._writers):
            if not writer.num_documents and not self._plan.allow_empty:
                self._journal.remove()
                self._keep_partial(False)
                left_out = ", ".join(f"{getattr(self.totals, name)} {name.replace('_', ' ')}" for name in _COUNTS[1:])
                raise DataError(
                    f"{writer.prefix} would have no document ({self.totals.documents.total()} in all; left out: "
                    f"{left_out}); check the input" + (" or the shares of --split" if len(self._writers) > 1 else "")
                )
            writer.finish(replace(self._plan.meta, sources=self.totals.sources_of(split)))
        written = [(writer.num_documents, writer.num_tokens) for writer in self._writers]
        self._journal.write(Progress(self._next, written, self.totals.to_json(), complete=True))
        self._keep_partial(True)

    def _publish_left_over(self) -> None:
        """What `_publish` does, for a run that was killed while it did."""
        self._write_tokenizer()
        for prefix in self._plan.prefixes:
            publish_finished(prefix)
            hash_log_path(prefix).unlink(missing_ok=True)
        self._journal.remove()

    def _write_tokenizer(self) -> None:
        if self._plan.tokenizer_path:
            # The parts of an array share this file, and may end at the same moment.
            draft = Path(f"{self._plan.prefixes[0]}.tokenizer.partial")
            replace_file(self._plan.tokenizer_path, self._plan.tokenizer, draft)

    def _publish(self) -> None:
        self._write_tokenizer()
        for writer in self._writers:
            writer.publish()
        self._keep_partial(False)
        self._journal.remove()
