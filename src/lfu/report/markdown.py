"""A report's blocks as markdown (CommonMark with tables): every text stays the text it was."""

import html
import re
from collections.abc import Sequence

from lfu.report.blocks import Block, Figure, Heading, Items, Paragraph, Table, View

# What CommonMark, tables and GitHub's maths read as markup anywhere in a line; an underscore between letters is none,
# and a bracket makes a link only by what follows it.
_SPECIAL = re.compile(r"[\\`*<>|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=[#\w])|\](?=[\[(:])")
_IN_BRACKETS = re.compile(_SPECIAL.pattern + r"|[\[\]]")
# ... and what only the beginning of a line makes markup: headings, lists, rules, numbered lists.
_LINE_START = re.compile(r"^(?:[#+=-]|\d+(?=[.)]))")

# Not characters that a page can show: half a surrogate pair, control characters.
_UNSHOWABLE = re.compile("[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def showable(text: str) -> str:
    """The text with a replacement character for what no page can show."""
    return _UNSHOWABLE.sub("\ufffd", text)


def markdown(view: View, *more: str) -> str:
    """The whole view, its figures as links to `<name>.png`, and then `more`, which is markdown already."""
    parts = [f"# {escaped(view.title)}", *map(escaped, view.verdict), *map(written, view.blocks), *more]
    return showable("\n\n".join(part for part in parts if part) + "\n")


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of `name: value` lines."""
    return "\n".join("- " + escaped(f"{name}: {value}") for name, value in pairs)


def escaped(text: str) -> str:
    """`text` as one line of markdown that shows as that text; white space, line breaks too, becomes single spaces."""
    line = _inline(text)
    return _LINE_START.sub(lambda found: found[0] + "\\" if found[0].isdigit() else "\\" + found[0], line)


def _inline(text: str, special: re.Pattern[str] = _SPECIAL) -> str:
    return special.sub(lambda found: "\\" + found[0], " ".join(text.split()))


def written(block: Block) -> str:
    """One block."""
    if isinstance(block, Heading):
        return f"## {escaped(block.text)}"
    if isinstance(block, Paragraph):
        return escaped(block.text)
    if isinstance(block, Table):
        return "\n\n".join(filter(None, [escaped(block.caption), _table(block), escaped(block.note)]))
    if isinstance(block, Figure):
        picture = f"![{_inline(block.alt, _IN_BRACKETS)}]({block.name}.png)"
        return "\n\n".join(filter(None, [picture, escaped(block.caption)]))
    return _items(block)


def _table(table: Table) -> str:
    """Cells keep their line breaks, and can't start a block, so that only inline markup matters."""
    cell = lambda text: "<br>".join(map(_inline, text.splitlines()))
    head, *rows = ([cell(text) for text in row] for row in (table.columns, *table.rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _items(block: Items) -> str:
    """Folded on pages that know <details>; each text in a fence, where nothing is markup."""
    title = html.escape(" ".join(block.title.split()))
    parts = [f"<details><summary>{title} ({len(block.items)})</summary>"]
    for number, item in enumerate(block.items, start=1):
        parts.append(f"**{number}.**")
        for label, text in item.items():
            parts += [escaped(label), _fenced(text)]
    return "\n\n".join([*parts, "</details>"])


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
