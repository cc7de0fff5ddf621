"""Seeded generator of grade-school word problems with worked answers.

`builtin/word_problems.yaml` holds the scenes, the worked steps and how the numbers are drawn. Train and test use the
same shapes but no sentence in common, so a score on test measures the arithmetic and the reading, not the recall of a
wording.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice
from random import Random
from typing import Any, Literal

import yaml

# So many repeats in a row mean that the split has hardly any new problems left.
MAX_REPEATS = 20_000
_FILE = files("lfu.data").joinpath("builtin/word_problems.yaml")
_SOURCE: dict[str, Any] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
PEOPLE: tuple[tuple[str, str], ...] = tuple(_SOURCE["people"].items())


@dataclass(frozen=True)
class Shape:
    """How the numbers of a problem are drawn: slot after slot, again until the condition, an expression in them, holds.

    `slots`: (slot, first, last) of a number drawn from first to last, expressions in the slots before it; last is empty
    where first is the value.
    """

    slots: tuple[tuple[str, str, str], ...]
    condition: str = "True"

    @classmethod
    def of(cls, text: str) -> Shape:
        """From a line such as `a=3..9 b=2..a n=a*b if: n>9`."""
        drawn, _, condition = text.partition(" if: ")
        slots = (re.split(r"=|\.\.", slot) for slot in drawn.split())
        return cls(tuple((name, first, "".join(last)) for name, first, *last in slots), condition or "True")

    def draw(self, rng: Random) -> dict[str, int]:
        """Slot -> number."""
        while True:
            numbers: dict[str, int] = {}
            value = lambda text, known=numbers: eval(text, {"__builtins__": {}}, known)  # our own file's arithmetic
            for name, first, last in self.slots:
                numbers[name] = rng.randint(value(first), value(last)) if last else value(first)
            if value(self.condition):
                return numbers


@dataclass(frozen=True)
class Template:
    """One kind of word problem: texts with slots, and what they are filled with."""

    scene: str
    work: Sequence[str]
    shape: Shape
    words: dict[str, Sequence[str]] = field(default_factory=dict)

    def render(self, rng: Random) -> dict[str, str]:
        """One problem `{"question": str, "answer": str}` with its slots filled from `rng`."""
        (name, she), (friend, _) = rng.sample(PEOPLE, 2)
        numbers = self.shape.draw(rng)
        slots: dict[str, Any] = {"name": name, "she": she, "She": she.capitalize(), "friend": friend, **numbers}
        slots |= {slot: rng.choice(choices) for slot, choices in self.words.items()}
        lines = [line.format(**slots) for line in self.work]
        return {"question": self.scene.format(**slots), "answer": "\n".join([*lines, f"#### {numbers['n']}"])}


SHAPES = {name: Shape.of(text) for name, text in _SOURCE["shapes"].items()}
TEMPLATES: dict[str, tuple[Template, ...]] = {
    split: tuple(Template(**{**entry, "shape": SHAPES[entry["shape"]]}) for entry in _SOURCE[split])
    for split in ("train", "test")
}


def word_problems(split: Literal["train", "test"], n: int, seed: int = 42) -> list[dict[str, str]]:
    """`n` distinct word problems `{"question": str, "answer": str}`, the answer ending in a line `#### n`.

    The same arguments give the same rows, and a larger `n` starts with the rows of a smaller one.

    Raises:
        ValueError: an unknown split; `n` below 1; fewer than `n` problems in the split.
    """
    if split not in TEMPLATES:
        raise ValueError(f"unknown split {split!r}: use one of {sorted(TEMPLATES)}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    # Seeded with a text: the two splits of one seed draw differently, and the same in every process.
    rows = list(islice(_distinct(TEMPLATES[split], Random(f"{split}-{seed}")), n))
    if len(rows) < n:
        raise ValueError(f"split {split!r} gave only {len(rows)} distinct problems with seed {seed}, not {n}")
    return rows


def _distinct(templates: tuple[Template, ...], rng: Random) -> Iterator[dict[str, str]]:
    """Problems with no question twice; ends where MAX_REPEATS draws in a row were repeats."""
    seen: set[str] = set()
    repeats = 0
    while repeats < MAX_REPEATS:
        # Every round takes each template once, so that all skills are about equally frequent in any prefix.
        for template in rng.sample(templates, len(templates)):
            row = template.render(rng)
            repeats = repeats + 1 if row["question"] in seen else 0
            if not repeats:
                seen.add(row["question"])
                yield row
