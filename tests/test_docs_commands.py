"""Every command and every program that README and docs show: the flags exist, and the programs run on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from tiny_folder import save_model

from lfu.cli import VERBS, main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]
PROBES = ("forgetting", "drift", "noise", "prompts", "adversarial")


def commands() -> list[tuple[str, str]]:
    """`(page, command)` for each command of `lfu` in a block of shell lines."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if words := re.search(r"(?:^|\s|&& )(?:lfu|-m lfu\.cli) (?=[a-z])(.*)", line.partition(" # ")[0]):
                    found.append((page.name, re.split(r"\s(?:[|>&]|&&)", words[1])[0]))
    return found


@cache
def flags_of(*verb: str) -> frozenset[str]:
    """The flags that `lfu VERB --help` lists."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert main([*verb, "--help"]) == 0
    return frozenset(re.findall(r"--[A-Za-z][\w-]*", told.getvalue()))


def test_there_are_commands():
    assert len(commands()) > 30


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_flag_that_a_page_shows_exists(page, command):
    words = shlex.split(command.replace("...", ""), comments=True)
    assert words[0] in VERBS, f"{page}: {command}"
    verb = words[:2] if words[0] == "probe" and words[1:] and words[1] in PROBES else words[:1]
    given = {flag for word in words for flag in re.findall(r"(?:^| )(--[A-Za-z][\w-]*)", word)}
    known = flags_of(*verb) | (flags_of("train") if verb[0] in ("compare", "sweep", "probe") else frozenset())
    assert {flag.replace("-", "_") for flag in given} <= {flag.replace("-", "_") for flag in known}, (
        f"{page}: {command}"
    )


@pytest.mark.parametrize("page", ["README.md", "docs/train.md"])
def test_the_programs_run_as_they_stand(page, tmp_path, monkeypatch):
    """On a tiny model and six rows in place of the reader's own; one step, in float32."""
    import transformers

    monkeypatch.chdir(tmp_path)
    model = save_model(tmp_path / "model")
    rows = ({"prompt": f"What is {i} + {i}?", "completion": f" {2 * i}."} for i in range(6))
    Path("my_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    usual = transformers.TrainingArguments.__post_init__

    def short(self: transformers.TrainingArguments) -> None:
        self.max_steps, self.bf16, self.report_to, self.save_strategy = 1, False, "none", "no"
        usual(self)

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", short)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S):
        exec(block.replace("Qwen/Qwen3-0.6B", str(model)), names)
    assert names["rows"].num_rows == 6
