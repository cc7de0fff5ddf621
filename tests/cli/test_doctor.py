"""`lfu doctor`."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from lfu.cli import VERBS, doctor, main
from lfu.support import extras


def test_it_tells_versions_machine_and_commands(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no line is broken
    code = main(["doctor"])
    told = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in told.splitlines() if line.startswith("  "))
    assert code == (1 if doctor.wrong_versions() else 0)
    for name in ("torch", "transformers", "trl"):
        assert rows[name].split()[0] == importlib.metadata.version(name)
    assert "GiB" in rows["memory"]
    assert rows["GPU"].startswith("none") != torch.cuda.is_available()
    assert set(rows["ready"].split(", ")) == {
        verb for verb, (_, needed) in VERBS.items() if not extras.missing(*needed)
    }


def test_it_says_what_a_command_lacks_and_how_to_install_it(capsys, monkeypatch):
    find = extras.importlib.util.find_spec
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name))
    main(["doctor"])
    told = capsys.readouterr().out
    assert "  compare       needs jinja2: pip install 'lfu-tuning[report]'" in told
    assert " probe" not in next(line for line in told.splitlines() if line.startswith("  ready"))


@pytest.mark.parametrize(("found", "good"), [("9.1", True), ("8.9", False), ("10.0", False), (None, True)])
def test_a_version_out_of_range_is_told(monkeypatch, capsys, found, good):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["thing>=9,<10; extra == 'train'"])
    monkeypatch.setattr(doctor, "_version", lambda name: found)
    assert main(["doctor"]) == (0 if good else 1)
    assert ("thing 8.9 is installed" in capsys.readouterr().out) == (found == "8.9")


def test_run_from_a_source_tree_it_knows_no_bounds():
    assert doctor.wrong_versions("not-an-installed-thing") == {}
