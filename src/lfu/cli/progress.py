"""Progress on stderr: a bar on a terminal, else one line per phase."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Advance = Callable[[int], None]  # called with the number of items just finished


def bar() -> Any:
    """A rich progress bar on stderr if that is a terminal; it disappears when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def phase(title: str, total: int) -> Iterator[Advance]:
    """Shows how far `title` is; call what it yields with the number of items just finished, of `total`."""
    from rich.markup import escape

    drawn = bar()
    if drawn.disable:
        print(f"lfu probe: {title} ({total} items)", file=sys.stderr)
    with drawn:
        task = drawn.add_task(escape(title), total=total)
        yield lambda count: drawn.advance(task, count)
