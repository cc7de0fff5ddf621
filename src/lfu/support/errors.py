"""What a user can put right, told in one line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A user's mistake. The command line prints it as one line on stderr and exits with code 2, without a traceback.

    The message says what is wrong, where, and what to do.
    """


@contextmanager
def value_errors_are_the_users() -> Iterator[None]:
    """Turns a `ValueError` raised inside into a `UserError`, for calls that check what the user gave.

    Raises:
        UserError: with the ValueError's message on one line.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(one_line(error)) from error


def one_line(error: object, limit: int = 10**6) -> str:
    """The text of an error (or of anything), white space and line breaks made single spaces, cut at `limit` signs."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean ...?` with up to three names close to `word`, or an empty text where none is close."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def leading() -> bool:
    """Whether this is the process that speaks to the user on its machine: the launcher's first, or the only one."""
    return os.environ.get("LOCAL_RANK", "0") in ("0", "-1")
