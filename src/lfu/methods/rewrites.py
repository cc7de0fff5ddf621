"""Rewritten answers on disk: one JSON line each, added as they come, so that a killed run loses at most one batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lfu.support.errors import UserError, one_line


@dataclass(frozen=True)
class Rewrite:
    """What the model wrote, and whether it ended by itself."""

    text: str
    ended: bool


def key_of(*what: Any) -> str:
    """A key for all that decides a rewrite: JSON-ready values."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


class Rewrites:
    """The rewrites of one model: key -> `Rewrite`, read when made. Made by `opened`."""

    def __init__(self, path: Path):
        self.path = path
        with _told_as_user_error(path.parent):
            self.found = dict(_read(path))

    def add(self, new: Mapping[str, Rewrite]) -> None:
        """Appends and flushes.

        Raises:
            UserError: the file can't be written.
        """
        self.found |= new
        lines = [json.dumps({"key": k, "ended": r.ended, "text": r.text}) + "\n" for k, r in new.items()]
        with _told_as_user_error(self.path.parent):
            # a line that a kill cut off has no end: the next one must not be glued to it
            whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
            with self.path.open("a", encoding="ascii") as file:
                file.write("".join(["" if whole else "\n", *lines]))
                file.flush()


def _read(path: Path) -> Iterator[tuple[str, Rewrite]]:
    """The whole lines of the file; anything else, such as a line that a kill cut off, is passed over."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            yield str(entry["key"]), Rewrite(str(entry["text"]), bool(entry["ended"]))
        except (ValueError, TypeError, KeyError):
            continue


@contextmanager
def opened(folder: Path, model: str, say: Callable[[str], None]) -> Iterator[Rewrites]:
    """The rewrites of the model with this hash, locked: a second process waits and then finds what the first made.

    Raises:
        UserError: the folder can't be used.
    """
    lock = FileLock(folder / f"{model}.lock")
    with _told_as_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"sdft: waiting for another process that rewrites with this model ({lock.lock_file})")
            lock.acquire()
    try:
        yield Rewrites(folder / f"{model}.jsonl")
    finally:
        lock.release()


@contextmanager
def _told_as_user_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"sdft can't keep its rewrites in {folder} ({one_line(error)}): "
            "name a folder that can be written to, --method_args sdft.cache=FOLDER"
        ) from error
