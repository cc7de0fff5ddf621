"""Pictures: drawn without touching what the user draws."""

from __future__ import annotations

import importlib

from matplotlib import pyplot as plt

from lfu.report import figures


def test_a_picture_leaves_the_users_pyplot_alone():
    """A notebook whose callback has written its page still shows the user's own plots."""
    before = plt.get_backend()
    try:
        plt.switch_backend("svg")
        png = importlib.reload(figures).draw((2, 1), lambda axis: axis.plot([1, 2]))
        assert plt.get_backend() == "svg"
        assert not plt.get_fignums()
        assert png.startswith(b"\x89PNG")
    finally:
        plt.switch_backend(before)
