"""Generated skills on a small alphabet: what the test bed's model knows, and how it is asked, exactly.

A row is `command input = output end`. Every skill has three commands that mean the same, so that steadiness under
rewording can be measured; facts are arbitrary and can only be known by heart.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LETTERS = "abcdefghij"
FACTS = 150


@dataclass(frozen=True)
class Row:
    """One question and its answer, as tokens."""

    prompt: tuple[str, ...]
    answer: tuple[str, ...]


@dataclass(frozen=True)
class Skill:
    """A function from input tokens to output tokens, and the commands that ask for it."""

    name: str
    words: tuple[str, str, str]
    draw: Callable[[random.Random], tuple[list[str], list[str]]]

    def row(self, rng: random.Random, word: int | None = None) -> Row:
        """A row asked for by command number `word`; None: any."""
        given, out = self.draw(rng)
        command = self.words[rng.randrange(3) if word is None else word]
        return Row((*command.split(), *given, "="), (*out, "<end>"))


def _on_letters(function: Callable[[list[str]], list[str]]) -> Callable[[random.Random], tuple[list[str], list[str]]]:
    def draw(rng: random.Random) -> tuple[list[str], list[str]]:
        given = [rng.choice(LETTERS) for _ in range(rng.randint(3, 6))]
        return given, function(given)

    return draw


def _shift(letters: list[str]) -> list[str]:
    return [LETTERS[(LETTERS.index(x) + 1) % len(LETTERS)] for x in letters]


def _add(rng: random.Random) -> tuple[list[str], list[str]]:
    one, two = rng.randint(0, 99), rng.randint(0, 99)
    return [*f"{one:02d}", "+", *f"{two:02d}"], [*f"{one + two:03d}"]


def _count(rng: random.Random) -> tuple[list[str], list[str]]:
    wanted = rng.choice(LETTERS[:4])
    given = [rng.choice(LETTERS[:4]) for _ in range(rng.randint(3, 6))]
    return [wanted, "in", *given], [str(given.count(wanted))]


def _fact(rng: random.Random) -> tuple[list[str], list[str]]:
    return fact(rng.randrange(FACTS))


def fact(number: int) -> tuple[list[str], list[str]]:
    """Fact `number` in 0..FACTS-1: a three-letter name and its arbitrary two-letter value."""
    rng = random.Random(f"fact {number}")
    name = [LETTERS[number // 100 % 10], LETTERS[number // 10 % 10], LETTERS[number % 10]]
    return name, [rng.choice(LETTERS), rng.choice(LETTERS)]


SKILLS = {
    skill.name: skill
    for skill in (
        Skill("copy", ("copy", "repeat", "echo"), _on_letters(lambda x: x)),
        Skill("reverse", ("reverse", "backward", "mirror"), _on_letters(lambda x: x[::-1])),
        Skill("sort", ("sort", "order", "arrange"), _on_letters(sorted)),
        Skill("shift", ("shift", "next", "advance"), _on_letters(_shift)),
        Skill("count", ("count", "tally", "number"), _count),
        Skill("add", ("add", "sum", "total"), _add),
        Skill("fact", ("fact", "recall", "lookup"), _fact),
        # the one that is fine-tuned, never seen before: a composition, asked for by two known words in a row
        Skill("turn", ("shift reverse", "next backward", "advance mirror"), _on_letters(lambda x: _shift(x[::-1]))),
    )
}
TARGET = "turn"
OTHERS = tuple(name for name in SKILLS if name != TARGET)


def vocabulary() -> list[str]:
    """All tokens, padding first."""
    words = [word for name in OTHERS for word in SKILLS[name].words]
    return ["<pad>", "<end>", "=", "+", "in", *LETTERS, *"0123456789", *words]


def rows(name: str, count: int, seed: int | str, word: int | None = None) -> list[Row]:
    """`count` different rows of a skill, the same for the same arguments.

    Raises:
        ValueError: the skill has not so many.
    """
    rng = random.Random(f"{name} {seed} {word}")
    found: dict[Row, None] = {}
    for _ in range(100 * count):
        if len(found) == count:
            return list(found)
        found[SKILLS[name].row(rng, word)] = None
    raise ValueError(f"skill {name!r} has fewer than {count} different rows")


def stream(seed: int) -> Iterator[Row]:
    """Endless rows of all skills but the target."""
    rng = random.Random(f"stream {seed}")
    while True:
        yield SKILLS[rng.choice(OTHERS)].row(rng)
