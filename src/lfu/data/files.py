"""Rows of one file: JSON, JSON lines, CSV or parquet. Needs neither `datasets` nor pyarrow, but for parquet."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lfu.data.exact_json import RepeatedKey, as_written, read_json, twice
from lfu.support.errors import UserError, one_line
from lfu.support.files import not_utf8

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def file_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, by its suffix. Raises UserError: it can't be read, with the line or row."""
    readers = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"data {path}: can't read {path.suffix or 'a file without suffix'}; use {', '.join(SUFFIXES)}")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise UserError(f"data {path}: {not_utf8(path)}") from error
    except OSError as error:
        raise UserError(f"data {path}: can't be read ({error.strerror or one_line(error)})") from error


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:  # -sig: a byte order mark is skipped
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = _parsed(line, f"{path}, line {number}", ": mend or remove the line")
                if not isinstance(row, dict):
                    what = f'a row must be an object {{"column": value}}, this is a {type(row).__name__}'
                    raise UserError(f"data {path}, line {number}: {what}")
                yield as_written(row)


class _NotJson(UserError):
    """A text that is no JSON."""


def _parsed(text: str, where: str, hint: str = "") -> Any:
    try:
        return read_json(text)
    except RepeatedKey as error:
        raise UserError(f"data {where}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise _NotJson(f"data {where}: not valid JSON ({one_line(error)}){hint}") from error


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = _parsed(text, str(path))
    except _NotJson:
        if not text.lstrip().startswith("{"):
            raise
        yield from _jsonl_rows(path)  # one object a line under the name .json is common
        return
    if isinstance(content, dict):
        # {"data": [rows]} is common; else a file that is one object is a file of one row.
        (only, *others), turns = content.items() or [("", None)], ("messages", "conversations")
        rows = only[1] if not others and only[0] not in turns else None
        content = rows if isinstance(rows, list) and rows and isinstance(rows[0], dict) else [content]
    if not isinstance(content, list):
        raise UserError(f"data {path}: must hold a list of rows, this is a {type(content).__name__}")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise UserError(f"data {path}, row {number}: must be an object, this is a {type(row).__name__}")
        yield as_written(row)


_BEYOND = "\0beyond the header"  # where csv puts fields that the header does not name


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # long answers: the default is 128 KiB a field
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey=_BEYOND, strict=True)
        try:
            header = list(reader.fieldnames or [])
            if repeated := twice([name for name in header if name]):
                raise UserError(f"data {path}: the header names column {repeated!r} twice: rename or remove one")
            for row in reader:
                if _BEYOND in row or None in row.values():
                    raise UserError(
                        f"data {path}, line {reader.line_num}: the row does not have the header's {len(header)} "
                        "fields: put texts with commas or line breaks in double quotes"
                    )
                if row.pop("", "") and header.index("") + header.count("") > 1:  # pandas' row numbers come first
                    raise UserError(
                        f"data {path}, line {reader.line_num}: a column without a name holds text: name or remove it"
                    )
                yield row
        except csv.Error as error:
            raise UserError(f"data {path}, line {reader.line_num}: not valid CSV ({one_line(error)})") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    from lfu.data.columns import untyped

    try:
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
        if repeated := twice(schema.names):
            raise UserError(f"data {path}: there are two columns {repeated!r}: rename or remove one")
        for batch in file.iter_batches():
            table = pyarrow.Table.from_batches([batch])
            # the file may say, in the words of `datasets`, that a column of texts is JSON
            own = b"huggingface" in (schema.metadata or {})
            for row in Dataset(table) if own else table.to_pylist(maps_as_pydicts="strict"):
                yield {column: untyped(value, schema.field(column).type) for column, value in row.items()}
    except pyarrow.ArrowException as error:
        raise UserError(f"data {path}: not a readable parquet file ({one_line(error)})") from error
