"""Hugging Face datasets as raw text. The only module that imports `datasets`, when one is opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megamor.corpus.text import FIRST, WHOLE, ChunkId, InputRange, TextChunk, column_of, group_rows, select_chunks
from megamor.errors import DataError

_ROWS_READ = 64


class DatasetInput:
    """A Hugging Face dataset, by name on the hub or as a local path (files, or what `save_to_disk` wrote).

    `column` holds the text. `size` counts rows; it is 0, unknown, if the dataset is streamed. Raises DataError if the
    dataset can't be loaded or has no such split or column.
    """

    unit = "rows"

    def __init__(
        self, name: str, config: str | None, split: str, column: str, revision: str | None, *, streaming: bool = False
    ) -> None:
        rows = _load(name, config, split, revision, streaming=streaming)
        columns = rows.column_names or list(next(iter(rows), {}))
        column = column_of(column, columns, f"dataset {name}")
        self.name, self._split, self._column = name, split, column
        self._rows = rows.select_columns([column])
        self.names: Sequence[str] = [f"{name}:{split}"]
        self.size = 0 if streaming else len(rows)
        # `datasets` changes the fingerprint with the data and with every transform.
        # The contents of a stream aren't known beforehand.
        self.identity: Sequence[Any] = [name, None if streaming else rows._fingerprint]

    def chunks(self, within: InputRange = WHOLE, start: ChunkId = FIRST) -> Iterator[TextChunk]:
        """Rows in chunks of about a MiB. See `TextInput`."""
        return select_chunks(self._all_chunks(), self.size, within, start)

    def _all_chunks(self) -> Iterator[TextChunk]:
        name = f"dataset {self.name}, split {self._split}"
        columns = (batch[self._column] for batch in self._rows.iter(batch_size=_ROWS_READ))
        batches = ((texts, sum(len(str(text)) for text in texts)) for texts in columns)
        for number, (first, values, size, row) in enumerate(group_rows(batches)):
            yield TextChunk(ChunkId(0, number), name, first, "rows", values, size, row)


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
        raise DataError(f"dataset {name} has no split {error}; name the right one with --hf-split") from error
    except RuntimeError as error:  # raised for repositories that load through a script of their own
        raise DataError(
            f"dataset {name} can't be loaded: {error}; try the hub's own conversion with "
            "--hf-revision refs/convert/parquet"
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"dataset {name} (config {config}, split {split}) can't be loaded: {error}; check the name, "
            "--hf-config, --hf-split and the network"
        ) from error
