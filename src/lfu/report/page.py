"""A record's report in a folder: record.json, one self-contained index.html, and report.md with its pictures."""

import base64
import importlib
import json
import re
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfu.report.blocks import Figure, Heading, Table, View
from lfu.report.markdown import definitions, markdown, showable, written
from lfu.report.template import templates
from lfu.support.errors import UserError
from lfu.support.files import dump_json, write_bytes, write_text

KIND = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
STEM = re.compile(r"\w[\w-]*")
PNG = b"\x89PNG\r\n\x1a\n"
# What `lfu.evaluation.record.make_record` writes, and the page shows.
EXPECTED = {"kind": str, "created": str, "command": str, "machine": str, "versions": Mapping, "seed": int,
            "models": Mapping, "settings": Mapping, "results": Mapping}  # fmt: skip
MODEL_COLUMNS = ("name", "class", "parameters", "dtype", "weights")

# A number and what may follow it (an interval, a unit), or a sign that there is none. Hashes and dates are no numbers.
_NUMBER = re.compile(r"[-+−±<>≤≥≈~]?\s*\d[\d.,]*(?![\w-])|[-–—]?$|n/a$")
_DENSITY = 0.65  # pictures are drawn at some 160 dots an inch; a page counts 96


def write_report(record: Mapping[str, Any], out: Path) -> View:
    """Writes the report of a record (see `make_record`) into the folder `out`: each file whole or not at all.

    The view comes from `lfu.report.<kind>_view`: `view(record) -> View`. Everything is made before anything is written.
    Returns the view, for who prints of it.

    Raises:
        UserError: not a record, or of a kind that has no view.
        OSError: the folder can't be made or written.
    """
    check_record(record)
    view = view_of(record)
    texts = {"record.json": _json(record), "index.html": html(record, view), "report.md": report_md(record, view)}
    for figure in _figures(view):
        write_bytes(out / f"{figure.name}.png", figure.png)
    for name, text in texts.items():
        write_text(out / name, text)
    return view


def check_record(record: Any) -> None:
    """Raises UserError unless `record` has everything that a page shows."""
    if not isinstance(record, Mapping):
        raise UserError(f"not a record: an object was expected, this is a {type(record).__name__}")
    for name, kind in EXPECTED.items():
        if not isinstance(record.get(name), kind):
            what = f"{name!r} is a {type(record[name]).__name__}" if name in record else f"it has no {name!r}"
            raise UserError(f"not a record of lfu evaluate or lfu probe: {what}: give the record.json that they write")


def view_of(record: Mapping[str, Any]) -> View:
    """What the record's own kind makes of it. Raises UserError: no kind of that name."""
    kind = record["kind"]
    module = f"lfu.report.{kind.replace('-', '_')}_view"
    try:
        if not KIND.fullmatch(kind):  # the record may come from anywhere: no other module is imported for it
            raise ModuleNotFoundError(name=module)
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise UserError(f"record of kind {kind!r}: this version of lfu knows no such kind") from error
    return found.view(record)


def html(record: Mapping[str, Any], view: View) -> str:
    """The page: one file that loads nothing. Every text is escaped."""
    page = templates(autoescape=True).get_template("page.html.j2")
    blocks = [(type(each).__name__, each) for each in view.blocks]
    return showable(page.render(
        view=view, blocks=blocks, record=record, provenance=provenance(record), models=models_table(record),
        settings=settings_pairs(record), numeric=numeric_columns,
        uri=lambda figure: "data:image/png;base64," + base64.b64encode(figure.png).decode(),
        width=lambda figure: round(_DENSITY * png_width(figure.png)),
    ))  # fmt: skip


def report_md(record: Mapping[str, Any], view: View) -> str:
    """The same in markdown; the figures are files beside it."""
    made = [written(Heading("How this was made")), written(models_table(record)), definitions(provenance(record))]
    return markdown(view, *made, written(Heading("Settings")), definitions(settings_pairs(record)))


def provenance(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of what one needs to measure it again."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [*((name, str(record[name])) for name in ("command", "created", "machine", "seed")), ("versions", versions)]


def models_table(record: Mapping[str, Any]) -> Table:
    """Every model's name, class, parameters, dtype and weights hash."""
    rows = []
    for label, model in record["models"].items():
        cells = [model.get(key, "") for key in MODEL_COLUMNS]
        rows.append([label, *(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells)])
    return Table(["", *MODEL_COLUMNS], rows, note="weights: the first 16 digits of the weights' SHA-256.")


def settings_pairs(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of everything that decided what was measured."""
    return [
        (str(name), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in record["settings"].items()
    ]


def numeric_columns(table: Table) -> list[bool]:
    """Which columns hold (short texts that begin with) numbers, and are set flush right; never the first column."""
    return [
        bool(place) and all(len(row[place]) < 40 and _NUMBER.match(row[place].strip()) for row in table.rows)
        for place in range(len(table.columns))
    ]


def png_width(png: bytes) -> int:
    """Width in pixels. Raises ValueError: not a PNG."""
    if not png.startswith(PNG) or len(png) < 24:
        raise ValueError("a figure's bytes are not a PNG picture")
    return struct.unpack(">I", png[16:20])[0]


def _figures(view: View) -> list[Figure]:
    figures = [each for each in view.blocks if isinstance(each, Figure)]
    counts = Counter(figure.name for figure in figures)
    for name, count in counts.items():
        if count > 1 or not STEM.fullmatch(name):
            raise ValueError(f"figure name {name!r} is {'there twice' if count > 1 else 'no file stem'}")
    return figures


def _json(record: Mapping[str, Any]) -> str:
    """JSON without loss: half a surrogate pair, which UTF-8 can't hold, as its escape."""
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", dump_json(record))
