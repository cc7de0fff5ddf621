"""The report page: whatever a text holds, the page and the markdown show that text and nothing else happens."""

from __future__ import annotations

import json
import re
import struct
import sys
import types
import zlib
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lfu.report.blocks import Figure, Heading, Items, Paragraph, Table, View
from lfu.report.markdown import definitions, escaped, markdown
from lfu.report.page import html, numeric_columns, png_width, write_report
from lfu.support.errors import UserError

VOID = {"meta", "img", "br", "hr", "link", "input"}


MODEL = {"name": "m<1>", "class": "Llama", "parameters": 1234567, "dtype": "float32", "weights": "abc123"}


def png(width: int = 3, height: int = 2) -> bytes:
    """A white picture."""
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    rows = zlib.compress((b"\0" + b"\xff" * width) * height)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def record(kind: str = "try-out", **more) -> dict:
    return {
        "format": 1,
        "kind": kind,
        "created": "2030-01-02 03:04 UTC",
        "command": "lfu probe try-out --model m",
        "machine": "Linux x86_64, 2 CPU cores, no GPU",
        "versions": {"lfu": "0.1.0", "torch": "2.13"},
        "seed": 7,
        "models": {"base": MODEL},
        "settings": {"steps": [0, 5], "name": "x<y>"},
        "results": {},
    } | more  # fmt: skip


@pytest.fixture
def shown(monkeypatch):
    """Makes `lfu.report.try_out_view` give the view that the test hands over."""

    def use(view: View) -> None:
        module = types.ModuleType("lfu.report.try_out_view")
        module.view = lambda record: view  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lfu.report.try_out_view", module)

    return use


