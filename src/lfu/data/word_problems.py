"""Seeded generator of grade-school word problems with worked answers.

Each problem comes from a ``Template``: a scene with slots, a shape (the function that draws the numbers) and the
worked steps. Train and test use the same shapes but no sentence in common, so a score on test measures the
arithmetic and the reading, not the recall of a wording.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Literal

Numbers = dict[str, int]

# (name, pronoun). None ends in "s", so that "{name}'s" is always right.
PEOPLE: tuple[tuple[str, str], ...] = (
    ("Mia", "she"), ("Omar", "he"), ("Lena", "she"), ("Ben", "he"), ("Priya", "she"), ("Diego", "he"),
    ("Hana", "she"), ("Oscar", "he"), ("Zoe", "she"), ("Kofi", "he"), ("Nora", "she"), ("Ivan", "he"),
    ("Ruth", "she"), ("Tariq", "he"), ("Elsa", "she"), ("Paul", "he"), ("Wanda", "she"), ("Leo", "he"),
    ("Amina", "she"), ("Felix", "he"), ("Clara", "she"), ("Hugo", "he"), ("Yuki", "she"), ("Samuel", "he"),
)  # fmt: skip

# A run of problems already given this long means that the split has hardly any new ones left.
MAX_REPEATS = 20_000


# --- shapes: draw the numbers of a problem -------------------------------------------------------------------------
# Slots a, b, c, d are given in the scene, s and t are results on the way, n is the answer. All are 2 or more,
# so that every counted noun is plural.


def _add(rng: Random) -> Numbers:
    a, b = rng.randint(6, 50), rng.randint(6, 49)
    return {"a": a, "b": b, "n": a + b}


def _sub(rng: Random) -> Numbers:
    b, n = rng.randint(4, 50), rng.randint(3, 49)
    return {"a": b + n, "b": b, "n": n}


def _mul(rng: Random) -> Numbers:
    a, b = rng.randint(3, 12), rng.randint(3, 10)
    return {"a": a, "b": b, "n": a * b}


def _div(rng: Random) -> Numbers:
    b, n = rng.randint(2, 9), rng.randint(3, 12)
    return {"a": b * n, "b": b, "n": n}


def _add_add(rng: Random) -> Numbers:
    a, b, c = rng.randint(4, 30), rng.randint(4, 30), rng.randint(4, 30)
    return {"a": a, "b": b, "c": c, "s": a + b, "n": a + b + c}


def _add_sub(rng: Random) -> Numbers:
    a, b = rng.randint(5, 40), rng.randint(5, 30)
    c = rng.randint(3, a + b - 2)
    return {"a": a, "b": b, "c": c, "s": a + b, "n": a + b - c}


def _sub_add(rng: Random) -> Numbers:
    b, s, c = rng.randint(3, 30), rng.randint(3, 40), rng.randint(3, 25)
    return {"a": b + s, "b": b, "c": c, "s": s, "n": s + c}


def _sub_sub(rng: Random) -> Numbers:
    b, c, n = rng.randint(3, 20), rng.randint(3, 20), rng.randint(3, 30)
    return {"a": b + c + n, "b": b, "c": c, "s": c + n, "n": n}


def _mul_add(rng: Random) -> Numbers:
    a, b, c = rng.randint(3, 9), rng.randint(3, 9), rng.randint(3, 20)
    return {"a": a, "b": b, "c": c, "s": a * b, "n": a * b + c}


def _mul_sub(rng: Random) -> Numbers:
    a, b = rng.randint(3, 9), rng.randint(3, 9)
    c = rng.randint(2, a * b - 2)
    return {"a": a, "b": b, "c": c, "s": a * b, "n": a * b - c}


def _take_product(rng: Random) -> Numbers:
    """c minus a times b."""
    a, b, n = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 30)
    return {"a": a, "b": b, "c": a * b + n, "s": a * b, "n": n}


def _mul_div(rng: Random) -> Numbers:
    # c differs from a and b, or the division would only undo the multiplication.
    while True:
        a, b, c = rng.randint(3, 10), rng.randint(3, 9), rng.randint(2, 9)
        if (a * b) % c == 0 and c not in (a, b) and a * b > c:
            return {"a": a, "b": b, "c": c, "s": a * b, "n": a * b // c}


def _add_mul(rng: Random) -> Numbers:
    a, b, c = rng.randint(2, 8), rng.randint(2, 8), rng.randint(2, 7)
    return {"a": a, "b": b, "c": c, "s": a + b, "n": c * (a + b)}


def _sub_mul(rng: Random) -> Numbers:
    b, s, c = rng.randint(2, 8), rng.randint(2, 12), rng.randint(2, 7)
    return {"a": b + s, "b": b, "c": c, "s": s, "n": c * s}


def _add_div(rng: Random) -> Numbers:
    c, n = rng.randint(2, 8), rng.randint(3, 12)
    a = rng.randint(2, c * n - 2)
    return {"a": a, "b": c * n - a, "c": c, "s": c * n, "n": n}


def _sub_div(rng: Random) -> Numbers:
    b, c, n = rng.randint(2, 12), rng.randint(2, 8), rng.randint(3, 12)
    return {"a": b + c * n, "b": b, "c": c, "s": c * n, "n": n}


def _div_mul(rng: Random) -> Numbers:
    b, s, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
    return {"a": b * s, "b": b, "c": c, "s": s, "n": c * s}


def _div_sub(rng: Random) -> Numbers:
    b, c, n = rng.randint(2, 9), rng.randint(2, 5), rng.randint(2, 7)
    return {"a": b * (c + n), "b": b, "c": c, "s": c + n, "n": n}


def _div_add(rng: Random) -> Numbers:
    b, s, c = rng.randint(2, 9), rng.randint(2, 10), rng.randint(2, 12)
    return {"a": b * s, "b": b, "c": c, "s": s, "n": s + c}


def _half_add(rng: Random) -> Numbers:
    s, c = rng.randint(3, 30), rng.randint(3, 20)
    return {"a": 2 * s, "c": c, "s": s, "n": s + c}


def _double_mul(rng: Random) -> Numbers:
    a, b = rng.randint(2, 9), rng.randint(3, 9)
    return {"a": a, "b": b, "s": 2 * a, "n": b * 2 * a}


def _two_products(rng: Random) -> Numbers:
    a, b, c, d = (rng.randint(2, 8) for _ in range(4))
    return {"a": a, "b": b, "c": c, "d": d, "s": a * b, "t": c * d, "n": a * b + c * d}


def _more_total(rng: Random) -> Numbers:
    """a, and b more than a, together."""
    a, b = rng.randint(5, 35), rng.randint(3, 20)
    return {"a": a, "b": b, "s": a + b, "n": a + a + b}


def _times_total(rng: Random) -> Numbers:
    """a, and b times a, together."""
    a, b = rng.randint(4, 15), rng.randint(2, 5)
    return {"a": a, "b": b, "s": b * a, "n": a + b * a}


def _mul_add_sub(rng: Random) -> Numbers:
    a, b, c = rng.randint(2, 8), rng.randint(3, 8), rng.randint(3, 15)
    t = a * b + c
    d = rng.randint(2, t // 2)
    return {"a": a, "b": b, "c": c, "d": d, "s": a * b, "t": t, "n": t - d}


def _mul_sub_div(rng: Random) -> Numbers:
    while True:
        a, b, c, d = rng.randint(3, 10), rng.randint(3, 9), rng.randint(2, 12), rng.randint(2, 6)
        t = a * b - c
        if t >= 2 * d and t % d == 0:
            return {"a": a, "b": b, "c": c, "d": d, "s": a * b, "t": t, "n": t // d}


# --- templates -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """One kind of word problem.

    ``scene`` and ``work`` are texts with slots: numbers as drawn by ``shape``, ``{name}`` and ``{friend}`` (two
    different people), ``{she}`` and ``{She}`` (the pronoun of ``name``), and the keys of ``words``, each filled with
    one of its words. Every line of ``work`` is a sentence with its arithmetic as ``a op b = c``.
    """

    scene: str
    work: tuple[str, ...]
    shape: Callable[[Random], Numbers]
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def render(self, rng: Random) -> dict[str, str]:
        """One problem ``{"question": str, "answer": str}`` with slots filled from ``rng``."""
        (name, she), (friend, _) = rng.sample(PEOPLE, 2)
        numbers = self.shape(rng)
        slots: dict[str, object] = {"name": name, "she": she, "She": she.capitalize(), "friend": friend, **numbers}
        for slot, choices in self.words.items():
            slots[slot] = rng.choice(choices)
        lines = [line.format(**slots) for line in self.work]
        return {"question": self.scene.format(**slots), "answer": "\n".join([*lines, f"#### {numbers['n']}"])}


TRAIN_TEMPLATES: tuple[Template, ...] = (
    Template(
        "{name} buys {a} packs of {item} at the shop. Every pack holds {b} {item}. "
        "Later {she} gives {c} {item} to a cousin. How many {item} does {name} still have?",
        ("{name} buys {a} x {b} = {s} {item}.", "After giving {c} away, {she} has {s} - {c} = {n}."),
        _mul_sub,
        {"item": ("stickers", "crayons", "balloons", "markers", "postcards", "beads")},
    ),
    Template(
        "On Monday {name} picks {a} {item} in the garden, and on Tuesday {she} picks {b} more. "
        "The family eats {c} of them for supper. How many {item} remain?",
        ("In two days {name} picks {a} + {b} = {s} {item}.", "The family eats {c}, so {s} - {c} = {n} remain."),
        _add_sub,
        {"item": ("tomatoes", "carrots", "plums", "peppers", "beans", "radishes")},
    ),
    Template(
        "{name}'s teacher has {a} {item} and wants to share them equally among {b} tables in the classroom. "
        "Nothing may be left over. How many {item} does each table get?",
        ("Each table gets {a} / {b} = {n} {item}.",),
        _div,
        {"item": ("pencils", "paintbrushes", "workbooks", "rulers", "erasers", "magnets")},
    ),
    Template(
        "There are {a} shelves in the little shop where {name} works. On every shelf {she} lines up {b} {item} "
        "for the customers. How many {item} are on the shelves altogether?",
        ("With {b} {item} on each, {a} shelves hold {a} x {b} = {n} {item}.",),
        _mul,
        {"item": ("bottles", "candles", "mugs", "lamps", "vases", "bowls")},
    ),
    Template(
        "{name} goes to the bakery with {c} dollars. {She} buys {a} {item} that cost {b} dollars each. "
        "How much money, in dollars, does {she} have after paying?",
        ("The {item} cost {a} x {b} = {s} dollars.", "{name} has {c} - {s} = {n} dollars left."),
        _take_product,
        {"item": ("muffins", "pies", "cakes", "sandwiches", "pretzels", "tarts")},
    ),
    Template(
        "For a party, {name} fills {a} bags with {b} {item} each and {c} boxes with {d} {item} each. "
        "How many {item} are packed for the party in all?",
        (
            "The bags hold {a} x {b} = {s} and the boxes hold {c} x {d} = {t}.",
            "Together that is {s} + {t} = {n} {item}.",
        ),
        _two_products,
        {"item": ("cookies", "sweets", "nuts", "whistles", "balloons", "crackers")},
    ),
    Template(
        "{name} has collected {a} {item}. {friend} has collected {b} {item} more than {name}. "
        "They put both collections on one big table. How many {item} lie on the table?",
        ("{friend} has {a} + {b} = {s} {item}.", "Together they have {a} + {s} = {n} {item}."),
        _more_total,
        {"item": ("shells", "stamps", "coins", "marbles", "badges", "acorns")},
    ),
    Template(
        "{name} baked {a} {item} in the morning and {b} in the afternoon. {She} puts all of them on {c} plates, "
        "the same number on every plate. How many {item} are on one plate?",
        ("{She} baked {a} + {b} = {s} {item}.", "One plate holds {s} / {c} = {n} {item}."),
        _add_div,
        {"item": ("cookies", "waffles", "rolls", "buns", "muffins", "biscuits")},
    ),
    Template(
        "A farmer named {name} gathers {a} eggs. Sadly, {b} of them are cracked. "
        "The good ones go into {c} cartons, all equally filled. How many eggs are in each carton?",
        ("There are {a} - {b} = {s} good eggs.", "Each carton gets {s} / {c} = {n} eggs."),
        _sub_div,
    ),
    Template(
        "{name} read {a} pages of a story on Saturday. On Sunday {she} read {b} times as many pages as the day "
        "before. How many pages did {she} read over the whole weekend?",
        ("On Sunday {name} read {b} x {a} = {s} pages.", "Over the weekend {she} read {a} + {s} = {n} pages."),
        _times_total,
    ),
    Template(
        "{name} drives a {vehicle} that leaves the station with {a} passengers. At the first stop {b} passengers "
        "get off, and at the second stop {c} get off. How many passengers are still riding?",
        ("After the first stop there are {a} - {b} = {s} passengers.", "After the second, {s} - {c} = {n} ride on."),
        _sub_sub,
        {"vehicle": ("bus", "train", "tram")},
    ),
    Template(
        "{name} pays {a} dollars for {b} {item} that all have the same price. Next week {she} wants {c} of these "
        "{item} for the club. How many dollars will that cost?",
        ("One costs {a} / {b} = {s} dollars.", "Then {c} {item} cost {c} x {s} = {n} dollars."),
        _div_mul,
        {"item": ("notebooks", "balls", "puzzles", "masks", "posters", "caps")},
    ),
    Template(
        "{name} counts birds in the park: {a} sparrows near the pond, {b} pigeons by the gate and {c} crows in the "
        "trees. How many birds does {she} count in total?",
        ("Sparrows and pigeons make {a} + {b} = {s} birds.", "With the crows that is {s} + {c} = {n} birds."),
        _add_add,
    ),
    Template(
        "{name}'s notebook has {a} pages. {She} has already filled {b} pages with {content} during the summer "
        "holiday. How many pages of the notebook are still empty?",
        ("There are {a} - {b} = {n} empty pages.",),
        _sub,
        {"content": ("drawings", "poems", "recipes", "letters", "riddles", "songs")},
    ),
    Template(
        "{name} saves {a} dollars every week for {b} weeks. Then a kind {giver} adds {c} dollars as a birthday "
        "present. How many dollars are in the money box at the end?",
        (
            "In {b} weeks {name} saves {b} x {a} = {s} dollars.",
            "With the present the box holds {s} + {c} = {n} dollars.",
        ),
        _mul_add,
        {"giver": ("grandmother", "uncle", "neighbor", "grandfather")},
    ),
    Template(
        "{name} brings {a} bags to the playground, with {b} {item} in each bag. The {item} are shared fairly among "
        "{c} children. How many {item} does one child receive?",
        ("There are {a} x {b} = {s} {item}.", "One child receives {s} / {c} = {n} {item}."),
        _mul_div,
        {"item": ("marbles", "grapes", "blocks", "cherries", "peanuts", "strawberries")},
    ),
    Template(
        "{name} has {a} trays with {b} seedlings in each tray. {She} plants {c} more seedlings, but {d} dry out in "
        "the heat. How many healthy seedlings does {she} have now?",
        (
            "The trays hold {a} x {b} = {s} seedlings.",
            "Planting more gives {s} + {c} = {t}.",
            "After the heat {t} - {d} = {n} are healthy.",
        ),
        _mul_add_sub,
    ),
    Template(
        "Every day {name} does {a} {move} before breakfast and {b} {move} before dinner. {She} keeps this up for "
        "{c} days in a row. How many {move} is that altogether?",
        ("In one day {name} does {a} + {b} = {s} {move}.", "In {c} days that makes {c} x {s} = {n} {move}."),
        _add_mul,
        {"move": ("jumps", "squats", "stretches", "cartwheels")},
    ),
    Template(
        "A {toy} costs {a} dollars, but today it is {b} dollars cheaper. {name} buys {c} of them at the new price "
        "as presents. How many dollars does {name} spend?",
        ("Today a {toy} costs {a} - {b} = {s} dollars.", "For {c} of them {name} spends {c} x {s} = {n} dollars."),
        _sub_mul,
        {"toy": ("puppet", "kite", "puzzle", "doll", "toy car", "ball")},
    ),
    Template(
        "{name} cuts a {thing} of {a} meters into {b} equal pieces. From one piece {she} then trims off {c} meters. "
        "How long is that piece now, in meters?",
        ("Each piece is {a} / {b} = {s} meters long.", "After trimming it is {s} - {c} = {n} meters long."),
        _div_sub,
        {"thing": ("rope", "ribbon", "cable", "hose")},
    ),
    Template(
        "There are {a} boys and {b} girls waiting in front of the {place} where {name} sells tickets. Each child "
        "needs exactly one ticket. How many tickets does {name} sell?",
        ("There are {a} + {b} = {n} children, so {name} sells {n} tickets.",),
        _add,
        {"place": ("museum", "zoo", "circus", "pool", "castle")},
    ),
    Template(
        "{name} and some friends sell {a} {item} for {b} dollars each. They pay {c} dollars for the material and "
        "split the rest equally among {d} people. How many dollars does each person get?",
        (
            "They earn {a} x {b} = {s} dollars.",
            "After paying they keep {s} - {c} = {t} dollars.",
            "Each person gets {t} / {d} = {n} dollars.",
        ),
        _mul_sub_div,
        {"item": ("bracelets", "scarves", "candles", "baskets", "masks")},
    ),
    Template(
        "{name} keeps {item} in a jar. There were {a} at first, then {she} traded {b} away and won {c} in a game. "
        "How many {item} does the jar hold now?",
        ("After the trade there are {a} - {b} = {s} {item}.", "After the game the jar holds {s} + {c} = {n}."),
        _sub_add,
        {"item": ("marbles", "buttons", "beads", "pebbles", "coins", "dice")},
    ),
    Template(
        "A baker named {name} packs {a} rolls into bags of {b} rolls each. There are also {c} bags of bread from "
        "yesterday on the counter. How many bags are there altogether?",
        ("The rolls fill {a} / {b} = {s} bags.", "With the bread there are {s} + {c} = {n} bags."),
        _div_add,
    ),
    Template(
        "The way to {place} is {a} kilometers long. {name} cycles there and back again on each of {b} days. "
        "How many kilometers does {she} cycle in that time?",
        ("There and back is 2 x {a} = {s} kilometers.", "In {b} days {she} cycles {b} x {s} = {n} kilometers."),
        _double_mul,
        {"place": ("school", "work", "the office", "the stable", "the market")},
    ),
    Template(
        "{name} has {a} {item} and hands half of them to {friend}. The next day an aunt sends {name} {c} new {item}. "
        "How many {item} does {name} have in the end?",
        ("Half of the {item} is {a} / 2 = {s}.", "With the new ones {name} has {s} + {c} = {n} {item}."),
        _half_add,
        {"item": ("stamps", "stickers", "postcards", "ribbons", "badges", "pencils")},
    ),
)

TEST_TEMPLATES: tuple[Template, ...] = (
    Template(
        "A {place} has {a} rows, and each row offers {b} seats. Tonight {c} seats stay unsold. "
        "{name} looks around from the door. How many seats are taken?",
        ("All rows together offer {a} x {b} = {s} seats.", "Since {c} are unsold, {s} - {c} = {n} seats are taken."),
        _mul_sub,
        {"place": ("theater", "cinema", "concert hall", "tent")},
    ),
    Template(
        "The library lends {name} {a} {item} in spring and another {b} in autumn. By winter {c} of those have been "
        "brought back. How many is {name} keeping at home?",
        ("{name} borrowed {a} + {b} = {s} {item}.", "With {c} returned, {she} keeps {s} - {c} = {n}."),
        _add_sub,
        {"item": ("comics", "novels", "films", "songbooks")},
    ),
    Template(
        "Coach {name} wants to form teams for a {event}. Exactly {a} children have signed up, and every team must "
        "consist of {b} children. How many teams can be formed?",
        ("The coach can form {a} / {b} = {n} teams.",),
        _div,
        {"event": ("relay race", "quiz night", "ball game", "treasure hunt")},
    ),
    Template(
        "Workers are laying tiles on the floor of {name}'s {room}. They put down {a} tiles along the wall and repeat "
        "such a line {b} times. What number of tiles do they lay?",
        ("They lay {b} lines of {a} tiles, which takes {b} x {a} = {n} tiles.",),
        _mul,
        {"room": ("kitchen", "bathroom", "hallway", "cellar", "workshop")},
    ),
    Template(
        "{name} needs {c} points to win a {prize} at the fair. So far {she} has hit {a} targets worth {b} points "
        "apiece. How many points are missing?",
        ("The targets gave {a} x {b} = {s} points.", "So {c} - {s} = {n} points are missing."),
        _take_product,
        {"prize": ("teddy bear", "medal", "cup", "plush tiger", "board game")},
    ),
    Template(
        "A hotel has {a} rooms for {b} guests each, and {c} rooms for {d} guests each. Tonight {name}, the manager, "
        "reports that all of them are full. What is the number of guests?",
        (
            "The first rooms take {a} x {b} = {s} guests, the others {c} x {d} = {t}.",
            "The hotel has {s} + {t} = {n} guests.",
        ),
        _two_products,
    ),
    Template(
        "{name}'s {color} kite used {a} meters of string, while the kite of {friend} used {b} meters more. "
        "What length of string, in meters, did the two kites need?",
        ("The second kite used {a} + {b} = {s} meters.", "Both kites needed {a} + {s} = {n} meters of string."),
        _more_total,
        {"color": ("red", "blue", "green", "yellow", "purple")},
    ),
    Template(
        "{name} mixes {a} liters of {juice} juice with {b} liters of water for a school fair. The drink is poured "
        "into jugs of {c} liters. How many full jugs stand ready?",
        ("The mix is {a} + {b} = {s} liters.", "This fills {s} / {c} = {n} jugs."),
        _add_div,
        {"juice": ("apple", "cherry", "lemon", "orange", "grape")},
    ),
    Template(
        "A truck carries {a} sacks of {load}. The driver, {name}, drops {b} sacks at the mill and brings equal loads "
        "of the rest to {c} farms. How many sacks reach each farm?",
        ("After the mill, {a} - {b} = {s} sacks are on the truck.", "Every farm gets {s} / {c} = {n} sacks."),
        _sub_div,
        {"load": ("grain", "seed", "corn", "oats", "barley")},
    ),
    Template(
        "{name}'s younger {animal} weighs {a} kilograms. The older {animal} weighs {b} times that much. Both animals "
        "climb on a scale at the vet. What weight in kilograms does it show?",
        ("The older {animal} weighs {b} x {a} = {s} kilograms.", "The scale shows {a} + {s} = {n} kilograms."),
        _times_total,
        {"animal": ("dog", "goat", "sheep", "pig")},
    ),
    Template(
        "A candle is {a} centimeters tall when {name} lights it. It burns down {b} centimeters on the first evening "
        "and {c} centimeters on the second. How tall, in centimeters, is it afterwards?",
        ("After one evening it measures {a} - {b} = {s}.", "After the next it is {s} - {c} = {n} centimeters tall."),
        _sub_sub,
    ),
    Template(
        "A {machine} makes {a} {product} in {b} minutes and keeps a steady speed. {name} leaves it running for {c} "
        "minutes. How many {product} come out of it in that time?",
        ("Per minute it makes {a} / {b} = {s} {product}.", "During {c} minutes it makes {c} x {s} = {n} {product}."),
        _div_mul,
        {"machine": ("machine", "small robot", "clever device"), "product": ("copies", "screws", "labels", "buttons")},
    ),
    Template(
        "Each gift basket made by {name} contains {a} {fruit} and {b} pears. A company orders {c} baskets for its "
        "staff. How many pieces of fruit must {name} get ready?",
        ("A basket contains {a} + {b} = {s} pieces.", "The order needs {c} x {s} = {n} pieces of fruit."),
        _add_mul,
        {"fruit": ("apples", "oranges", "peaches", "plums", "kiwis")},
    ),
    Template(
        "A ship has {a} decks and carries {b} {cargo} on each deck. In the harbor {c} {cargo} come aboard and {d} "
        "leave. With how many {cargo} does Captain {name} sail away?",
        (
            "The ship arrives with {a} x {b} = {s} {cargo}.",
            "Then it has {s} + {c} = {t}.",
            "It sails away with {t} - {d} = {n} {cargo}.",
        ),
        _mul_add_sub,
        {"cargo": ("cars", "trucks", "containers", "crates")},
    ),
    Template(
        "{name} sets {flower} in {a} flower beds, {b} in every bed, and {c} extra {flower} around an old tree. "
        "How many {flower} will bloom if all of them grow well?",
        ("The beds have {a} x {b} = {s} {flower}.", "Adding the tree, {s} + {c} = {n} {flower} will bloom."),
        _mul_add,
        {"flower": ("tulips", "roses", "lilies", "daisies", "poppies")},
    ),
    Template(
        "A film crew led by {name} shoots {a} scenes a day for {b} days. The editor cuts these scenes into {c} "
        "episodes of equal size. How many scenes does an episode have?",
        ("The crew shoots {b} x {a} = {s} scenes.", "So an episode has {s} / {c} = {n} scenes."),
        _mul_div,
    ),
    Template(
        "In the morning a parking garage holds {a} {kind}. Before lunch {b} of those drive out, and after lunch {c} "
        "others drive in. How many {kind} does {name}, the guard, see at closing time?",
        ("By lunch {a} - {b} = {s} {kind} are parked.", "At closing time the guard sees {s} + {c} = {n} {kind}."),
        _sub_add,
        {"kind": ("cars", "vans", "trucks", "motorbikes")},
    ),
    Template(
        "A hiking trail goes {a} kilometers through forest, {b} kilometers over hills and {c} kilometers along a "
        "{water}. {name} walks the whole trail. What distance in kilometers is this?",
        ("Forest and hills make {a} + {b} = {s} kilometers.", "The whole trail is {s} + {c} = {n} kilometers."),
        _add_add,
        {"water": ("river", "lake", "beach", "canal", "stream")},
    ),
    Template(
        "A {show} ticket is {a} dollars for adults, and students pay {b} dollars less. {name} orders tickets for {c} "
        "students of the music class. What is the bill in dollars?",
        ("A student pays {a} - {b} = {s} dollars.", "The bill is {c} x {s} = {n} dollars."),
        _sub_mul,
        {"show": ("concert", "ballet", "musical", "puppet show")},
    ),
    Template(
        "{name} has {a} old photos to glue into an album. On every page there is space for {b} photos. Besides, "
        "{c} pages of maps go in. How many pages must the album have?",
        ("The photos take {a} / {b} = {s} pages.", "With the maps the album must have {s} + {c} = {n} pages."),
        _div_add,
    ),
)

TEMPLATES: dict[str, tuple[Template, ...]] = {"train": TRAIN_TEMPLATES, "test": TEST_TEMPLATES}


# --- generator -----------------------------------------------------------------------------------------------------


def word_problems(split: Literal["train", "test"], n: int, seed: int = 42) -> list[dict[str, str]]:
    """``n`` distinct word problems ``{"question": str, "answer": str}``, the answer ending in a line ``#### n``.

    The same arguments give the same rows, and a larger ``n`` starts with the rows of a smaller one.
    Raises ValueError for an unknown split, for ``n`` < 1, and where the split has fewer than ``n`` problems.
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
    while True:
        # Every round takes each template once, so that all skills are about equally frequent in any prefix.
        for template in rng.sample(templates, len(templates)):
            row = template.render(rng)
            if row["question"] not in seen:
                seen.add(row["question"])
                repeats = 0
                yield row
                continue
            repeats += 1
            if repeats >= MAX_REPEATS:
                return
