"""Reads the rows of a file or a hub data set, one after the other, as JSON texts.

Files of JSON lines have rows with other keys than their neighbors, whole numbers next to fractions, objects
of different shapes. A table with a type for each column cannot hold them; the JSON text of a row can. Parquet
and hub rows become JSON too, so that everything behind this module sees one kind of row. Values that JSON
does not have become texts: dates in ISO format, bytes in base64.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from areal_like.data.sources import PARQUET, HubSource
from areal_like.errors import ConfigError

Text = tuple[bytes, int]
"""A row as JSON in UTF-8, and its number in the file: the line of JSON lines, else the row; from 1."""
_BATCH_ROWS = 64
MAX_ROW_BYTES = 16 << 20
"""Largest JSON text of one row, in bytes: far more than fits into any context."""
_BATCH_BYTES = 512 << 20
"""Maximum memory of a batch of a parquet file, which may store a repeated large value only once."""
_READ_BYTES = 1 << 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def texts_of_file(path: Path, *, key: str) -> Iterator[Text]:
    """The rows of a file. Raises ConfigError with file and line for one that is not a JSON object."""
    return _parquet(path, key=key) if path.suffix.lower() in PARQUET else _json_lines(path, key=key)


def _json_lines(path: Path, *, key: str) -> Iterator[Text]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(_BYTE_ORDER_MARK).strip() if number == 1 else line.strip()
            if len(text) > MAX_ROW_BYTES:
                raise _too_long(f"{key}: {path.name}:{number}", len(text))
            if text:
                _check(text, place=f"{key}: {path.name}:{number}", is_first=number == 1)
                yield text, number


def _check(text: bytes, *, place: str, is_first: bool) -> None:
    try:
        row = json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        hint = ""
        if is_first and text[:1] in (b"[", b"{"):
            hint = "; each line must be one row: `jq -c '.[]' FILE` writes a JSON list as lines"
        raise ConfigError(f"{place}: not JSON ({error.msg} at column {error.colno}){hint}") from error
    except RecursionError as error:
        raise ConfigError(f"{place}: the JSON is nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{place}: {error}") from error
    if _SURROGATE.search(text):
        _check_surrogates(row, place=place)
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: want an object such as {{'prompt': ...}}, got {type(row).__name__}")


def _check_surrogates(row: Any, *, place: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ConfigError(f"{place}: {half!r} is half of a surrogate pair, not a character") from error


def _parquet(path: Path, *, key: str) -> Iterator[Text]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            # No value is larger than a column of its group, so this bounds what a batch can take.
            num_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, _largest_column(file.metadata))))
            yield from _rows_of(file.iter_batches(batch_size=num_rows), label=f"{key}: {path.name}")
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{key}: {path} is not a readable parquet file: {error}") from error


def _largest_column(metadata: Any) -> int:
    """Uncompressed bytes of the largest column of a row group."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return max(
        (
            group.column(index).total_uncompressed_size
            for group in groups
            for index in range(group.num_columns)
        ),
        default=0,
    )


def _too_long(place: str, num_bytes: int) -> ConfigError:
    return ConfigError(f"{place}: the row has {num_bytes} bytes as JSON: at most {MAX_ROW_BYTES} are read")


def load_hub(source: HubSource, *, key: str) -> Any:
    """The `datasets.Dataset` of a hub source. Raises ConfigError if it cannot be loaded."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{key}={source.label} needs an extra: pip install 'areal-like[data]'") from error
    try:
        return datasets.load_dataset(
            source.name, source.config or None, split=source.split, revision=source.revision or None
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"{key}={source.label}: the data set could not be loaded ({error}). Without a network, download "
            "it elsewhere (`huggingface-cli download --repo-type dataset`) and name its files"
        ) from error


def texts_of_hub(dataset: Any, *, label: str) -> Iterator[Text]:
    """The rows of a `datasets.Dataset`. `label`: its name, for errors."""
    tables = dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS)
    return _rows_of(tables, label=label)


def _rows_of(batches: Any, *, label: str) -> Iterator[Text]:
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist(maps_as_pydicts="lossy")
        except UnicodeError:  # one by one, to name the row
            rows = (batch.slice(at, 1) for at in range(batch.num_rows))
        for row in rows:
            number += 1
            try:
                row = row if isinstance(row, dict) else row.to_pylist(maps_as_pydicts="lossy")[0]
                text = json.dumps(row, ensure_ascii=False, default=_as_json).encode()
            except (UnicodeError, TypeError, RecursionError) as error:
                raise ConfigError(f"{label}:{number}: the row cannot be read ({error})") from error
            if len(text) > MAX_ROW_BYTES:
                raise _too_long(f"{label}:{number}", len(text))
            yield text, number


def _as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__} has no JSON")
