"""What the documentation site is made of, as a hook of mkdocs: pages from outside docs/, navigation, table of knobs.

The Markdown files are written for a code host and stay as they are; what differs on the site is changed here.
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from links import slug  # noqa: E402

# Page -> its name in the navigation, in reading order; pages that are not there (yet) are left out.
ORDER = {
    "index.md": "Start",
    "forgetting.md": "See what was forgotten",
    "train.md": "Fine-tune without forgetting",
    "compare.md": "Compare methods",
    "own-loop.md": "LfU in your own loop",
    "guide.md": "Guide: every setting",
    "several-gpus.md": "Several GPUs",
    "integrations.md": "axolotl, LLaMA-Factory, Unsloth",
    "compare-details.md": "Every rule of a comparison",
    "forgetting-details.md": "How forgetting is measured",
    "method.md": "The method",
    "methods.md": "All methods",
    "evaluation.md": "Evaluation",
    "probes.md": "Probes",
    "probes-training.md": "Probes that train",
    "results.md": "Results",
    "results-testbed.md": "Results: the test bed",
    "results-testbed-runs.md": "Results: every setting",
    "results-pull.md": "Results: the pull, closer",
    "results-models.md": "Results: real models",
    "performance.md": "Performance",
    "reliability.md": "Reliability",
    "families.md": "Model families",
    "architecture.md": "Architecture",
    "api.md": "API",
    "contributing.md": "Contributing",
    "changelog.md": "Changelog",
}
# Written for the repository's front page, shown on the site, too.
OUTSIDE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# Linked from there, shown as they are.
BESIDE = ["CITATION.cff", "LICENSE"]
LINK = re.compile(r"(?<=\]\()([\w./-]+)(?=[)#])")
BAR = "\\|"
SHORT_CODE = re.compile(r"(?<!</span>)<code>([^<]{1,32})</code>")  # not that of a block, which begins with a span
# the spaces in `5 %`, `1 ± 0.2` and `3 of 24`; blocks of code stay as they are
UNITS = re.compile(r"(<pre.*?</pre>)|(?<=\d) (?=[%±]|of \d)|(?<=±) |(?<=\bof) (?=\d)", re.DOTALL)
CODE_WITH_BAR = re.compile(r"`([^`\n]*\\\|[^`\n]*)`")


def on_config(config: Any) -> Any:
    """Every page is in the navigation, known ones in order; anchors are those of the code host."""
    here = {path.name for path in Path(config.docs_dir).glob("*.md")} | set(OUTSIDE)
    config.nav = [{title: page} for page, title in ORDER.items() if page in here]
    config.nav += sorted(here - set(ORDER))
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside docs/, with links that fit the site."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=moved((ROOT / source).read_text(encoding="utf-8"))))
    for name in BESIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, "pygments.css", content=HtmlFormatter().get_style_defs(".highlight")))
    return files


def on_page_markdown(markdown: str, page: Any, **rest: Any) -> str:
    """Links out of docs/ lead to the moved pages; the knobs of `LfUConfig` become a table."""
    markdown = bars(moved(markdown))
    return markdown.replace("<!-- knobs of LfUConfig -->", knobs()) if page.file.src_uri == "api.md" else markdown


def on_page_content(content: str, **rest: Any) -> str:
    """Keeps together what a browser would break: a short `--flag` at its hyphens, `1 ± 0.2` at its spaces."""
    return UNITS.sub(lambda match: match[1] or "&nbsp;", SHORT_CODE.sub(r'<code class="short">\1</code>', content))


def moved(markdown: str) -> str:
    """`docs/guide.md` -> `guide.md`, `../CHANGELOG.md` -> `changelog.md`, `README.md` -> `index.md`."""
    names = {source: page for page, source in OUTSIDE.items()}

    def target(match: re.Match[str]) -> str:
        path = match[1].removeprefix("../").removeprefix("docs/")
        return names.get(path, path)

    return LINK.sub(target, markdown)


def bars(markdown: str) -> str:
    """`\\|` in code in a table is a bar on a code host; Python-Markdown would show the backslash, too."""

    def code(match: re.Match[str]) -> str:
        return f"<code>{html.escape(match[1]).replace(BAR, '&#124;')}</code>"

    lines = markdown.split("\n")
    return "\n".join(CODE_WITH_BAR.sub(code, line) if line.startswith("|") else line for line in lines)


def knobs() -> str:
    """Fields of `LfUConfig` beyond or other than those of trl's `SFTConfig`: name with type, default, help."""
    from lfu import LfUConfig

    own = LfUConfig.__annotations__
    rows = ["| field, type, default | |", "| --- | --- |"]
    fields = {field.name: field for field in dataclasses.fields(LfUConfig)}
    for name in own:
        kind = inspect.formatannotation(own[name]).replace("Union[float, str, NoneType]", "float | str | None")
        told = str(fields[name].metadata.get("help", ""))
        rows.append(f"| `{name}`<br>{kind.replace('|', BAR)} = {fields[name].default!r} | {told.replace('|', BAR)} |")
    return "\n".join(rows)
