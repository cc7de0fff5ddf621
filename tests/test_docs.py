"""The documentation: nothing that it points to is missing."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from links import broken_in_markdown, broken_in_site, slug  # noqa: E402


def test_every_link_image_and_anchor_exists():
    assert broken_in_markdown(ROOT) == []


def test_every_test_behind_a_promise_exists():
    """docs/reliability.md: `file.py::test_name`, or `::test_name` of the file named before; `*` ends a family."""
    file, missing, found = "", [], 0
    for path, name in re.findall(
        r"`([\w/]+\.py)?(?:::(test_\w+\*?))?`", (ROOT / "docs" / "reliability.md").read_text()
    ):
        file = path or file
        if not name:
            continue
        source = (ROOT / "tests" / file).read_text()
        found += 1
        if f"def {name.removesuffix('*')}" not in source or (not name.endswith("*") and f"def {name}(" not in source):
            missing.append(f"{file}::{name}")
    assert not missing
    assert found > 50


def test_everything_that_the_api_page_names_can_be_imported():
    """`::: lfu.module.name`, and the members that it lists; `make docs` fails for any that is gone."""
    missing = []
    for name, options in re.findall(r"^::: (\S+)\n((?: +.*\n)*)", (ROOT / "docs" / "api.md").read_text() + "\n", re.M):
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute, None)
        listed = re.search(r"members: \[(.*)\]", options)
        members = listed[1].split(", ") if listed else []
        missing += [name] if found is None else [f"{name}.{one}" for one in members if not hasattr(found, one)]
    assert not missing


@pytest.mark.parametrize(
    ("line", "dead"),
    [
        ("[a](other.md)", None),
        ("[a](other.md#two-words-2f--2b-exactly)", None),
        ("[a](other.md#twice-1)", None),
        ("[a](#here)", None),
        ("[a](https://example.org/nowhere.md#x)", None),
        ("```\n[a](gone.md)\n```", None),
        ("[a](gone.md)", "gone.md"),
        ("![a](gone.png)", "gone.png"),
        ("| x |\n| --- |\n| [a](other.md#gone) |", "other.md#gone"),
        ("[a](#gone)", "#gone"),
        ("[a](other.md#twice-2)", "other.md#twice-2"),
    ],
)
def test_a_dead_link_is_found(tmp_path, line, dead):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "other.md").write_text("# Two words: `2F` + 2B, *exactly*\n\n## Twice\n\n## Twice\n")
    (tmp_path / "docs" / "page.md").write_text(f"# Here\n\n{line}\n")
    assert broken_in_markdown(tmp_path) == ([f"docs/page.md: {dead}"] if dead else [])


def test_dead_links_of_built_pages(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text('<h1 id="a">x</h1><a href="sub/#b">y</a><a href="#a">z</a><img src="no.png">')
    (tmp_path / "sub" / "index.html").write_text(
        '<a href="../index.html#c">y</a><a id="b" href="https://e.org/#q"></a>'
    )
    assert broken_in_site(tmp_path) == ["index.html: no.png", "sub/index.html: ../index.html#c"]


def test_slug_is_the_code_hosts():
    assert slug("What it costs: 2F + 2B, exactly") == "what-it-costs-2f--2b-exactly"
