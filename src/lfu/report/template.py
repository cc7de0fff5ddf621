"""Reports as templates: `<kind>.md.j2` beside this file says what a report says, in which order.

A template is paragraphs of text. `# ` starts the title and `## ` a heading; the paragraphs above the first heading are
the verdict. `{{ table(...) }}`, `{{ figure(...) }}` and `{{ items(...) }}` place what a page can't say in words, and
leave no trace where there is nothing to show. A value that is filled in stays plain text, whatever it holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from lfu.report.blocks import Block, Figure, Heading, Items, Paragraph, Table, View
from lfu.report.text import and_, estimate, number, p_value, sign

FILTERS = {"and_": and_, "estimate": estimate, "number": number, "p_value": p_value, "sign": sign}
MARK = "\ue000"  # of a block's number; in front of a value, it says that no markup begins there


class Place(str):
    """Where a block goes: the only value that is filled in as it is."""


@cache
def templates(**options: Any) -> jinja2.Environment:
    """The templates of this folder; a name that a template misspells is an error."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options
    )


def view_of_template(kind: str, record: Mapping[str, Any], **more: Any) -> View:
    """The report of a record, by the template of its kind.

    Args:
        more: names for the template beside the record's `results` and `settings`.
    """
    made: list[Block] = []

    def show(block: Block) -> str:
        made.append(block)
        return Place(f"\n\n{MARK}{len(made) - 1}{MARK}\n\n")

    def table(rows: Sequence[Sequence[str]], caption: str = "", note: str = "") -> str:
        """The first row names the columns."""
        return show(Table(rows[0], rows[1:], caption, " ".join(note.split()))) if len(rows) > 1 else ""

    def figure(picture: Figure | None, caption: str = "") -> str:
        return show(replace(picture, caption=" ".join(caption.split()) or picture.caption)) if picture else ""

    def items(title: str, found: Sequence[Mapping[str, str]], empty: bool = False) -> str:
        return show(Items(title, found)) if found or empty else ""

    environment = templates(finalize=_plain)
    environment.filters |= FILTERS
    names = {"table": table, "figure": figure, "items": items, "results": record["results"],
             "settings": record["settings"]}  # fmt: skip
    text = environment.get_template(f"{kind}.md.j2").render(names | more)
    return _read(text, made)


def _plain(value: Any) -> Any:
    """A filled-in value in one line, but for a block's place."""
    if not isinstance(value, str) or isinstance(value, Place):
        return value
    text = " ".join(value.replace(MARK, "").split())
    return MARK + text if text.startswith("#") else text


def _read(text: str, made: Sequence[Block]) -> View:
    title, verdict, blocks = "", [], list[Block]()
    for part in filter(None, (" ".join(part.split()) for part in text.split("\n\n"))):
        start, _, rest = part.partition(" ")
        number, said = part.strip(MARK), part.replace(MARK, "")
        if part == f"{MARK}{number}{MARK}":
            blocks.append(made[int(number)])
        elif start == "#":
            title = rest.replace(MARK, "")
        elif start == "##":
            blocks.append(Heading(rest.replace(MARK, "")))
        elif blocks:
            blocks.append(Paragraph(said))
        else:
            verdict.append(said)
    return View(title, verdict, blocks)
