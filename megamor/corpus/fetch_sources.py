"""How a corpus of `study_data` becomes files: from a repository, from rows of a dataset, or as it is."""

from __future__ import annotations

import fnmatch
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import zstandard

from megamor.corpus.download import download, git_id_of_file, read_json
from megamor.corpus.hub import DatasetInput
from megamor.corpus.study_data import GitHubFiles, HubFiles, HubRows, StudySet
from megamor.errors import DataError
from megamor.files import sha256_of_file
from megamor.metrics.byte_progress import byte_progress

GITHUB = "https://raw.githubusercontent.com"
RECORD = "source.json"


def hub_url() -> str:
    """Where the Hugging Face hub is; its own libraries obey the same variable."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def fetch(
    name: str,
    chosen: StudySet,
    directory: Path,
    splits: Sequence[str],
    *,
    local: str | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Write the splits of a corpus to `directory`; returns what `source.json` says.

    Splits that are there from the same source are left alone. Raises DataError if one can't be had or written.
    """
    origin = {"location": local or chosen.source.location, "asked_revision": revision}
    record = _read_record(directory) or {
        "name": name, "title": chosen.title, "licence": chosen.licence, **origin, "files": []
    }  # fmt: skip
    if {key: record.get(key) for key in origin} != origin:
        raise DataError(f"{directory} holds data from {record['location']}; choose another --output-dir")
    there = {file["split"] for file in record["files"]}
    missing = [split for split in splits if split not in there]
    if not missing:
        return record
    if local and not Path(local).exists():
        raise DataError(f"--from {local}: no such file or directory")
    try:
        if isinstance(chosen.source, GitHubFiles):
            files = _fetch_github(chosen, chosen.source, directory, missing, local)
        elif isinstance(chosen.source, HubRows):
            files = _fetch_rows(chosen, chosen.source, directory, missing, local, revision)
        else:
            files = _fetch_files(chosen.source, directory, missing, local, revision)
        record["files"] += files
        _write_whole(directory / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    except OSError as error:
        raise DataError(f"{directory} can't be written: {error.strerror or error}") from error
    return record


def _read_record(directory: Path) -> dict[str, Any] | None:
    try:
        return json.loads((directory / RECORD).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{directory / RECORD} can't be read: {error}; remove it to fetch again") from error


def _fetch_github(
    chosen: StudySet, source: GitHubFiles, directory: Path, splits: Sequence[str], local: str | None
) -> list[dict[str, Any]]:
    written = []
    for split in splits:
        path, blob, (start, end) = source.splits[split]
        if local:
            file = Path(local) / Path(path).name if Path(local).is_dir() else Path(local)
            _require_blob(file, blob)
        else:
            file = directory / Path(path).name
            url = f"{GITHUB}/{source.repository}/{source.commit}/{path}"
            with byte_progress(f"fetching {file.name}", None) as advance:
                download(url, file, partial(_require_blob, blob=blob), advance)
        text = file.read_text(encoding="utf-8")
        part = text[round(start * len(text)) : round(end * len(text))]
        documents = chosen.documents(io.StringIO(part))
        written.append(_write_documents(directory, split, documents, revision=source.commit))
    return written


def _require_blob(file: Path, blob: str) -> None:
    if not file.is_file():
        raise DataError(f"{file} doesn't exist; --from names the publisher's file, or the directory it lies in")
    if git_id_of_file(file) != blob:
        raise DataError(f"{file} is not the published file: git would call it {git_id_of_file(file)}, not {blob}")


def _fetch_rows(
    chosen: StudySet,
    source: HubRows,
    directory: Path,
    splits: Sequence[str],
    local: str | None,
    revision: str | None,
) -> list[dict[str, Any]]:
    commit = None if local else _hub_info(source.dataset, revision or source.revision)["sha"]
    written = []
    for split in splits:
        theirs = source.splits[split]
        if local:
            rows = DatasetInput(local, None, theirs, source.column)
        else:
            rows = DatasetInput(source.dataset, source.config, theirs, source.column, commit, streaming=True)
        documents = chosen.documents(_texts(rows))
        written.append(_write_documents(directory, split, documents, revision=commit))
    return written


def _texts(rows: DatasetInput) -> Iterator[str]:
    try:
        for chunk in rows.chunks():
            for text in chunk.data:
                if not isinstance(text, str):
                    raise DataError(f"dataset {rows.name} has a row that holds {type(text).__name__}, not text")
                yield text
    except DataError:
        raise
    except Exception as error:  # those of whatever HTTP client `datasets` uses
        raise DataError(f"dataset {rows.name} broke off: {error}; check the network and run it again") from error


def _fetch_files(
    source: HubFiles, directory: Path, splits: Sequence[str], local: str | None, revision: str | None
) -> list[dict[str, Any]]:
    if local:
        commit, hashes = None, {}
        paths = [path for path in Path(local).rglob("*") if path.is_file()]
        sizes = {str(path.relative_to(local)): path.stat().st_size for path in paths}
    else:
        info = _hub_info(source.dataset, revision or source.revision)
        commit = info["sha"]
        hashes = {blob["rfilename"]: (blob.get("lfs") or {}).get("sha256") for blob in info["siblings"]}
        sizes = {blob["rfilename"]: blob.get("size") or 0 for blob in info["siblings"]}
    chosen = {split: sorted(fnmatch.filter(sizes, source.splits[split])) for split in splits}
    for split, names in chosen.items():
        if not names:
            raise DataError(f"{local or source.dataset} has no {source.splits[split]}, the files of split {split}")
    written = []
    with byte_progress("fetching", sum(sizes[name] for names in chosen.values() for name in names)) as advance:
        for split, name in ((split, name) for split, names in chosen.items() for name in names):
            path, digest = directory / name, hashes.get(name)
            if local:
                _write_whole(path, Path(local) / name)
                advance(sizes[name])
            else:
                url = f"{hub_url()}/datasets/{source.dataset}/resolve/{commit}/{name}"
                download(url, path, partial(_require_hash, expected=digest), advance)
            written.append(_entry(split, path, name, commit, digest))
    return written


def _hub_info(dataset: str, revision: str | None) -> dict[str, Any]:
    """Commit, files and hashes of a dataset."""
    return read_json(
        f"{hub_url()}/api/datasets/{dataset}/revision/{(revision or 'main').replace('/', '%2F')}?blobs=true"
    )


def _require_hash(file: Path, expected: str | None) -> None:
    if expected and sha256_of_file(file) != expected:
        raise DataError(f"{file} came damaged: its SHA-256 isn't {expected}; run the command again")


def _write_documents(directory: Path, split: str, documents: Iterable[str], *, revision: str | None) -> dict[str, Any]:
    """Compressed lines of JSON; returns what is to be said of the file."""
    path, count = directory / f"{split}.jsonl.zst", 0
    draft = _draft(path)
    try:
        compressor = zstandard.ZstdCompressor(level=6)
        with open(draft, "wb") as file, compressor.stream_writer(file) as out, byte_progress(split, None) as advance:
            for text in documents:
                line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
                out.write(line)
                advance(len(line))
                count += 1
        if not count:
            raise DataError(f"{path} would hold no document; is the source the right one?")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return _entry(split, path, path.name, revision) | {"documents": count}


def _entry(split: str, path: Path, name: str, revision: str | None, digest: str | None = None) -> dict[str, Any]:
    return {
        "split": split,
        "file": name,
        "bytes": path.stat().st_size,
        "sha256": digest or sha256_of_file(path),
        "revision": revision,
    }


def _draft(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(path.name + ".partial")


def _write_whole(path: Path, content: bytes | Path) -> None:
    """Write bytes, or the contents of a file, so that they appear at once."""
    draft = _draft(path)
    if isinstance(content, Path):
        shutil.copyfile(content, draft)
    else:
        draft.write_bytes(content)
    os.replace(draft, path)