class Page(HTMLParser):
    """The page as a browser reads it: elements with their text, and every tag that was opened."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.stack: list[tuple[str, list[str]]] = [("", [])]
        self.texts: list[tuple[str, str]] = []  # (tag, text) of each closed element
        self.tags: list[tuple[str, dict]] = []
        self.feed(text.replace("\r\n", "\n").replace("\r", "\n"))  # as browsers do before they parse
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "br":
            self.stack[-1][1].append("\n")
        elif tag not in VOID:
            self.stack.append((tag, []))

    def handle_endtag(self, tag):
        if tag in VOID:  # markdown-it writes <img />
            return
        opened, parts = self.stack.pop()
        assert opened == tag, f"<{opened}> closed by </{tag}>"
        self.texts.append((tag, "".join(parts)))
        self.stack[-1][1].append("".join(parts))

    def handle_data(self, data):
        self.stack[-1][1].append(data)

    def all(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def visible(text: str) -> str:
    """A text as a page can show it."""
    return re.sub("[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", text)


def lines(text: str) -> str:
    """HTML and CommonMark know one kind of line break."""
    return visible(text).replace("\r\n", "\n").replace("\r", "\n")


def words(text: str) -> str:
    return " ".join(text.split())


NASTY = [
    "<script>alert(1)</script>", "</td></tr></table><img src=x onerror=alert(1)>", "a|b||c\\|d\\\\|",
    "line one\nline two\r\n\r\nfour", "# not a heading", "- no list", "1. no list", "12) no", "===", "---", "> quote",
    "    code", "```\nfence\n```", "`tick`` ```", "~~~", "*a* **b** _c_ __d__ e_f_g ~~h~~", "<!-- ", "]]>",
    "</details>", "[x](javascript:alert(1)) ![y](z) <http://x.y>", "&amp; &lt; & &#60; &copy;", "\\", "\\*", "$x$",
    "{{ 7*7 }} {% raw %}", "+", "\x00\x07", "\ud800", "", " ", "“curly” – ünïcödé 漢字 🙂",
]  # fmt: skip
ANY = st.one_of(
    st.sampled_from(NASTY),
    st.lists(st.sampled_from(NASTY), max_size=3).map(" ".join),
    st.text(max_size=30),
    st.text(alphabet="|\\<>&*_`#-[]()!~$\n 1.ab", max_size=14),
)
TABLES = st.integers(1, 3).flatmap(
    lambda n: st.builds(
        Table,
        columns=st.lists(ANY, min_size=n, max_size=n),
        rows=st.lists(st.lists(ANY, min_size=n, max_size=n), min_size=1, max_size=3),
        caption=ANY,
        note=ANY,
    )
)
ITEMS = st.builds(Items, title=ANY, items=st.lists(st.dictionaries(ANY, ANY, min_size=1, max_size=2), max_size=2))
VIEWS = st.builds(
    View,
    title=ANY,
    verdict=st.lists(ANY, min_size=1, max_size=2),
    blocks=st.lists(
        st.one_of(
            st.builds(Heading, text=ANY),
            st.builds(Paragraph, text=ANY),
            TABLES,
            ITEMS,
            st.builds(Figure, name=st.just("one"), png=st.just(png()), alt=ANY, caption=ANY),
        ),
        max_size=4,
    ),
)


# --- every text stays text -----------------------------------------------------------------------------------------


@cache
def frame():
    """The page of nothing."""
    return Page(html(record(), View("", [])))


@settings(max_examples=80, deadline=None)
@given(view=VIEWS)
@example(view=View(NASTY[0], NASTY, [Paragraph(text) for text in NASTY]))
@example(view=View("t", ["v"], [Table([text], [[text]], text, text) for text in NASTY]))
@example(view=View("t", ["v"], [Items(text, [{text: text}]) for text in NASTY]))
def test_the_page_shows_exactly_the_texts(view):
    page = Page(html(record(), view))
    plain = frame()
    made = {tag for tag, _ in page.tags}
    assert made <= {tag for tag, _ in plain.tags} | {
        "th",
        "td",
        "tr",
        "figure",
        "figcaption",
        "img",
        "details",
        "small",
    }
    assert page.all("h1") == [lines(view.title)]
    assert page.all("title") == [lines(view.title)]
    assert [tag for tag, _ in page.tags].count("tr") == 2 + sum(
        1 + len(block.rows) for block in view.blocks if isinstance(block, Table)
    )
    for sentence in view.verdict:
        assert lines(sentence) in page.all("p")
    for block in view.blocks:
        if isinstance(block, Heading):
            assert lines(block.text) in page.all("h2")
        elif isinstance(block, Paragraph):
            assert lines(block.text) in page.all("p")
        elif isinstance(block, Table):
            cells = page.all("th") + page.all("td")
            assert {lines(cell) for row in [block.columns, *block.rows] for cell in row} <= set(cells)
        elif isinstance(block, Figure):
            assert lines(block.alt) in [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
        elif isinstance(block, Items):
            texts = set(page.all("dt")) | set(page.all("dd"))
            assert {lines(text) for item in block.items for pair in item.items() for text in pair} <= texts


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(ANY, min_size=1, max_size=4))
@example(texts=NASTY)
def test_markdown_paragraphs_read_back_as_the_texts(texts):
    texts = [visible(text) for text in texts if text.split()]
    page = Page(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render("\n\n".join(map(escaped, texts))))
    assert page.all("p") == [words(text) for text in texts]
    assert {tag for tag, _ in page.tags} <= {"p"}


@settings(max_examples=150, deadline=None)
@given(table=TABLES)
@example(table=Table(NASTY, [NASTY, NASTY]))
def test_markdown_tables_read_back_cell_by_cell(table):
    table = Table([visible(c) for c in table.columns], [[visible(c) for c in row] for row in table.rows])
    page = Page(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown(View("t", [], [table]))))
    assert [words(cell) for cell in page.all("th")] == [words(cell) for cell in table.columns]
    assert [words(cell) for cell in page.all("td")] == [words(cell) for row in table.rows for cell in row]
    assert {tag for tag, _ in page.tags} <= {"h1", "table", "thead", "tbody", "tr", "th", "td", "br"}


@settings(max_examples=100, deadline=None)
@given(items=ITEMS)
@example(items=Items("all", [{"text": text} for text in NASTY]))
def test_markdown_items_are_fenced_whole(items):
    fences = [t.content for t in MarkdownIt("commonmark").parse(markdown(View("t", [], [items]))) if t.type == "fence"]
    texts = [text for item in items.items for text in item.values()]
    # line breaks at the end of a fence are nothing that anyone could see
    assert [f.rstrip("\n") for f in fences] == [lines(text).rstrip("\n") for text in texts]


@settings(max_examples=100, deadline=None)
@given(one=ANY, two=ANY)
@example(one="[x", two="y](z)")
@example(one="[x]", two="http://y")
@example(one="back\\", two="]")
def test_markdown_figures_and_definitions_read_back(one, two):
    one, two = visible(one), visible(two)
    figure = Figure("stem", png(), one + two)
    read = lambda text: Page(MarkdownIt("commonmark").render(text))
    images = [attrs for tag, attrs in read(markdown(View("t", [], [figure]))).tags if tag == "img"]
    assert images == [{"src": "stem.png", "alt": words(one + two)}]
    assert read(definitions([(one, two)])).all("li") == [words(f"{one}: {two}")]


# --- the folder ----------------------------------------------------------------------------------------------------


def everything() -> View:
    return View(
        "A title",
        ["First sentence.", "Second."],
        [
            Heading("Section"),
            Paragraph("Some words."),
            Table(["method", "share"], [["sft", "12.5 %"], ["lfu", "–"]], "Above", "Below"),
            Figure("curve", png(), "A curve", "What it shows"),
            Items("Answers", [{"prompt": "Why?", "answer": "Because\nof that."}]),
        ],
    )


def test_all_files_are_there_and_the_page_is_alone(tmp_path, shown):
    shown(everything())
    write_report(record(), tmp_path / "new" / "out")
    out = tmp_path / "new" / "out"
    assert sorted(path.name for path in out.iterdir()) == ["curve.png", "index.html", "record.json", "report.md"]
    assert (out / "curve.png").read_bytes() == png()
    assert json.loads((out / "record.json").read_text(encoding="utf-8")) == record()
    page = (out / "index.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:)|@import|url\(', page)
    assert 'src="data:image/png;base64,' in page
    assert "prefers-color-scheme: dark" in page
    md = (out / "report.md").read_text(encoding="utf-8")
    assert "![A curve](curve.png)" in md
    for text in (page, md):
        for shown_text in (
            "First sentence.",
            "lfu probe try-out --model m",
            "2030-01-02 03:04 UTC",
            "2 CPU cores",
            "torch 2.13",
        ):
            assert shown_text in text
        for model_text in ("Llama", "1,234,567", "float32", "abc123"):
            assert model_text in text


def test_the_same_record_gives_the_same_bytes(tmp_path, shown):
    shown(everything())
    for name in ("a", "b"):
        write_report(record(), tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_json_keeps_what_utf8_cannot_hold(tmp_path, shown):
    shown(View("t", ["v"]))
    odd = record(results={"text": "half \ud83d pair \u2028 \x00"})
    write_report(odd, tmp_path)
    assert json.loads((tmp_path / "record.json").read_text(encoding="utf-8")) == odd


def test_a_write_that_fails_leaves_the_old_file(tmp_path, shown, monkeypatch):
    shown(everything())
    write_report(record(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        write_report(record(seed=8), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("figures", [["../up"], ["a/b"], ["x", "x"], [""], [".png"]])
def test_figure_names_that_are_no_file_stems_write_nothing(tmp_path, shown, figures):
    shown(View("t", ["v"], [Figure(name, png(), "alt") for name in figures]))
    with pytest.raises(ValueError, match="figure name"):
        write_report(record(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([], "an object was expected, this is a list"),
        ({}, "it has no 'kind'"),
        (record(kind="no-such-kind"), "knows no such kind"),
        (record(kind="../secrets"), "knows no such kind"),
        (record(kind="os.path"), "knows no such kind"),
        (record(kind="demo-page.x"), "knows no such kind"),
        (record(versions=None), "'versions' is a NoneType"),
        (record(seed="7"), "'seed' is a str"),
    ],
)
def test_what_is_no_record_is_one_line(tmp_path, bad, says):
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        write_report(bad, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_import_error_inside_a_view_is_not_hidden(tmp_path, monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "lfu.report.broken_view":
                raise ModuleNotFoundError("No module named 'numberless'", name="numberless")

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="numberless"):
        write_report(record(kind="broken"), tmp_path)


def test_number_columns_are_flush_right_and_the_first_never_is():
    rows = [["1", "+0.3 [0.1, 0.5]", "12 of 40", "12ab", "–"], ["2", "−4 %", "a few", "2030-01-02", "n/a"]]
    assert numeric_columns(Table(list("abcde"), rows)) == [False, True, False, False, True]


def test_png_width():
    assert png_width(png(width=321)) == 321
    with pytest.raises(ValueError, match="not a PNG"):
        png_width(b"GIF89a")


def test_the_page_is_written_for_phones_too():
    page = html(record(), everything())
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    parsed = Page(page)
    wrapped = [attrs.get("class") for tag, attrs in parsed.tags if tag == "div"]
    assert wrapped.count("scroll") == len([tag for tag, _ in parsed.tags if tag == "table"]) == 2


def test_templates_ship_with_the_package():
    import lfu.report

    assert (Path(lfu.report.__file__).parent / "page.html.j2").is_file()
