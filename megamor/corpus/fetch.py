"""Download a public corpus as files that preprocessing reads, with a record of where they came from.

Files of the Hugging Face hub are downloaded by `huggingface_hub`, which resumes interrupted downloads, and rows are
streamed by `datasets`. `source.json` is written last: without it a corpus is incomplete and the next call continues.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamor.corpus.corpora import CORPORA, PILE_PART, Corpus, GitHubFiles, HubDataset
from megamor.corpus.documents import parse_chunk
from megamor.corpus.text import SUFFIXES, FileInput, TextInput, find_files, kind_of
from megamor.errors import DataError
from megamor.files import draft_for, parse_json, replace_file, sha256_of_file
from megamor.lock import WriteLock

GITHUB = "https://raw.githubusercontent.com"
RECORD = "source.json"
_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class _Request:
    """What to fetch: `splits` of `corpus` into `directory`, from the path `local` if given.

    `lenient`: contents that differ from what was published are taken, and the difference recorded.
    """

    corpus: Corpus
    directory: Path
    splits: Sequence[str]
    local: Path | None
    revision: str | None
    advance: Callable[[int], None]
    lenient: bool

    def differs(self, entry: dict[str, str], difference: str) -> None:
        """Record that a split isn't what was published. Raises DataError unless that is allowed."""
        if not self.lenient:
            origin = f"--from {self.local}" if self.local else self.corpus.source.location
            raise DataError(
                f"{origin} is not {self.corpus.title} as published: {difference}; give another copy, or take this "
                "one with --allow-mismatch"
            )
        entry["differs"] = difference


