"""Atomic writer of token shards: a file is under its final name only when the whole shard is complete and on disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megamor.data.meta import BlockHasher, ShardMeta, meta_path
from megamor.data.packing import ranges
from megamor.data.shard import CODE_OF_DTYPE, HEADER, MAGIC, VERSION, mask_path
from megamor.errors import DataError, InUseError
from megamor.files import parse_json, sha256_of_file, sync_directory
from megamor.lock import WriteLock

MAX_SEQUENCE_TOKENS = 2**31 - 1
_ENTRIES = 2**20


class ShardWriter:
    """Writes a data set. One document is one sequence, unless `finish` is told where documents start.

    Tokens and lengths go straight to `<prefix>.bin.partial` and `<prefix>.idx.partial`, so memory stays constant.
    `commit` finishes and renames them. As a context manager it removes the partial files unless they were committed.
    Failing writes (disk full, no permission) raise DataError, and so does a second writer on the same prefix.

    To resume after an interruption: `sync` makes everything added durable, and a writer with `resume` keeps the partial
    files, unless `keep_partial` is reset. It must `rewind` to a synced point before anything is added.
    """

    def __init__(
        self, prefix: str | os.PathLike[str], dtype: DTypeLike, *, resume: bool = False, loss_mask: bool = False
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODE_OF_DTYPE:
            raise DataError(f"token ids can't be written as {self.dtype}; use uint16 or int32")
        self.num_sequences = 0
        self.num_tokens = 0
        self.keep_partial = resume
        self._hasher = BlockHasher()
        self._files: list[BinaryIO] = []
        self._lock = lock_prefix(self.prefix)
        try:
            with _write_errors(self.prefix):
                Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
                self._lock.take()
                self._bin = self._open(f"{self.prefix}.bin.partial")
                self._idx = self._open(f"{self.prefix}.idx.partial")
                self._mask = self._open(f"{mask_path(self.prefix)}.partial") if loss_mask else None
            if not resume:
                self.rewind(0, 0)
        except (DataError, InUseError) as error:
            self.abort()
            raise DataError(str(error)) from error

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def add(self, tokens: ArrayLike) -> None:
        """Append one document: ids [n]. Raises DataError for ids that the dtype can't hold."""
        ids = np.asarray(tokens)
        self.add_documents(ids if ids.size else ids.astype(self.dtype), np.array([ids.size]))

    def add_documents(self, tokens: NDArray[Any], lengths: NDArray[Any], prompts: NDArray[Any] | None = None) -> None:
        """Append several documents: their concatenated ids [sum(lengths)], and their lengths [n].

        The first `prompts` [n] tokens of each don't count in the loss; None: all count.
        """
        assert lengths.sum() == len(tokens), "lengths must add up to the tokens"
        if len(lengths) and lengths.max() > MAX_SEQUENCE_TOKENS:
            raise DataError(
                f"a document of {lengths.max()} tokens is too long for {self.prefix}.idx (at most "
                f"{MAX_SEQUENCE_TOKENS}); split it"
            )
        mask = None
        if prompts is not None and self._mask is not None:  # computing it takes as long as writing the tokens
            mask = ranges(0 * lengths, lengths)[1] >= np.repeat(prompts, lengths)
        self.add_tokens(tokens, mask)
        self.add_lengths(lengths)

    def add_tokens(self, tokens: NDArray[Any], mask: NDArray[Any] | None = None) -> None:
        """Append ids [n] to the stream. `add_lengths`, called before or after, says how they are cut into sequences.

        A token counts in the loss where `mask` [n] isn't 0; None: all count. Only a writer with `loss_mask` keeps it.
        """
        data = np.ascontiguousarray(self._narrow(tokens)).view(np.uint8).data
        with _write_errors(self.prefix):
            self._bin.write(data)
            if self._mask is not None:
                self._mask.write((np.ones(len(tokens)) if mask is None else mask != 0).astype(np.uint8).data)
        # Hashed on the way: the hashes of the side file then need no second pass over the tokens.
        self._hasher.update(data)
        self.num_tokens += len(tokens)

    def add_lengths(self, lengths: NDArray[Any]) -> None:
        """Append the lengths [n] of sequences whose ids are given to `add_tokens`."""
        with _write_errors(self.prefix):
            self._idx.write(np.ascontiguousarray(lengths, "<i4").tobytes())
        self.num_sequences += len(lengths)

    def rewind(self, num_sequences: int, num_tokens: int) -> bool:
        """Truncate to a state that was synced. Returns False, changing nothing, if the partial files are shorter.

        Reads the tokens that remain, to hash them.
        """
        # At this stage the index holds its header and lengths only; `finish` writes the rest.
        files = [(self._idx, HEADER.size + 4 * num_sequences), (self._bin, num_tokens * self.dtype.itemsize)]
        files += [(self._mask, num_tokens)] if self._mask is not None else []
        if num_sequences and any(os.fstat(file.fileno()).st_size < size for file, size in files):
            return False
        with _write_errors(self.prefix):
            for file, size in files:
                file.truncate(size)
                file.seek(0)
            # Room for the header, which holds counts that are known at the end only.
            self._idx.write(bytes(HEADER.size))
            self._idx.seek(files[0][1])
            # The hash of what remains can't be recorded in the journal: hashlib's state can't be saved.
            self._hasher = BlockHasher()
            while block := self._bin.read(2**20):
                self._hasher.update(memoryview(block))
            if self._mask is not None:
                self._mask.seek(num_tokens)
        self.num_sequences, self.num_tokens = num_sequences, num_tokens
        return True

    def sync(self) -> None:
        """Wait until everything added is on disk."""
        with _write_errors(self.prefix):
            for file in self._files:
                _sync(file)

    def commit(self, meta: ShardMeta | None = None, document_starts: Iterable[NDArray[Any]] | None = None) -> None:
        """Finish the files and rename them to their final names."""
        self.finish(meta, document_starts)
        publish_finished(self.prefix)
        self.close()

    def finish(self, meta: ShardMeta | None = None, document_starts: Iterable[NDArray[Any]] | None = None) -> None:
        """Complete the partial files and make them durable, still under their temporary names.

        `document_starts` yields the document index in arrays: the sequence at which each document starts, and at the
        end the number of sequences. Writers of several splits all finish before `publish_finished` renames the first:
        a full disk then leaves none of them.
        """
        with _write_errors(self.prefix):
            self._lock.check()
            documents = write_index(self._idx, self.num_sequences, self.num_tokens, self.dtype, document_starts)
            self.sync()
            meta = replace(
                meta or ShardMeta(),
                dtype=self.dtype.name,
                documents=documents,
                tokens=self.num_tokens,
                idx_sha256=sha256_of_file(self._idx.name),
                bin_block_sha256=self._hasher.digests(),
                loss_mask_sha256=None if self._mask is None else sha256_of_file(self._mask.name),
            )
            with open(self._partial_meta, "wb") as side_file:
                side_file.write(meta.to_json().encode())
                _sync(side_file)

    def abort(self) -> None:
        """Close the files and remove them unless they are kept; does nothing after `commit` or a second time."""
        mine = [] if self.keep_partial else [file.name for file in self._files]
        # Unlinked while still locked, so that it can't be another writer's fresh file.
        for path in [*mine, self._partial_meta] if mine else []:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self.close()

    @property
    def _partial_meta(self) -> str:
        return f"{meta_path(self.prefix)}.partial"

    def _open(self, path: str) -> BinaryIO:
        """Open for writing, without truncating what a killed run left."""
        file = open(path, "r+b", buffering=2**20, opener=_create_without_truncating)  # noqa: SIM115 (closed by close)
        self._files.append(file)
        return file

    def close(self) -> None:
        for file in self._files:
            # Closing flushes the buffer, which on a full disk fails a second time.
            with contextlib.suppress(OSError):
                file.close()
        self._files.clear()
        self._lock.release()

    def _narrow(self, tokens: NDArray[Any]) -> NDArray[Any]:
        if len(tokens) and not np.can_cast(tokens.dtype, self.dtype):
            limits = np.iinfo(self.dtype)
            low, high = int(tokens.min()), int(tokens.max())
            if low < limits.min or high > limits.max:
                raise DataError(f"token ids from {low} to {high} don't fit {self.dtype.name} of {self.prefix}.bin")
        return tokens.astype(self.dtype, copy=False)


