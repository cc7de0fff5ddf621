"""The folder a verb writes to: checked before anything is loaded, and left as it was if the verb fails early."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lfu.support.errors import UserError


def check_writable(path: Path, argument: str = "--output_dir") -> None:
    """Raises UserError if a folder `path` can't be made or written to. Leaves nothing behind."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        what = "is a file" if existing == path else f"lies under {existing}, which is a file"
        raise UserError(f"output folder {path} {what}: choose another {argument}")
    try:
        # Tried, not asked: permissions alone don't tell on read-only or special file systems.
        with tempfile.TemporaryDirectory(dir=existing, prefix=".lfu-"):
            pass
    except OSError as error:
        raise UserError(
            f"output folder {path} can't be written ({error.strerror}): choose another {argument}"
        ) from error


def write_and_show(record: Mapping[str, Any], folder: Path, *, tables: int | None = None) -> None:
    """Writes the report of a record; prints its first `tables` (None: all), what was found, and where it lies."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Drawn

    from lfu.report.blocks import Table
    from lfu.report.page import write_report

    try:
        view = write_report(record, folder)
    except OSError as error:
        raise UserError(f"output folder {folder} can't be written: {error}") from error
    console = Console()
    for block in [each for each in view.blocks if isinstance(each, Table) and each.rows][:tables]:
        drawn = Drawn(title=escape(block.caption) or None, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
        for place, column in enumerate(block.columns):
            drawn.add_column(escape(column), justify="right" if place else "left", overflow="fold")
        for row in block.rows:
            drawn.add_row(*map(escape, row))
        if console.measure(drawn, options=console.options.update(width=999)).minimum > console.width:
            drawn.padding, drawn.pad_edge = 0, False
        console.print(drawn, "")
    for sentence in view.verdict:
        console.print(sentence, markup=False, highlight=False, soft_wrap=not console.is_terminal)
    print(f"page     {folder / 'index.html'}\ntext     {folder / 'report.md'}\nnumbers  {folder / 'record.json'}")


@contextmanager
def no_empty_leftovers(path: Path, *, always: bool = False) -> Iterator[None]:
    """If the block fails, or `always`, removes `path` and its parents again where they are new and empty."""
    new = [folder for folder in (path.absolute(), *path.absolute().parents) if not folder.exists()]
    done = False
    try:
        yield
        done = not always
    finally:
        for folder in () if done else new:
            try:
                folder.rmdir()
            except OSError:  # not made, or no longer empty: something worth keeping was written
                break
