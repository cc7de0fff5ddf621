"""Templates of reports: what is filled in stays text, and what a template lays out becomes blocks."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lfu.report import template
from lfu.report.blocks import Heading, Items, Paragraph, Table


@pytest.fixture
def view_of(monkeypatch):
    """(text of a template, names) -> the view."""

    def use(text: str, **names):
        loader = jinja2.DictLoader({"try-out.md.j2": text})
        monkeypatch.setattr(jinja2, "FileSystemLoader", lambda folder: loader)
        return template.view_of_template("try-out", {"results": {}, "settings": {}}, **names)

    return use


@pytest.fixture(autouse=True, scope="module")
def _nothing_that_was_read_before():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "templates", template.templates.__wrapped__)
        yield


def test_a_template_is_a_title_a_verdict_and_blocks(view_of):
    text = (
        "# A {{ 'title' }}\n\nOne,\ntwo.\n\n## Part\n\nWords.\n\n{{ table(rows, 'Above') }}\n{{ items('Read', read) }}"
    )
    found = view_of(text, rows=[["", "a"], ["x", "1"]], read=[{"q": "a"}])
    assert (found.title, found.verdict) == ("A title", ["One, two."])
    table, items = Table(["", "a"], [["x", "1"]], "Above"), Items("Read", [{"q": "a"}])
    assert found.blocks == [Heading("Part"), Paragraph("Words."), table, items]


def test_what_there_is_nothing_to_show_of_leaves_no_trace(view_of):
    found = view_of("# T\n\n## H\n\n{{ table([['', 'a']]) }}\n\n{{ figure(none) }}\n\n{{ items('x', []) }}")
    assert found.blocks == [Heading("H")]


@given(st.text(st.sampled_from("#\n ab\ue0001{}<"), max_size=12))
@example("## x")
@example("\ue0000\ue000")
@example("\n\n\ue0000\ue000\n\n")
def test_a_value_is_text_wherever_it_stands(value):
    with pytest.MonkeyPatch.context() as patch:
        loader = jinja2.DictLoader({"x.md.j2": "# {{ v }}\n\n{{ v }}\n\n## H{{ v }}\n\n{{ v }}\n\nand {{ v }}"})
        patch.setattr(jinja2, "FileSystemLoader", lambda folder: loader)
        found = template.view_of_template("x", {"results": {}, "settings": {}}, v=value)
    text = " ".join(value.replace("\ue000", "").split())
    assert found.title == text
    assert found.verdict == ([text] if text else [])
    assert found.blocks == [Heading(f"H{text}"), *([Paragraph(text)] if text else []), Paragraph(f"and {text}".strip())]


@pytest.mark.parametrize("path", sorted(Path(template.__file__).parent.glob("*.j2")), ids=lambda path: path.stem)
def test_a_choice_in_a_text_has_both_sides(path):
    """`{{ x if y }}` is an error where y is false, which no test might come to."""
    parsed = jinja2.Environment().parse(path.read_text(encoding="utf-8"))
    for found in parsed.find_all(jinja2.nodes.CondExpr):
        assert found.expr2 is not None, f"line {found.lineno}"


def test_a_misspelt_name_is_an_error(view_of):
    with pytest.raises(jinja2.UndefinedError):
        view_of("{{ results.nothing }}")
