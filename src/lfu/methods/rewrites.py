"""Rewritten answers on disk: one JSON line each, added as they come, so that a killed run loses at most one batch."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple


class Rewrite(NamedTuple):
    """What the model wrote, and whether it ended by itself."""

    text: str
    ended: bool


class Rewrites:
    """The rewrites of one model: key -> `Rewrite`, read when made."""

    def __init__(self, path: Path):
        self.path, self.found = path, dict(_read(path))

    def add(self, new: Mapping[str, Rewrite]) -> None:
        """Appends and flushes."""
        self.found |= new
        lines = [json.dumps({"key": k, "ended": r.ended, "text": r.text}) + "\n" for k, r in new.items()]
        # a line that a kill cut off has no end: the next one must not be glued to it
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("a", encoding="ascii") as file:
            file.write("".join(["" if whole else "\n", *lines]))


def _read(path: Path) -> Iterator[tuple[str, Rewrite]]:
    """The whole lines of the file; anything else, such as a line that a kill cut off, is passed over."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            yield str(entry["key"]), Rewrite(str(entry["text"]), bool(entry["ended"]))
        except (ValueError, TypeError, KeyError):
            continue
