"""Which methods there are. Each registers itself: a file in this folder by being here, any other class by its `name`.

The files are looked through, not imported: `lfu --help` and `lfu methods` need not wait for torch.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lfu.support.errors import did_you_mean

if TYPE_CHECKING:
    from lfu.methods.method import Method

FOLDER = Path(__file__).parent


def _found() -> dict[str, str | type[Method]]:
    """`gem` -> `lfu.methods.gem:GEM` for each file here that holds the method of its name; plain SFT and LfU first."""
    found: dict[str, str | type[Method]] = {}
    stems = sorted((path.stem for path in FOLDER.glob("*.py")), key=lambda s: (s != "sft", s[:3] != "lfu", s))
    for stem in stems:
        text = (FOLDER / f"{stem}.py").read_text(encoding="utf-8")
        head, name, _ = text.partition(f'    name: ClassVar[str] = "{stem}"\n')
        if name:
            *_, cls = re.findall(r"^class (\w+)", head, re.MULTILINE)
            found[stem] = f"lfu.methods.{stem}:{cls}"
    return found


# name -> the class, or where it is. The order is that of `lfu methods`.
REGISTRY: dict[str, str | type[Method]] = _found()


def register(method: type[Method]) -> None:
    """Makes a method known by its `name`; every subclass of `Method` that has one calls this when it is defined.

    Raises:
        ValueError: the name is that of one of lfu's own methods.
    """
    known = REGISTRY.get(method.name)
    if known == f"{method.__module__}:{method.__name__}":
        return
    if isinstance(known, str):
        raise ValueError(f"method name {method.name!r} is taken by {known}: choose another")
    REGISTRY[method.name] = method


def method_class(name: str) -> type[Method]:
    """The class of a registered method.

    Raises:
        ValueError: no such method, with the closest names.
    """
    if name not in REGISTRY:
        raise ValueError(unknown_method(name))
    found = REGISTRY[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        return getattr(importlib.import_module(module), attribute)
    return found


def unknown_method(name: str) -> str:
    """What is said of a method that is not in `REGISTRY`."""
    return f"unknown method {name!r}: use one of {', '.join(REGISTRY)}.{did_you_mean(name, REGISTRY)}"
