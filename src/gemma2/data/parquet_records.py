"""Records from the rows of Parquet files, read by the library pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gemma2.data.records import Record, RecordOrError
from gemma2.data.skipping import ExampleError
from gemma2.errors import MissingDependencyError

_ROWS_AT_A_TIME: Final = 1024


def read_parquet(file: Path) -> Iterator[RecordOrError]:
    """Reads all rows and columns, some rows at a time.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingDependencyError(
            f"{file}: reading Parquet needs the package pyarrow; install it with: pip install pyarrow"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            num_rows = table.metadata.num_rows
            for batch in table.iter_batches(batch_size=_ROWS_AT_A_TIME):
                for values in batch.to_pylist():
                    yield Record(
                        values=values, source=str(file), unit="row", number=number, share=(number + 1) / num_rows
                    )
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        yield ExampleError(
            "damaged file",
            f"{file}: cannot be read {f'after row {number - 1}' if number else 'at all'}: the file is truncated or "
            f"damaged ({' '.join(str(error).split())})",
        )
    except UnicodeDecodeError as error:
        # Arrow does not check strings when it reads them, only when they are turned into Python's.
        yield ExampleError("not UTF-8", f"{file}: cannot be read after row {number - 1}: a text is not UTF-8 ({error})")
    else:
        if not number:
            yield ExampleError("empty file", f"{file}: the file holds no example; remove it or fill it")
