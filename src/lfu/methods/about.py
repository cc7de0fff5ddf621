"""What a method says of itself, read from its source without importing it: `lfu methods` need not wait for torch."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from lfu.methods.method import Method
from lfu.methods.registry import FOLDER, REGISTRY


@dataclass(frozen=True)
class About:
    """A method's class attributes (see `Method`), its docstring, and its knobs as `(name, default, help)`."""

    name: str
    summary: str
    source: str
    protects: str
    once: str
    places: tuple[str, ...]
    doc: str
    knobs: tuple[tuple[str, Any, str], ...]


def about(name: str) -> About:
    """What one of lfu's own methods says of itself.

    Raises:
        KeyError: it is not in `REGISTRY`.
        ValueError: its file says a thing in a way that only running it would tell.
    """
    module, _, cls = str(REGISTRY[name]).partition(":")
    lineage = _lineage(module, cls)
    said: dict[str, Any] = {"once": Method.once, "places": Method.places}
    knobs: dict[str, tuple[str, Any, str]] = {}
    for node, constants in reversed(lineage):  # what a subclass says wins
        for field, value in _fields(node):
            if isinstance(value, ast.Call) and ast.unparse(value.func) == "knob":
                knobs[field] = (field, _value(value.args[0], constants), _value(value.args[1], constants))
            elif field in About.__dataclass_fields__:
                said[field] = _value(value, constants)
    documented = (ast.get_docstring(node, clean=False) for node, _ in lineage)
    doc = inspect.cleandoc(next(text for text in documented if text))
    return About(**said, doc=doc, knobs=tuple(knobs.values()))


def _lineage(module: str, cls: str) -> list[tuple[ast.ClassDef, Mapping[str, ast.expr]]]:
    """The class and its bases up to `Method`, each with the constants of its file."""
    tree = _parsed(module)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if cls not in classes:
        raise ValueError(f"{module} has no class {cls}")
    node = classes[cls]
    constants = {
        target.id: one.value
        for one in tree.body if isinstance(one, ast.Assign)
        for target in one.targets if isinstance(target, ast.Name)
    }  # fmt: skip
    homes = {
        alias.name: one.module
        for one in tree.body if isinstance(one, ast.ImportFrom) and one.module
        for alias in one.names
    }  # fmt: skip
    bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id != "Method"]
    return [(node, constants), *(pair for base in bases for pair in _lineage(homes.get(base, module), base))]


@cache
def _parsed(module: str) -> ast.Module:
    return ast.parse((FOLDER / f"{module.rpartition('.')[2]}.py").read_text(encoding="utf-8"))


def _fields(node: ast.ClassDef) -> list[tuple[str, ast.expr]]:
    return [
        (one.target.id, one.value)
        for one in node.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and one.value is not None
    ]


def _value(node: ast.expr, constants: Mapping[str, ast.expr]) -> Any:
    if isinstance(node, ast.Name) and node.id in constants:
        return _value(constants[node.id], constants)
    return ast.literal_eval(node)
