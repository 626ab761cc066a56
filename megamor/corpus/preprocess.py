"""Raw text to token shards: reads, has chunks encoded, writes them in order, and can be interrupted at any point.

The state of a run is the number of the next chunk and the sizes of the partial files; see `megamor.corpus.journal`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from megamor.corpus.dedup import HashLog, hash_log_path
from megamor.corpus.documents import Counts
from megamor.corpus.encode import ChunkEncoder, EncodedChunk, EncodeOptions, encode_in_order
from megamor.corpus.journal import Journal, JournalEntry
from megamor.corpus.text import FIRST, ChunkId, InputRange, TextInput, kind_of
from megamor.corpus.writer import ShardWriter, lock_prefix, publish_finished
from megamor.data.meta import ShardMeta
from megamor.errors import DataError
from megamor.files import replace_file

JOURNAL_SECONDS = 10.0


@dataclass
class Totals:
    """What a run has done so far, earlier interrupted attempts included.

    `documents` and `tokens` count what was written by (split, source). `position` is how far the input has been read,
    in the unit of `TextInput.size`.
    """

    counts: Counts = field(default_factory=Counts)
    documents: Counter[tuple[int, int]] = field(default_factory=Counter)
    tokens: Counter[tuple[int, int]] = field(default_factory=Counter)
    position: int = 0

    def add(self, chunk: EncodedChunk) -> None:
        """Count one chunk."""
        for split, lengths in enumerate(chunk.lengths):
            self.documents[split, chunk.chunk.id.source] += len(lengths)
            self.tokens[split, chunk.chunk.id.source] += len(chunk.tokens[split])
        self.counts += chunk.counts
        self.position = chunk.chunk.position

    def of_split(self, split: int) -> tuple[int, int]:
        """Documents and tokens of one split."""
        documents, tokens = (
            sum(count for (of, _), count in each.items() if of == split) for each in (self.documents, self.tokens)
        )
        return documents, tokens

    def to_json(self) -> dict[str, Any]:
        """The totals as plain data, for the journal."""
        listed = {name: [[*key, n] for key, n in getattr(self, name).items() if n] for name in ("documents", "tokens")}
        return {**asdict(self.counts), "position": self.position, **listed}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Totals:
        """The inverse of `to_json`."""
        documents, tokens = (
            Counter({(split, source): count for split, source, count in saved[name]})
            for name in ("documents", "tokens")
        )
        counts = Counts(**{each.name: saved[each.name] for each in fields(Counts) if each.name in saved})
        return cls(counts, documents, tokens, saved["position"])


@dataclass(frozen=True)
class PreprocessJob:
    """What to do: the chunks of `texts` in the range `within` into one shard for each of `prefixes`, in `dtype`.

    `tokenizer` is written to `tokenizer_path` if that is given. `identity` is plain data with everything else that
    decides the output, except `options.skip_bad`: that may be switched on to resume a run that a bad line stopped. With
    `options.hashes` only the first of equal documents is kept. With `allow_empty` a shard may have no document.
    """

    texts: TextInput
    within: InputRange
    prefixes: Sequence[str]
    journal_prefix: str
    dtype: np.dtype
    meta: ShardMeta
    tokenizer: bytes
    tokenizer_path: Path | None
    identity: Mapping[str, Any]
    options: EncodeOptions
    allow_empty: bool = False
    restart: bool = False


class Interrupted(Exception):
    """The run was asked to stop by `signum`. `kept`: it left a journal, so it can be resumed."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.kept = False


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` on Ctrl-C and SIGTERM within the block, at any point of it; once, so that clean-up completes.

    Does nothing outside the main thread, where Python can't catch signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise Interrupted(signum)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class PreprocessRun:
    """One run of preprocessing, from the first chunk or from where an earlier run stopped.

    `tell` is called with messages for the user. `resumed_bytes` of the totals' text are of earlier runs.
    """

    def __init__(self, job: PreprocessJob, encoder: ChunkEncoder, tell: Callable[[str], None]) -> None:
        self._job = job
        self._encoder = encoder
        self._tell = tell
        self._journal = Journal(job.journal_prefix, job.identity)
        self._next = FIRST
        self._writers: list[ShardWriter] = []
        self._logs: list[HashLog] = []
        self.totals = Totals()
        self.resumed_bytes = 0

    def execute(
        self, workers: int, display: Callable[[Totals], AbstractContextManager[Callable[[Totals], None]]]
    ) -> Totals:
        """Do the job. `display`, opened with the totals to start from, gives a function to call after every chunk.

        Raises DataError for damaged input, for a shard without a document, and if the output can't be written;
        Interrupted after Ctrl-C and SIGTERM. Once there is a journal, all of them leave behind what a later run needs.
        """
        # A signal may arrive at any point: being killed there would be harmless, too, so there is nothing to protect.
        with interruptible():
            found, reason = self._find_journal()
            if found and found.complete:
                # Killed between finishing and renaming: only the renames are left.
                self.totals = Totals.from_json(found.counts)
                with ExitStack() as locks:
                    for prefix in self._job.prefixes:
                        locks.enter_context(lock_prefix(prefix))
                    self._publish()
                return self.totals
            with ExitStack() as stack:
                try:
                    self._open(stack)
                    self._resume(found, reason)
                    with display(self.totals) as show:
                        self._encode(workers, show)
                    self._finish()
                    self._publish()
                except BaseException as error:
                    kept = self._journal.path.exists()
                    for file in self._files():
                        file.keep_partial = kept
                    if kept and isinstance(error, DataError):
                        self._tell("finished work is kept: fix the cause, then rerun the same command to resume")
                    if isinstance(error, Interrupted):
                        error.kept = kept
                    raise
        return self.totals

    def _find_journal(self) -> tuple[JournalEntry | None, str]:
        if self._job.restart:
            return None, "--restart"
        found, reason = self._journal.read()
        # The other way round, from stop to skip, the run can resume: it stopped before the first bad line.
        if found and found.counts["bad"] and not self._job.options.skip_bad:
            return None, f"{self._journal.path} is of a run that skipped bad lines"
        return found, reason

    def _open(self, stack: ExitStack) -> None:
        for prefix in self._job.prefixes:
            mask = self._job.options.answer_key is not None
            writer = ShardWriter(prefix, self._job.dtype, resume=True, loss_mask=mask)
            self._writers.append(stack.enter_context(writer))
        for prefix in self._job.prefixes if self._job.options.hashes else ():
            self._logs.append(stack.enter_context(HashLog(prefix)))

    def _files(self) -> list[ShardWriter | HashLog]:
        return [*self._writers, *self._logs]

    def _resume(self, found: JournalEntry | None, reason: str) -> None:
        """Truncate the partial files to the point that the journal describes, or to nothing."""
        if found and self._rewind(found.written):
            self._next = found.next
            self.totals = Totals.from_json(found.counts)
            self.resumed_bytes = self.totals.counts.text_bytes
            self._tell(f"resuming an interrupted run after {self.resumed_bytes / 1e6:,.1f} MB of text")
            return
        if found:
            reason = f"the partial files are shorter than {self._journal.path} says"
        if reason:
            self._tell(f"starting from the beginning: {reason}")
        self._journal.remove()
        self._rewind([(0, 0)] * len(self._writers))

    def _rewind(self, written: Sequence[tuple[int, int]]) -> bool:
        # Not strict for the logs: without --deduplicate there are none.
        return all(writer.rewind(*counts) for writer, counts in zip(self._writers, written, strict=True)) and all(
            log.rewind(documents) for log, (documents, _) in zip(self._logs, written, strict=False)
        )

    def _encode(self, workers: int, show: Callable[[Totals], None]) -> None:
        recorded = time.monotonic()
        chunks = self._job.texts.chunks(self._job.within, self._next)
        with closing(encode_in_order(chunks, self._encoder, workers)) as results:
            for chunk in results:
                self._write(chunk)
                # Between chunks, so that files, counts and the next chunk's number agree.
                if time.monotonic() - recorded >= JOURNAL_SECONDS:
                    self._record()
                    recorded = time.monotonic()
                show(self.totals)

    def _write(self, chunk: EncodedChunk) -> None:
        # Here and not in the threads, so that the first copy in the order of the input is the one that is kept.
        for split, log in enumerate(self._logs):
            chunk.counts.duplicates += log.drop_seen(chunk, split)
        for writer, *documents in zip(self._writers, chunk.tokens, chunk.lengths, chunk.prompts, strict=True):
            writer.add_documents(*documents)
        self.totals.add(chunk)
        self._next = ChunkId(chunk.chunk.id.source, chunk.chunk.id.number + 1)

    def _record(self, *, complete: bool = False) -> None:
        """Make everything written durable, then say so in the journal."""
        # In this order: the journal may describe less than the files hold, never more.
        for file in self._files():
            file.sync()
        written = [(writer.num_sequences, writer.num_tokens) for writer in self._writers]
        self._journal.write(JournalEntry(self._next, written, self.totals.to_json(), complete))

    def _check_separator(self) -> None:
        """Raise DataError if text files became one document each for lack of the separator; tell it of other texts."""
        separator, texts = self._job.options.separator, self._job.texts
        if not separator or self.totals.counts.separators:
            return
        found = f"--document-separator {separator!r} occurs nowhere in the input"
        if self._job.allow_empty or not any(kind_of(name) == "txt" for name in texts.names):
            self._tell(f"warning: {found}: every text is one document")
            return
        self._journal.remove()
        raise DataError(
            f"{found}, so each text file would be one document; correct it (after Windows line ends it begins with "
            "'\\r\\n'), or leave the option out"
        )

    def _finish(self) -> None:
        """Complete all shards under their partial names."""
        self._check_separator()
        for split, writer in enumerate(self._writers):
            if not writer.num_sequences and not self._job.allow_empty:
                self._journal.remove()
                counts = {
                    k: n
                    for k, n in asdict(self.totals.counts).items()
                    if k not in ("text_bytes", "separators", "bad_shown")
                }
                left_out = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
                raise DataError(
                    f"{writer.prefix} would have no document ({self.totals.documents.total()} in all; left out: "
                    f"{left_out}); check the input" + (" or the fractions of --split" if len(self._writers) > 1 else "")
                )
            # All sources are listed, even those without a document here, so that the shards of an input merge into the
            # side file of one run.
            documents, tokens = self.totals.documents, self.totals.tokens
            sources = [
                {"name": name, "documents": documents[split, source], "tokens": tokens[split, source]}
                for source, name in enumerate(self._job.texts.names)
            ]
            writer.finish(replace(self._job.meta, sources=sources))
        self._record(complete=True)

    def _publish(self) -> None:
        """Give the finished files their names. May be repeated after it was killed."""
        if self._job.tokenizer_path:
            # The jobs of an array write the same file, perhaps at the same moment: each by way of its own draft.
            draft = Path(f"{self._job.prefixes[0]}.tokenizer.partial")
            replace_file(self._job.tokenizer_path, self._job.tokenizer, draft)
        for prefix in self._job.prefixes:
            publish_finished(prefix)
            hash_log_path(prefix).unlink(missing_ok=True)
        for writer in self._writers:
            writer.close()
        # Last: until here a rerun repeats the renames.
        self._journal.remove()
