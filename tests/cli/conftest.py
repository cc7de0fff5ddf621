"""What the command line is tried on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_folder import save_model
from tiny_study import write_questions


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny random model, one for each test file."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def _shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf")
    write_questions(folder / "rows.jsonl")
    return folder


@pytest.fixture
def shelf(_shelf, monkeypatch):
    """A working folder as `here`, which all tests of a file share: what one study has trained no other trains again."""
    monkeypatch.chdir(_shelf)
    monkeypatch.setenv("LFU_CACHE", str(_shelf / "cache"))
    return _shelf


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with sums to train on, rows.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_questions(Path("rows.jsonl"))
    return tmp_path