@contextlib.contextmanager
def _write_errors(prefix: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{prefix} can't be written: {error.strerror or error}; free space or choose another output prefix "
            "(nothing was left under that name)"
        ) from error


def lock_prefix(prefix: str) -> WriteLock:
    """The lock of a data set, not yet taken."""
    return WriteLock(prefix, prefix, "wait for it or choose another prefix")


def publish_finished(prefix: str) -> None:
    """Rename the finished files of a writer to their final names, replacing an earlier data set.

    Continues where an earlier call was killed; does nothing if all is renamed. Raises DataError if renaming fails.
    """
    if not os.path.exists(f"{prefix}.idx.partial"):
        return
    with _write_errors(prefix):
        # From here until the last rename there is no index, hence no data set: never an old index on new tokens.
        Path(f"{prefix}.idx").unlink(missing_ok=True)
        # Only what is still partial, since an earlier call may have been killed after some of the renames.
        for path in (f"{prefix}.bin", str(meta_path(prefix))):
            if os.path.exists(f"{path}.partial"):
                os.replace(f"{path}.partial", path)
        mask = mask_path(prefix)
        if not parse_json(meta_path(prefix).read_text(encoding="utf-8")).get("loss_mask_sha256"):
            for path in (mask, f"{mask}.partial"):  # what an earlier data set or attempt left
                Path(path).unlink(missing_ok=True)
        elif os.path.exists(f"{mask}.partial"):
            os.replace(f"{mask}.partial", mask)
        os.replace(f"{prefix}.idx.partial", f"{prefix}.idx")
        sync_directory(Path(prefix).parent)


