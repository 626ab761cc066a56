"""Hugging Face datasets as raw text. The only file that knows `datasets`, imported when one is opened."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamor.data.text import CHUNK_BYTES, TextChunk
from megamor.errors import DataError


@dataclass(frozen=True)
class DatasetInput:
    """A Hugging Face dataset, by name on the hub or as a local path (files, or what `save_to_disk` wrote).

    `column` holds the text; `size` counts rows. Raises DataError if it can't be loaded or has no such split or column.
    """

    name: str
    config: str | None
    split: str
    column: str
    revision: str | None = None
    names: Sequence[str] = field(init=False)
    size: int = field(init=False)
    _rows: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rows = _load(self.name, self.config, self.split, self.revision)
        if self.column not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise DataError(f"dataset {self.name} has no column {self.column!r} but {columns}; name it with --json-key")
        object.__setattr__(self, "_rows", rows.select_columns([self.column]))
        object.__setattr__(self, "size", len(rows))
        object.__setattr__(self, "names", [f"{self.name}:{self.split}"])

    def chunks(self) -> Iterator[TextChunk]:
        """Rows as lines of JSON, so that they are treated exactly like those of a file."""
        place = f"dataset {self.name}, split {self.split}"
        lines: list[bytes] = []
        size, row = 0, 0
        for row, text in enumerate(self._texts(), start=1):
            lines.append(json.dumps({self.column: text}).encode())
            size += len(lines[-1])
            if size >= CHUNK_BYTES:
                yield TextChunk(0, place, row - len(lines) + 1, "jsonl", b"\n".join(lines), row)
                lines, size = [], 0
        if lines:
            yield TextChunk(0, place, row - len(lines) + 1, "jsonl", b"\n".join(lines), row)

    def _texts(self) -> Iterator[object]:
        for batch in self._rows.iter(batch_size=256):
            yield from batch[self.column]


def _load(name: str, config: str | None, split: str, revision: str | None) -> Any:
    import datasets

    try:
        if (Path(name) / "state.json").exists():
            return datasets.load_from_disk(name)
        if (Path(name) / "dataset_dict.json").exists():
            return datasets.load_from_disk(name)[split]
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except KeyError as error:
        raise DataError(f"dataset {name} has no split {error}; name one with --hf-split") from error
    except RuntimeError as error:  # what `datasets` raises for repositories that load through a script of their own
        raise DataError(
            f"dataset {name} can't be loaded: {error}; try the hub's own conversion with "
            "--hf-revision refs/convert/parquet"
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"dataset {name} (config {config}, split {split}) can't be loaded: {error}; check the name, "
            "--hf-config, --hf-split and the network"
        ) from error
