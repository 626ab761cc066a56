"""Columns of `.parquet` files. pyarrow comes with `datasets` and is imported when such a file is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megamor.errors import DataError

_ROWS_READ = 64


def parquet_batches(path: str, column: str, size: int) -> Iterator[tuple[int, list[Any], int, float]]:
    """Values of a column in batches of about `size` bytes.

    Each with the number of its first row (from 1), its size, and how much of the file has been read by its end (0 to
    1). Raises DataError if the file is damaged or has no such column.
    """
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as table:
            if column not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names[:8])
                raise DataError(f"{path} has no column {column!r} but {columns}; name it with --json-key")
            rows, first, row, values, collected = max(table.metadata.num_rows, 1), 1, 0, list[Any](), 0
            for batch in table.iter_batches(batch_size=_ROWS_READ, columns=[column]):
                texts = batch.column(0)
                values += texts.to_pylist()
                collected += texts.get_total_buffer_size()
                row += len(texts)
                if collected >= size:
                    yield first, values, collected, row / rows
                    first, values, collected = row + 1, [], 0
            if values:
                yield first, values, collected, 1.0
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{path} can't be read to its end: {error}; fetch the file again") from error
