"""Rows as a data set in which every value is what it was in the file.

Arrow gives a column one type: it fills the keys that an object lacks with null, makes 4 a 4.0 beside 3.5, and refuses
a number beside a text. `datasets` has the type `Json` for mixed columns, and encodes it with ujson: a text that looks
like a number becomes one, floats keep ten digits, and integers beyond 64 bits are refused. So columns of anything but
texts are kept as JSON here, which Python's own module writes, and are decoded when a row is read.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets.features.features import register_feature

from lfu.support.errors import UserError


@dataclass
class Exact:
    """A column type whose values are any JSON: none is altered, and none is refused."""

    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "string"
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="LfuExact", init=False, repr=False)

    def __call__(self) -> Any:
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        return None if value is None else json.dumps(value, default=as_text)

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        return None if value is None else json.loads(value)


def as_text(value: Any) -> str:
    """A value that JSON does not have, such as a date; bytes are UTF-8, as in parquet files that name no type of text.

    Bytes that are not UTF-8 become halves of surrogate pairs, which are refused where the text is used.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


with warnings.catch_warnings():  # datasets calls this experimental
    warnings.simplefilter("ignore", UserWarning)
    register_feature(Exact, "LfuExact")


def as_dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """The rows as a data set in memory. A column that a row lacks is None there, wherever it first appears.

    Values that JSON does not have, such as dates, become texts. Raises UserError: a name that Arrow can't have.
    """
    names = {key: None for row in rows for key in row}
    if odd := [name for name in names if "\0" in name]:
        raise UserError(f"a column is called {odd[0]!r}: a name with a NUL in it can't be read, rename it")
    columns = {name: [row.get(name) for row in rows] for name in names}
    typed = {name: _typed(values) for name, values in columns.items()}
    features = Features({name: feature for name, (_, feature) in typed.items()})
    return Dataset.from_dict({name: array for name, (array, _) in typed.items()}, features=features)


def _typed(values: list[Any]) -> tuple[Any, Any]:
    if all(value is None or isinstance(value, str) for value in values):
        try:
            return pa.array(values, pa.string()), Value("string")
        except UnicodeEncodeError:  # half a surrogate pair, which UTF-8 does not have and JSON does
            pass
    exact = Exact()
    return pa.array([exact.encode_example(value) for value in values], pa.string()), exact


def is_exact(dataset: Dataset, column: str) -> bool:
    """Whether the column holds what its source held, and not what Arrow made of it."""
    return isinstance(dataset.features[column], Exact)


def rows_of(dataset: Dataset) -> list[dict[str, Any]]:
    """The rows, with what was written in place of what Arrow made of it: see `untyped`."""
    types = {field.name: field.type for field in dataset.features.arrow_schema if not is_exact(dataset, field.name)}
    return [row | {name: untyped(row[name], kind) for name, kind in types.items()} for row in dataset]


def untyped(value: Any, arrow_type: Any) -> Any:
    """The value of a column with a type, as it was written: without what Arrow filled in, and 0.1 for a 32-bit 0.1."""
    value = without_nulls(value)
    return _as_short(value) if re.search(r"\bfloat\b", str(arrow_type)) else value


def without_nulls(value: Any) -> Any:
    """The value without the keys, at any depth, whose value is None: what Arrow filled in."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _as_short(value: Any) -> Any:
    """32-bit numbers, at any depth, as the doubles that are spelled like them."""
    if isinstance(value, Mapping):
        return {key: _as_short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [*map(_as_short, value)]
    return float(str(np.float32(value))) if isinstance(value, float) and np.float32(value) == value else value
