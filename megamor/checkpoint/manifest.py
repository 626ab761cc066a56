"""The manifest: the size and SHA-256 of every file of a checkpoint, and the check against it.

Format of `manifest.json`: `{"format": 1, "files": {"state/__0_0.distcp": {"size": 1234, "sha256": "…"}}}`. Paths are
relative to the checkpoint, with forward slashes. The manifest itself is not listed.

On a network file system a rank may see a file that another has just written short, or not at all. So ranks first
exchange what each of them sees; a file has the largest size that any rank sees, and only ranks that see this size read
it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megamor.checkpoint.layout import MANIFEST_FILE
from megamor.errors import CheckpointError
from megamor.files import parse_json, sha256_of_file, sha256_of_files
from megamor.ranks import Ranks

FORMAT = 1


class FileRecord(NamedTuple):
    """Size of a file in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


Manifest = dict[str, FileRecord]
"""Every file of a checkpoint by its path."""


def manifest_json(manifest: Manifest) -> str:
    """Text of `manifest.json`."""
    files = {name: record._asdict() for name, record in sorted(manifest.items())}
    return json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n"


def read_manifest(checkpoint: Path) -> Manifest:
    """Read `manifest.json` of `checkpoint`.

    Raises:
        CheckpointError: it is missing, damaged, or in a format that this version doesn't know; or a file that it
            names, or a link in the directory, is outside the directory.
    """
    path = checkpoint / MANIFEST_FILE
    try:
        content: dict[str, Any] = parse_json(path.read_bytes())
        files = {name: FileRecord(int(r["size"]), str(r["sha256"])) for name, r in content["files"].items()}
        found = content["format"]
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} has no {MANIFEST_FILE}: it is not a complete checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found}; this version reads format {FORMAT}")
    # A checkpoint from elsewhere must not make other files of this machine its own: an export would publish them.
    root = checkpoint.resolve()
    for name in [*files, *(link.relative_to(checkpoint) for link in checkpoint.rglob("*") if link.is_symlink())]:
        try:
            inside = (checkpoint / name).resolve().is_relative_to(root)
        except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, a link to itself
            raise CheckpointError(f"{path} is damaged: {str(checkpoint / name)!r} leads nowhere ({error})") from error
        if not inside:
            raise CheckpointError(f"{checkpoint / name} is outside the checkpoint: put a copy of it inside")
    return files


def create_manifest(directory: Path, ranks: Ranks) -> Manifest:
    """Flush every file below `directory` to disk and record it. Collective; each rank reads some of the files."""
    seen = ranks.run_on_all(f"listing {directory}", lambda: list_sizes(directory))
    sizes = {name: max(view.get(name, -1) for view in seen) for view in seen for name in view}
    readers = {name: [r for r, view in enumerate(seen) if view.get(name) == size] for name, size in sizes.items()}
    mine = assign_files(sizes, readers)[ranks.rank] if sizes else []
    # The files are read back because torch wrote most of them, which doesn't compute checksums.
    records = ranks.run_on_all(f"reading back {directory}", lambda: {name: _record(directory / name) for name in mine})
    return {name: record for part in records for name, record in part.items()}


def find_damage(checkpoint: Path, ranks: Ranks | None = None, *, hashes: bool = True) -> list[str]:
    """What is wrong with `checkpoint`, one line for each fault; empty for a whole one. Collective over `ranks`.

    Without `hashes` only presence and sizes are compared, which reads none of the files.
    """
    ranks = ranks or Ranks()
    views = ranks.gather(_view(checkpoint))
    # Written by rank 0 and read by all, so ranks that see it whole see the same one.
    manifest = next((found for found, _ in views if isinstance(found, dict)), None)
    if manifest is None:
        return list(dict.fromkeys(str(found) for found, _ in views))
    damage, readers = {}, {}
    for name, record in manifest.items():
        readers[name] = [rank for rank, (_, sizes) in enumerate(views) if sizes.get(name) == record.size]
        if not readers[name]:
            size = max(sizes.get(name, -1) for _, sizes in views)
            damage[name] = "is missing" if size < 0 else f"has {size} bytes instead of {record.size}"
    if hashes:
        sizes = {name: record.size for name, record in manifest.items() if readers[name]}
        assigned = assign_files(sizes, readers) + [[]] * ranks.world_size  # ranks that can't read anything get nothing
        changed = {name: fault for name in assigned[ranks.rank] if (fault := _fault(checkpoint, name, manifest))}
        for part in ranks.gather(changed):
            damage |= part
    return [f"{checkpoint / name} {fault}" for name, fault in sorted(damage.items())]


def verify(checkpoint: Path, *, hashes: bool = True) -> None:
    """Check `checkpoint` against its manifest, in one process.

    Raises:
        CheckpointError: naming the files that are missing, short or changed.
    """
    damage = find_damage(checkpoint, hashes=hashes)
    if damage:
        raise CheckpointError(f"{checkpoint} is damaged: {summary(damage)}")


def identity_sha256(directory: Path) -> str:
    """A hash that identifies the weights in `directory`: that of a checkpoint's manifest, which has those of all files,
    or of an export's weights."""
    manifest = directory / MANIFEST_FILE
    return sha256_of_files([manifest] if manifest.is_file() else directory.glob("*.safetensors"))


def summary(lines: Sequence[str], limit: int = 5) -> str:
    """The first `limit` lines in one, and the number of the others."""
    more = f"; and {len(lines) - limit} more" if len(lines) > limit else ""
    return "; ".join(lines[:limit]) + more


def list_sizes(directory: Path) -> dict[str, int]:
    """Size of every regular file below `directory`, by relative path."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def assign_files(sizes: Mapping[str, int], readers: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """The files that each rank is to read: the largest first, each by the one of its `readers` with the least to do.

    The result is the same on every rank. Ranks after the last reader are left out.
    """
    num_ranks = 1 + max((rank for ranks in readers.values() for rank in ranks), default=0)
    load = [0] * num_ranks
    assigned: list[list[str]] = [[] for _ in range(num_ranks)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min(readers[name], key=lambda rank: load[rank])
        load[rank] += sizes[name]
        assigned[rank].append(name)
    return assigned


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # torch doesn't flush what it writes
    return FileRecord(path.stat().st_size, sha256_of_file(path))


def _view(checkpoint: Path) -> tuple[Manifest | str, dict[str, int]]:
    """The manifest (or what is wrong with it) and the sizes of the files, as this process sees them."""
    try:
        return read_manifest(checkpoint), list_sizes(checkpoint)
    except CheckpointError as error:
        return str(error), {}
    except OSError as error:
        return f"{checkpoint} can't be read ({error})", {}


def _fault(checkpoint: Path, name: str, manifest: Manifest) -> str | None:
    try:
        same = sha256_of_file(checkpoint / name) == manifest[name].sha256
    except OSError as error:
        return f"can't be read ({error})"
    return None if same else "has changed since it was written (SHA-256 differs)"
