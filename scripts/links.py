"""Dead links: in the Markdown files as the repository shows them, and in the built documentation site.

    python scripts/links.py          # README.md, CONTRIBUTING.md, CHANGELOG.md, docs/*.md
    python scripts/links.py site     # every page of the built site

A link is dead if its file is missing, or if its anchor is no heading (or id) of the page. Links to other hosts are not
followed. Exit code 1 if there is one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent


def slug(heading: str, separator: str = "-") -> str:
    """The anchor of a heading as code hosts make it: lower case, punctuation dropped, a dash for every space."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def pages(root: Path) -> list[Path]:
    """The Markdown files a reader sees."""
    top = [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [path for path in top if path.exists()] + sorted((root / "docs").glob("*.md"))


def broken_in_markdown(root: Path) -> list[str]:
    """A line for each dead relative link, image or anchor: `docs/guide.md: methods.md#gemm`."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable("table")
    tokens = {path.resolve(): parser.parse(path.read_text(encoding="utf-8")) for path in pages(root)}
    anchors = {path: set(_anchors(parsed)) for path, parsed in tokens.items()}
    dead = []
    for path, parsed in tokens.items():
        for target in _targets(parsed):
            place, anchor = _split(path, target)
            if place is None:
                continue
            known = anchors.get(place)
            if not place.exists() or (anchor and known is not None and anchor not in known):
                dead.append(f"{path.relative_to(root.resolve())}: {target}")
    return dead


def _split(path: Path, target: str) -> tuple[Path | None, str]:
    """The file that `target` on page `path` means, and its anchor; None for other hosts."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return None, ""
    return ((path.parent / unquote(parts.path)).resolve() if parts.path else path), unquote(parts.fragment)


def _targets(tokens: list) -> Iterator[str]:
    for token in tokens:
        for child in token.children or []:
            target = child.attrs.get("href") or child.attrs.get("src")
            if target:
                yield str(target)


def _anchors(tokens: list) -> Iterator[str]:
    """One anchor a heading; the second of a name gets -1, as code hosts do."""
    seen: dict[str, int] = {}
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children if child.type in ("text", "code_inline"))
            name = slug(text)
            yield f"{name}-{seen[name]}" if name in seen else name
            seen[name] = seen.get(name, 0) + 1


class _Page(HTMLParser):
    """The ids of a page, and where its links and images point."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.targets.add(value)


def broken_in_site(site: Path) -> list[str]:
    """A line for each dead link, image, script or anchor of the built pages."""
    found: dict[Path, _Page] = {}
    for path in sorted(site.resolve().rglob("*.html")):
        found[path] = _Page()
        found[path].feed(path.read_text(encoding="utf-8"))
    dead = []
    for path, page in found.items():
        if path.name == "404.html":  # shown at any depth: its links start at the root of a host that is not known
            continue
        for target in sorted(page.targets):
            place, anchor = _split(path, target)
            if place is None:
                continue
            place = place / "index.html" if place.is_dir() else place
            ids = found[place].ids if place in found else None
            if not place.exists() or (anchor and ids is not None and anchor not in ids):
                dead.append(f"{path.relative_to(site.resolve())}: {target}")
    return dead


def main() -> int:
    if len(sys.argv) > 1 and not list(Path(sys.argv[1]).rglob("*.html")):
        print(f"{sys.argv[1]}: no built pages there (make docs)", file=sys.stderr)
        return 2
    dead = broken_in_site(Path(sys.argv[1])) if len(sys.argv) > 1 else broken_in_markdown(ROOT)
    print("\n".join(f"dead link in {line}" for line in dead) or "no dead links")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
