"""Which settings are run, the most informative first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from testbed.setting import Setting

RATES = (1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3)
LORA_RATES = (3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3)
# Updates by number of rows: half, once and four times (twice at 256) the usual length.
LENGTHS: dict[int, Sequence[int]] = {4: (15, 60, 240), 16: (30, 60, 240), 64: (60, 120, 480), 256: (120, 240, 480)}


def usual(rows: int) -> int:
    """The middle length."""
    return LENGTHS[rows][1]


def small() -> list[Setting]:
    """For a look on a CPU: SFT's rates, and one or two strengths of what is worth knowing, at 16 rows."""
    at = lambda rate, **more: Setting(16, 60, rate, **more)
    return [
        *(at(rate) for rate in (2e-4, 5e-4, 1e-3)),
        *(at(1e-3, pull=w) for w in (0.003, 0.01, 0.03)),
        *(at(1e-3, share=w) for w in (0.3, 0.6)),
        *(at(rate, auxiliary="own", strength=0.5) for rate in (5e-4, 1e-3)),
        *(at(1e-3, wise=kept) for kept in (0.5, 0.7)),
    ]  # fmt: skip


def updates() -> list[Setting]:
    """One strength of the pull for every number of rows and length, each beside SFT of the same rate and length."""
    places = [(rows, steps) for rows in (64, 256, 16, 4) for steps in LENGTHS[rows]]
    return [
        s for rows, steps in places for s in (Setting(rows, steps, 1e-3, share=auto(steps)), Setting(rows, steps, 1e-3))
    ]


def auto(steps: int, at_60: float = 0.1) -> float:
    """The share that `weight=auto` ends at: it falls with the root of the updates."""
    return round(at_60 * (60 / steps) ** 0.5, 4)


def sizes() -> list[Setting]:
    """What matters most of the study, for models of another size (`--width`): 16 rows, then 64."""
    pulls = lambda rows: [
        *_each("share", tuple(auto(usual(rows), x) for x in (0.1, 0.3))),
        *_each("pull", (0.003, 0.01, 0.03)),
    ]
    found = [
        s
        for rows in (16, 64)
        for s in (
            *_surface((rows,), slice(1, 2)),
            *_at((rows,), (1e-3, 2e-3), *pulls(rows)),
            *_surface((rows,), slice(2, 3), RATES[1:5]),
            *_surface((rows,), slice(0, 1), RATES[3:]),
            *_at((rows,), (5e-4, 1e-3), dict(auxiliary="own", strength=0.5)),
        )
    ]
    return list(dict.fromkeys(found))


def sft() -> list[Setting]:
    """All that plain SFT reaches: the yardstick."""
    return [
        *_surface((256,), slice(0, 1), RATES[2:]),
        *_surface((256,), slice(2, 3), RATES[:5]),
        *_surface((4,), slice(0, 1), RATES[2:]),
        *_surface((4,), slice(2, 3), RATES[:5]),
        *_surface((4, 16, 64, 256), slice(1, 2)),
        *_surface((16, 64), slice(0, 1)),
        *_surface((16, 64), slice(2, 3), RATES[:5]),
    ]


def lora() -> list[Setting]:
    """With a LoRA for theta: SFT and the pull, 16 rows and then 64; LfU; SFT at other lengths; a long pull."""
    found: list[Setting] = []
    for rows in (16, 64):
        found += [Setting(rows, usual(rows), rate, lora=True) for rate in LORA_RATES]
        pulls = [*_each("share", tuple(auto(usual(rows), x) for x in (0.1, 0.3))), *_each("pull", (0.003, 0.01, 0.03))]
        found += _at((rows,), (1e-3, 2e-3, 5e-3), *({**pull, "lora": True} for pull in pulls))
    found += _at((16, 64), LORA_RATES[1:3], *_each("auxiliary", ("lora", "own"), lora=True, strength=0.5))
    found += [replace(s, lora=True) for s in _surface((16, 64), slice(0, 1), LORA_RATES[2:5])]
    found += [replace(s, lora=True) for s in _surface((16, 64), slice(2, 3), LORA_RATES[:3])]
    long = _each("share", (0.0, auto(240), auto(240, 0.3)), lora=True)
    found += [Setting(16, 240, rate, **variant) for rate in (2e-3, 1e-3) for variant in long]
    return list(dict.fromkeys(found))


def study() -> list[Setting]:
    """The study of docs/results.md: what decides most comes first, so that any part of it is of use."""
    found = dict.fromkeys(setting for part in PARTS for setting in part())
    return list(found)


def _surface(rows: tuple[int, ...], lengths: slice, rates: tuple[float, ...] = RATES) -> Iterator[Setting]:
    for n in rows:
        yield from (Setting(n, steps, rate) for steps in LENGTHS[n][lengths] for rate in rates)


def _at(rows: tuple[int, ...], rates: tuple[float, ...], *variants: dict[str, Any]) -> Iterator[Setting]:
    for n in rows:
        yield from (Setting(n, usual(n), rate, **variant) for variant in variants for rate in rates)


def _each(name: str, values: tuple[Any, ...], **fixed: Any) -> list[dict[str, Any]]:
    return [{**fixed, name: value} for value in values]


