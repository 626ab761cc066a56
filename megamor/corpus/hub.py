"""Hugging Face datasets as raw text. The only file that knows `datasets`, imported when one is opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from megamor.corpus.text import CHUNK_BYTES, Place, Share, TextChunk, select_chunks
from megamor.errors import DataError

_ROWS_READ = 64


@dataclass(frozen=True)
class DatasetInput:
    """A Hugging Face dataset, by name on the hub or as a local path (files, or what `save_to_disk` wrote).

    `column` holds the text; `size` counts rows, unknown if it is streamed. Raises DataError if it can't be loaded or
    has no such split or column.
    """

    name: str
    config: str | None
    split: str
    column: str
    revision: str | None = None
    streaming: bool = False
    names: Sequence[str] = field(init=False)
    size: int = field(init=False)
    identity: Sequence[Any] = field(init=False)
    _rows: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rows = _load(self.name, self.config, self.split, self.revision, streaming=self.streaming)
        columns = rows.column_names or list(next(iter(rows), {}))
        if self.column not in columns:
            raise DataError(
                f"dataset {self.name} has no column {self.column!r} but {', '.join(columns)}; name it with --json-key"
            )
        object.__setattr__(self, "_rows", rows.select_columns([self.column]))
        object.__setattr__(self, "size", 0 if self.streaming else len(rows))
        object.__setattr__(self, "names", [f"{self.name}:{self.split}"])
        # Of a stream the contents aren't known beforehand.
        object.__setattr__(self, "identity", [self.name, None if self.streaming else rows._fingerprint])

    def chunks(self, share: Share = Share(), start: Place = Place(0, 0)) -> Iterator[TextChunk]:  # noqa: B008
        """Rows in chunks of about a MiB."""
        return select_chunks(self._chunks(), self.size, share, start)

    def _chunks(self) -> Iterator[TextChunk]:
        name = f"dataset {self.name}, split {self.split}"
        numbers, values, size, row = count(), list[Any](), 0, 0
        for batch in self._rows.iter(batch_size=_ROWS_READ):
            texts = batch[self.column]
            values += texts
            size += sum(len(text) for text in texts if isinstance(text, str))
            row += len(texts)
            if size >= CHUNK_BYTES:
                yield TextChunk(Place(0, next(numbers)), name, row - len(values) + 1, "rows", values, size, row)
                values, size = [], 0
        if values:
            yield TextChunk(Place(0, next(numbers)), name, row - len(values) + 1, "rows", values, size, row)


def _load(name: str, config: str | None, split: str, revision: str | None, *, streaming: bool) -> Any:
    import datasets

    try:
        if (Path(name) / "state.json").exists():
            rows = datasets.load_from_disk(name)
        elif (Path(name) / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(name)[split]
        else:
            return datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
        return rows.to_iterable_dataset() if streaming else rows
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