def write_index(
    file: BinaryIO, num_sequences: int, num_tokens: int, dtype: np.dtype, starts: Iterable[NDArray[Any]] | None = None
) -> int:
    """Complete an index that holds only the lengths of its sequences; returns the number of documents.

    Adds the offsets, the document index (each sequence a document unless `starts` says otherwise) and the header.
    """
    offset = 0  # a Python integer, since 32 bits would overflow after 2 GiB
    for first in range(0, num_sequences, _ENTRIES):
        size = min(_ENTRIES, num_sequences - first)
        file.seek(HEADER.size + 4 * first)
        sizes = np.frombuffer(file.read(4 * size), "<i4").astype(np.int64) * dtype.itemsize
        ends = offset + np.cumsum(sizes)
        file.seek(HEADER.size + 4 * num_sequences + 8 * first)
        file.write((ends - sizes).astype("<i8").tobytes())
        offset = int(ends[-1])
    assert offset == num_tokens * dtype.itemsize, "lengths must add up to the tokens"
    file.seek(HEADER.size + 12 * num_sequences)
    entries = 0
    for block in starts if starts is not None else _one_each(num_sequences):
        file.write(np.ascontiguousarray(block, "<i8").tobytes())
        entries += len(block)
    # The header last: until then the file doesn't begin with the magic bytes and no reader would accept it.
    file.seek(0)
    file.write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dtype], num_sequences, entries))
    return entries - 1


def _one_each(num_sequences: int) -> Iterator[NDArray[Any]]:
    """The document index if each sequence is a document, in arrays."""
    for first in range(0, num_sequences + 1, _ENTRIES):
        yield np.arange(first, min(first + _ENTRIES, num_sequences + 1), dtype="<i8")


def _create_without_truncating(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