def _pull() -> Iterator[Setting]:
    weights = _each("pull", (0.001, 0.003, 0.01, 0.03))
    yield from _at((16, 64), (1e-3,), *weights)
    yield from _at((16, 64), (2e-3,), *_each("pull", (0.003, 0.01, 0.03)))
    yield from _at((4,), (1e-3,), *weights)
    yield from _at((256,), (1e-3,), *_each("pull", (0.0003, 0.001, 0.003, 0.01)))
    yield from _at((16, 64), (5e-4,), *_each("pull", (0.003, 0.01)))


def _share() -> Iterator[Setting]:
    shares = _each("share", (0.15, 0.3, 0.6, 1.2))
    yield from _at((16, 64, 4, 256), (1e-3,), *shares)
    yield from _at((16, 64), (2e-3,), *shares)
    yield from _at((16, 64), (1e-3,), *_each("share", (0.2, 0.5), pull_kind="current"))
    yield from _at((16, 64), (1e-3,), *_each("share", (0.3, 0.6), pull_kind="decoupled"))


def _lfu() -> Iterator[Setting]:
    for auxiliary in ("own", "lora", "steering"):
        yield from _at((16, 64), (5e-4, 1e-3), dict(auxiliary=auxiliary, strength=0.5))
    yield from _at((16, 64), (5e-4,), *_each("strength", (0.1, 1.0), auxiliary="own"))
    yield from _at((16, 64), (5e-4,), *_each("alpha", (0.03, 0.3, -0.1), auxiliary="own", strength=0.5))
    yield from _at((16, 64), (5e-4,), *_each("positions", ("prompt", "all"), auxiliary="own", strength=0.5))
    yield from _at((4,), (5e-4, 1e-3), dict(auxiliary="own", strength=0.5))
    yield from _at((16, 64), (5e-4,), *_each("layers", ((1, 2), (4, 5)), auxiliary="own", strength=0.5))


def _both() -> Iterator[Setting]:
    yield from _at((16, 64), (1e-3,), *_each("pull", (0.003, 0.01), auxiliary="own", strength=0.5))
    yield from _at((16, 64), (1e-3,), *_each("pull", (0.01,), auxiliary="own", strength=0.2, positions="prompt"))


def _anchor() -> Iterator[Setting]:
    for text in ("own", "old", "noise"):
        yield from _at((16, 64), (5e-4, 1e-3), *_each("anchor", (0.3, 3.0), anchor_text=text))
    yield from _at((16, 64), (1e-3,), *_each("anchor", (1.0, 10.0), anchor_on="hidden"))
    yield from _at((16, 64), (5e-4, 1e-3), *_each("replay", (0.1, 0.3)))


def _others() -> Iterator[Setting]:
    yield from _at((16, 64), (5e-4, 1e-3), *_each("rho", (0.02, 0.05, 0.1)))
    yield from _at((16, 64), (1e-3, 2e-3), *_each("wise", (0.4, 0.55, 0.7, 0.85)), *_each("lines", (0.0, 0.3, 0.6)))
    yield from _at((16, 64), (5e-4, 1e-3), *_each("kl", (0.02, 0.1)))


def _relatives() -> Iterator[Setting]:
    """Of L2-SP. Beside Adam the pull isn't divided by the gradient's size, so its weight is in other units."""
    yield from _at((16, 64), (1e-3,), *_each("pull", (0.003, 0.01, 0.03), pull_kind="fisher"))
    yield from _at((16, 64), (1e-3,), *_each("pull", (3.0, 10.0, 30.0), pull_kind="decoupled"))
    yield from _at((16, 64), (1e-3,), *_each("pull", (0.01, 0.03), pull_kind="fading"))
    yield from _at((16, 64), (1e-3,), *_each("pull", (0.01, 0.1), pull_kind="average"))


def _weightings() -> Iterator[Setting]:
    yield from _at((16, 64), (5e-4, 1e-3), *_each("weighting", ("dft", "eaft", "talr", "flow", "stm", "psft")))


def field() -> list[Setting]:
    """What readers ask for beside the pull, and SFT, each at two rates; of a strength, two."""
    names = ("eaft", "flow", "talr", "psft", "stm", "dft")
    asked = [*_each("weighting", names[:4]), *_each("anchor", (0.3, 3.0)), *_each("replay", (0.1, 0.3))]
    return [*_at((64, 16), (5e-4, 1e-3), {}, *asked, *_each("weighting", names[4:]))]


def _long() -> Iterator[Setting]:
    """A pull does not stop acting when training goes on: longer, weaker."""
    for rows in (16, 64):
        yield from (Setting(rows, LENGTHS[rows][2], 1e-3, pull=w) for w in (0.001, 0.003))
        yield from (Setting(rows, LENGTHS[rows][0], 1e-3, pull=w) for w in (0.003, 0.01))


PARTS: tuple[Callable[[], Iterator[Setting]], ...] = (
    lambda: _surface((16, 64), slice(1, 2)),
    _pull,
    lambda: _surface((16, 64), slice(0, 1), RATES[2:]),
    lambda: _surface((16, 64), slice(2, 3), RATES[:5]),
    lambda: _surface((4, 256), slice(1, 2)),
    _share,
    _lfu,
    _both,
    _others,
    _relatives,
    _anchor,
    _weightings,
    lambda: iter(lora()),
    _long,
    lambda: iter(sft()),
)
PLANS: dict[str, Callable[[], list[Setting]]] = {
    "small": small, "sizes": sizes, "updates": updates, "lora": lora, "field": field, "sft": sft, "study": study,
}  # fmt: skip
