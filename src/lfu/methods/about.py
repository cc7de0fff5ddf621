"""What a method says of itself, read from its source without importing it, and what a step of it costs.

So `lfu methods` need not wait for torch.
"""

import ast
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from lfu.methods.knobs import range_of
from lfu.methods.method import Method
from lfu.methods.registry import FOLDER, REGISTRY


@dataclass(frozen=True)
class About:
    """A method's class attributes (see `Method`), its docstring, and its knobs as `(name, default, range, help)`."""

    name: str
    summary: str
    source: str
    protects: str
    once: str
    places: tuple[str, ...]
    doc: str
    knobs: tuple[tuple[str, Any, str, str], ...]


def about(name: str) -> About:
    """What one of lfu's own methods says of itself.

    Raises KeyError: it is not in `REGISTRY`; ValueError: what its file says shows only once it runs.
    """
    module, _, cls = str(REGISTRY[name]).partition(":")
    if cls not in _classes():
        raise ValueError(f"{module} has no class {cls}")
    lineage = []
    while cls in _classes():  # up to `Method`, which is in no method's file
        lineage.append(_classes()[cls])
        cls = ast.unparse(lineage[-1][0].bases[0])
    said: dict[str, Any] = {"once": Method.once, "places": Method.places}
    knobs: dict[str, tuple[str, Any, str, str]] = {}
    for node, constants in reversed(lineage):  # what a subclass says wins
        for field, value in _fields(node):
            if isinstance(value, ast.Call) and ast.unparse(value.func) == "knob":
                default, help = (_value(arg, constants) for arg in value.args)
                limits = {str(one.arg): _value(one.value, constants) for one in value.keywords}
                knobs[field] = (field, default, range_of(default, limits), help)
            elif field in About.__dataclass_fields__:
                said[field] = _value(value, constants)
    documented = (ast.get_docstring(node, clean=False) for node, _ in lineage)
    doc = inspect.cleandoc(next(text for text in documented if text))
    return About(**said, doc=doc, knobs=tuple(knobs.values()))


def measured() -> dict[str, Any]:
    """`ratio`: method -> `lora` or `full` -> step time over SFT's; how and where benchmarks/method_cost.py measured."""
    return json.loads((FOLDER / "costs.json").read_text(encoding="utf-8"))


@cache
def _classes() -> dict[str, tuple[ast.ClassDef, Mapping[str, ast.expr]]]:
    """The classes with bases in this folder, each with the constants of its file."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.py")]
    nodes = [(node, dict(_fields(tree))) for tree in trees for node in tree.body]
    return {node.name: (node, known) for node, known in nodes if isinstance(node, ast.ClassDef) and node.bases}


def _fields(node: ast.ClassDef | ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """`name = value`, with an annotation or without."""
    for one in node.body:
        target = one.targets[0] if isinstance(one, ast.Assign) else getattr(one, "target", None)
        value = getattr(one, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.expr):
            yield target.id, value


def _value(node: ast.expr, constants: Mapping[str, ast.expr]) -> Any:
    if isinstance(node, ast.Name) and node.id in constants:
        return _value(constants[node.id], constants)
    return ast.literal_eval(node)
