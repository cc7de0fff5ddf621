"""Pictures that cost nothing."""

from __future__ import annotations

from typing import Any


def one_pixel(patch: Any) -> None:
    """Pictures are painted but not rendered, which takes 0.2 s each: every PNG is one pixel."""
    from matplotlib.figure import Figure
    from PIL import Image

    patch(Figure, "savefig", lambda figure, file, **options: Image.new("RGB", (1, 1)).save(file, "png"))


_RENDERED: set[tuple[str, ...]] = set()


def one_of_each_kind(patch: Any) -> None:
    """The same but for the first picture of each kind, which is rendered: what has the same axes is of one kind."""
    from matplotlib.figure import Figure

    usual = Figure.savefig
    one_pixel(patch)
    quick = Figure.savefig

    def savefig(figure: Any, file: Any, **options: Any) -> None:
        kind = tuple(text for axis in figure.axes for text in (axis.get_xlabel(), axis.get_ylabel()))
        (quick if kind in _RENDERED else usual)(figure, file, **options)
        _RENDERED.add(kind)

    patch(Figure, "savefig", savefig)
