"""What `lfu methods` reads from the sources is what the classes say."""

from __future__ import annotations

import inspect

import pytest

from lfu.methods import REGISTRY, method_class
from lfu.methods.about import about
from lfu.methods.knobs import knobs_of, range_of


@pytest.mark.parametrize("name", REGISTRY)
def test_read_and_run_agree(name):
    read, cls = about(name), method_class(name)
    for field in ("name", "summary", "source", "protects", "once", "places"):
        assert getattr(read, field) == getattr(cls, field), field
    assert read.doc == inspect.getdoc(cls)
    assert list(read.knobs) == [
        (f.name, f.default, range_of(f.default, f.metadata["limits"]), f.metadata["help"]) for f in knobs_of(cls)
    ]


def test_a_class_that_is_not_there(monkeypatch):
    monkeypatch.setitem(REGISTRY, "gone", "lfu.methods.gem:Gone")
    with pytest.raises(ValueError, match=r"lfu\.methods\.gem has no class Gone"):
        about("gone")
