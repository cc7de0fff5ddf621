"""Which methods there are: every class in this folder's files that has a `name`, and any other once it is defined.

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
_CLASS = re.compile(r"^class (\w+)|^    name = \"(\w+)\"$", re.MULTILINE)


def _found() -> dict[str, str | type[Method]]:
    """`gem` -> `lfu.methods.gem:GEM`; plain SFT and LfU first, then by name."""
    found = {}
    for path in FOLDER.glob("*.py"):
        for cls, name in _CLASS.findall(path.read_text(encoding="utf-8")):
            if cls:
                current = cls
            else:
                found[name] = f"lfu.methods.{path.stem}:{current}"
    return dict(sorted(found.items(), key=lambda item: (item[0] != "sft", item[0][:3] != "lfu", item[0])))


# name -> the class, or where it is. The order is that of `lfu methods`.
REGISTRY: dict[str, str | type[Method]] = _found()


def register(method: type[Method]) -> None:
    """Makes a method known by its `name`. Raises ValueError: the name is that of one of lfu's own methods."""
    known = REGISTRY.get(method.name)
    if known == f"{method.__module__}:{method.__name__}":
        return
    if isinstance(known, str):
        raise ValueError(f"method name {method.name!r} is taken by {known}: choose another")
    REGISTRY[method.name] = method


def method_class(name: str) -> type[Method]:
    """The class of a registered method. Raises ValueError: no such method, with the closest names."""
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
