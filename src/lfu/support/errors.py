"""What a user can put right, told in one line."""

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A user's mistake: what is wrong, where, and what to do. The command line prints it and exits with code 2."""


@contextmanager
def value_errors_are_the_users(about: str = "") -> Iterator[None]:
    """Turns a `ValueError` raised inside into a `UserError` of one line, for calls that check what the user gave.

    `about` is put in front of the message, also of a UserError's.
    """
    try:
        yield
    except (ValueError, UserError) as error:
        raise UserError(f"{about}: {one_line(error)}" if about else one_line(error)) from error


def one_line(error: object, limit: int = 10**6) -> str:
    """The text of an error (or of anything), white space and line breaks made single spaces, cut at `limit` signs."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean ...?` with up to three names close to `word`, or an empty text where none is close."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def leading() -> bool:
    """Whether this process talks to the user: the only one, or the launcher's first on this machine."""
    return os.environ.get("LOCAL_RANK", "0") in ("0", "-1")
