"""Numbers, lists and lines as people read them."""

import sys
from collections.abc import Sequence
from shutil import get_terminal_size
from textwrap import TextWrapper


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `25 min`, `2 h 5 min`, `30 h`: two figures are enough."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h" if hours >= 10 else f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min" if minutes >= 10 else f"{minutes} min {rest} s"
    return f"{rest} s"


def counted(number: int, what: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def filled(text: str, first: str = "", rest: str = "") -> str:
    """Wraps the paragraphs of a text to the terminal's width, at spaces but not at no-break ones.

    `first` stands before each paragraph, `rest` before each other line.
    """
    whole = TextWrapper(
        get_terminal_size().columns, initial_indent=first, subsequent_indent=rest, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return "\n\n".join(map(whole.fill, text.split("\n\n"))).replace("\xa0", " ")


def tell(line: str) -> None:
    """Prints a line on standard error; broken to its width if that is a terminal."""
    print(filled(line, rest="  ") if sys.stderr.isatty() else line.replace("\xa0", " "), file=sys.stderr)


def and_(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return "".join(names) if len(names) < 2 else f"{', '.join(names[:-1])} and {names[-1]}"


def listed(text: str) -> list[str]:
    """The words of `one, two,three`."""
    return [word.strip() for word in text.split(",") if word.strip()]
