"""What a report is made of: plain blocks that one page renders as HTML and as markdown.

A kind of record has its view in `report/<kind>_view.py`: `view(record) -> View`, from the record alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Heading:
    """Starts a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells are plain text; the first column is the row's name. `caption` stands above, `note` below."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture: `name` is its file stem, `png` its bytes, `alt` what it shows for who can't see it."""

    name: str
    png: bytes
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Items:
    """Things to read one by one (questions, answers), folded away: each a mapping label -> text."""

    title: str
    items: Sequence[Mapping[str, str]]


Block = Heading | Paragraph | Table | Figure | Items


@dataclass(frozen=True)
class View:
    """A report: its title, what it found in a few sentences, then the blocks."""

    title: str
    verdict: Sequence[str]
    blocks: Sequence[Block] = field(default_factory=tuple)