def fetch(
    name: str,
    directory: Path,
    splits: Sequence[str],
    *,
    local: str | None = None,
    revision: str | None = None,
    advance: Callable[[int], None] = lambda size: None,
    allow_mismatch: bool = False,
) -> dict[str, Any]:
    """Write `splits` of the corpus `name` to `directory`, and return what `source.json` says.

    Splits that are already there from the same source are left alone. `local` names a copy to use instead of the
    network, `revision` another commit or branch of a hub dataset. `advance` is called with the bytes of text just
    written. Raises DataError if a split can't be downloaded, read or written, or, unless `allow_mismatch`, isn't what
    was published.
    """
    corpus = CORPORA[name]
    origin = {"location": local or corpus.source.location, "asked_revision": revision}
    new: dict[str, Any] = {"name": name, "title": corpus.title, "licence": corpus.licence, **origin, "files": []}
    record = _read_record(directory) or new
    # A directory never mixes splits of two origins: the record has one location for all of them.
    if {key: record.get(key) for key in origin} != origin:
        raise DataError(f"{directory} holds data from {record['location']}; choose another --output-dir")
    missing = [split for split in splits if split not in {file["split"] for file in record["files"]}]
    if not missing:
        return record
    if local and not Path(local).exists():
        raise DataError(f"--from {local}: no such file or directory")
    # A revision that isn't fixed may have grown.
    unknown = isinstance(corpus.source, HubDataset) and not local and (revision or not corpus.source.revision)
    lenient = allow_mismatch or bool(unknown)
    request = _Request(corpus, directory, missing, Path(local) if local else None, revision, advance, lenient)
    is_new = not directory.parent.exists()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with WriteLock(directory, str(directory), "wait for it or choose another --output-dir") as lock:
            if (_read_record(directory) or new) != record:
                raise DataError(f"another process has just fetched data to {directory}; run the command again")
            if isinstance(corpus.source, HubDataset) and not corpus.source.column:
                files = _copy_hub_files(corpus.source, request)
            else:
                files = _write_splits(corpus.source, request)
            lock.check()
            record["files"] += files
            replace_file(directory / RECORD, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise DataError(f"{directory} can't be written: {error.strerror or error}") from error
    finally:
        if is_new:
            with suppress(OSError):  # something was written
                directory.parent.rmdir()
    return record


def _read_record(directory: Path) -> dict[str, Any] | None:
    try:
        return dict(parse_json((directory / RECORD).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{directory / RECORD} can't be read: {error}; remove it to fetch again") from error


def _write_splits(source: GitHubFiles | HubDataset, request: _Request) -> list[dict[str, Any]]:
    commit: str | None = None
    if isinstance(source, GitHubFiles):
        commit = source.commit
    elif not request.local:
        commit = _hub_info(source, request.revision).sha
    written = []
    for split in request.splits:
        if isinstance(source, GitHubFiles):
            path, blob, (start, end) = source.splits[split]
            text = _github_file(source, path, blob, request).decode()
            texts: Iterable[str] = io.StringIO(text[round(start * len(text)) : round(end * len(text))])
        else:
            texts = _rows(source, split, request, commit)
        differences: dict[str, str] = {}
        documents = request.corpus.documents(_compared(texts, split, request, differences))
        written.append(_write_documents(request, split, documents, commit) | differences)
    return written


def _compared(texts: Iterable[str], split: str, request: _Request, differences: dict[str, str]) -> Iterator[str]:
    """The same texts, compared with what was published when they end, or are too many."""
    corpus, expected = request.corpus, request.corpus.rows.get(split, 0)
    count = words = foreign = 0
    for text in texts:
        count += 1
        words += text.count(" ")
        foreign += text.count(corpus.foreign) if corpus.foreign else 0
        if count > expected > 0 and not request.lenient:
            break
        yield text
    if foreign > words / 2000:
        request.differs(differences, f"{split} has {corpus.foreign} {foreign:,} times, as another version of it has")
    # Text files of documents lack the blank rows, of which there are a few.
    least = expected if corpus.separator in (None, "\n") else expected * 0.999
    if expected and not least <= count <= expected:
        number = "more than" if count > expected else f"{count:,} instead of"
        request.differs(differences, f"{split} has {number} {expected:,} rows")


def _github_file(source: GitHubFiles, path: str, blob: str, request: _Request) -> bytes:
    """Contents of a file, downloaded unless a copy is there. Raises DataError unless git would call them `blob`."""
    file = request.directory / Path(path).name
    if request.local:
        file = request.local / file.name if request.local.is_dir() else request.local
        if not file.is_file():
            raise DataError(f"{file} doesn't exist; give the publisher's file, or its directory, with --from")
    if file.exists():
        content = file.read_bytes()
    else:
        # Not resumed, since these files have a few MB.
        url = f"{GITHUB}/{source.repository}/{source.commit}/{path}"
        with _network_errors(url), urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            content = response.read()
    found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if found != blob:
        raise DataError(f"{file} is not the published file: its git id is {found}, not {blob}")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, content)
    return content


def _rows(source: HubDataset, split: str, request: _Request, commit: str | None) -> Iterator[str]:
    """Rows of a split; of text files, what is between separators."""
    separator, column = request.corpus.separator, source.column or ""
    is_lines = separator == "\n"
    with nullcontext() if request.local else _network_errors(f"dataset {source.dataset}"):
        for chunk in _open_split(source, split, request, commit).chunks():
            if chunk.kind != "txt":
                yield from parse_chunk(chunk, column, keep_empty=True).texts
            elif separator is None:
                raise DataError(f"{chunk.name}: text files don't say where a document of {request.corpus.title} ends")
            else:
                found = parse_chunk(chunk, column, separator, keep_empty=is_lines).texts
                yield from found if is_lines else map(str.strip, found)


def _open_split(source: HubDataset, split: str, request: _Request, commit: str | None) -> TextInput:
    """A split on the hub, in what `save_to_disk` wrote, or in local files of one kind.

    If there are several splits, the names of files or of their directories say to which they belong.
    """
    from megamor.corpus.hub import DatasetInput

    local, column, theirs = request.local, source.column or "", source.splits[split]
    if local is None:
        return DatasetInput(source.dataset, source.config, theirs, column, commit, streaming=True)
    if len(request.splits) > 1 and (local.is_file() or (local / "state.json").exists()):
        raise DataError(f"--from {local} is one split only: say which with --splits, {' or '.join(request.splits)}")
    if (local / "state.json").exists() or (local / "dataset_dict.json").exists():
        return DatasetInput(str(local), None, theirs, column, None)
    files = sorted(path for path in local.rglob("*") if path.name.lower().endswith(SUFFIXES))
    if len(source.splits) > 1:
        name = re.compile(rf"(?<![a-z]){'val(id(ation)?)?|dev' if split == 'validation' else split}(?![a-z])")
        files = [path for path in files if name.search(path.relative_to(local).as_posix().lower())]
    if not files and local.is_dir():
        raise DataError(f"--from {local}: no file of split {split}: none of a known kind has it in its name")
    if len({kind_of(path.name) for path in files}) > 1:
        kinds = ", ".join(sorted({path.suffix for path in files}))
        raise DataError(f"--from {local} has several kinds of files for split {split} ({kinds}): give one kind")
    return find_files([str(path) for path in files] or [str(local)], column, request.corpus.separator, "--from")


def _copy_hub_files(source: HubDataset, request: _Request) -> list[dict[str, Any]]:
    hashes: dict[str, str | None] = {}
    commit = None
    if request.local:
        names = [str(path.relative_to(request.local)) for path in request.local.rglob("*") if path.is_file()]
    else:
        info = _hub_info(source, request.revision)
        commit, names = info.sha, [file.rfilename for file in info.siblings]
        hashes = {file.rfilename: file.lfs and file.lfs.sha256 for file in info.siblings}
    chosen = {split: sorted(fnmatch.filter(names, source.splits[split])) for split in request.splits}
    for split, found in chosen.items():
        if not found:
            raise DataError(
                f"{request.local or source.dataset} has no {source.splits[split]}, the files of split {split}"
            )
    differences = {split: _compare_copies(split, found, request) for split, found in chosen.items() if request.local}
    written = []
    for split, name in ((split, name) for split, found in chosen.items() for name in found):
        path = request.directory / name
        if request.local:
            with draft_for(path) as draft:
                shutil.copyfile(request.local / name, draft)
        else:
            import huggingface_hub as hub

            with _network_errors(f"{name} of dataset {source.dataset}"):
                hub.hf_hub_download(
                    source.dataset, name, repo_type="dataset", revision=commit, local_dir=request.directory
                )
        entry = _entry(split, path, name, commit)
        # The client checks the size only.
        if hashes.get(name) not in (None, entry["sha256"]):
            path.unlink()
            raise DataError(f"{path} was damaged on the way: its SHA-256 isn't {hashes[name]}; run the command again")
        written.append(entry | differences.get(split, {}))
    # What the client keeps to resume downloads, which are complete now.
    shutil.rmtree(request.directory / ".cache", ignore_errors=True)
    return written


def _compare_copies(split: str, names: Sequence[str], request: _Request) -> dict[str, str]:
    """Compare the number of The Pile's files, and the first record of each, with what was published."""
    differences: dict[str, str] = {}
    if len(names) != request.corpus.rows[split]:
        request.differs(differences, f"{split} has {len(names)} files instead of {request.corpus.rows[split]}")
    for name in names:
        chunk = next(FileInput([f"{request.local}/{name}"]).chunks(), None)
        try:
            record = parse_json(bytes(chunk.data if chunk else b"").partition(b"\n")[0])
            part = record["meta"]["pile_set_name"] if isinstance(record["text"], str) else None
        except (ValueError, KeyError, TypeError):
            part = None
        if not PILE_PART.fullmatch(str(part)):
            request.differs(differences, f"the first record of {name} is of {part!r}, which is no part of it")
    return differences


def _hub_info(source: HubDataset, revision: str | None) -> Any:
    """Commit, files and hashes of a dataset."""
    import huggingface_hub

    with _network_errors(source.location):
        return huggingface_hub.HfApi().dataset_info(
            source.dataset, revision=revision or source.revision, files_metadata=True
        )


@contextmanager
def _network_errors(what: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # urllib, the hub's client and its HTTP library have unrelated classes of errors
        raise DataError(
            f"{what} can't be fetched: {error}; check the network and run the command again, or give a local copy with "
            "--from PATH"
        ) from error


def _write_documents(request: _Request, split: str, documents: Iterable[str], revision: str | None) -> dict[str, Any]:
    """Write compressed JSON lines, and return their entry in the record."""
    import zstandard

    path, count = request.directory / f"{split}.jsonl.zst", 0
    compressor = zstandard.ZstdCompressor(level=6)
    with draft_for(path) as draft:
        with draft.open("wb") as file, compressor.stream_writer(file) as out:
            for text in documents:
                line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
                out.write(line)
                request.advance(len(line))
                count += 1
        if not count:
            raise DataError(f"{path} would hold no document; is the source the right one?")
    return _entry(split, path, path.name, revision) | {"documents": count}


def _entry(split: str, path: Path, name: str, revision: str | None) -> dict[str, Any]:
    return {
        "split": split,
        "file": name,
        "bytes": path.stat().st_size,
        "sha256": sha256_of_file(path),
        "revision": revision,
    }
