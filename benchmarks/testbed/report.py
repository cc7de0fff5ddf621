"""Tables and picture of a study: what was chosen on some base models, and how it does on the others."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from testbed.frontier import AXES, Estimate, ahead, lead, mean, over_bases
from testbed.setting import Setting
from testbed.skills import OTHERS

SFT, LORA = "SFT", ", LoRA"  # as Setting.method names them


@dataclass
class Study:
    """All finished settings of a folder.

    Args:
        values: setting -> measure -> `(bases, draws)`.
        untouched: target, reworded and others of the base models, `(bases, 3)`.
        choosing: how many bases, the first ones, choose settings; the others report.
        machine: what it ran on.
    """

    values: dict[Setting, dict[str, np.ndarray]]
    untouched: np.ndarray
    choosing: int
    machine: str

    @classmethod
    def read(cls, path: Path, entries: Iterable[dict[str, Any]]) -> Study:
        """From `runs.jsonl`, whose first line tells of the bases."""
        head = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
        found = head["bases"]
        old = np.mean([found[name] for name in OTHERS], 0)
        untouched = np.stack([found["target"], found["reworded"], old], 1)
        shaped = lambda runs: {name: np.reshape(list_, (len(untouched), -1)) for name, list_ in runs.items()}
        values = {Setting.from_json(entry["setting"]): shaped(entry["runs"]) for entry in entries}
        return cls(values, untouched, max(1, len(untouched) // 3), head["machine"])

    def take_sft(self, other: Study) -> None:
        """The plain SFT of another folder, too, on the base models and draws that both have."""
        shape = lambda study: next(iter(study.values.values()))["target"].shape
        bases, draws = map(min, zip(shape(self), shape(other)))
        if not np.allclose(other.untouched[:bases], self.untouched[:bases], atol=1):
            raise SystemExit("error: --sft names a study of other base models")
        plain = {s: r for s, r in other.values.items() if s.method in (SFT, SFT + LORA) and s not in self.values}
        cut = lambda runs: {name: v[:bases, :draws] for name, v in runs.items()}
        self.values = {s: cut(runs) for s, runs in (self.values | plain).items()}
        self.untouched, self.choosing = self.untouched[:bases], max(1, bases // 3)
        self.machine += f"; SFT: {other.machine}"

    def points(self, setting: Setting) -> np.ndarray:
        """Its three axes, `(bases, 3)`, per cent."""
        return np.stack([self.values[setting][axis].mean(1) for axis in AXES], 1)

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers of rows for which there is a plain SFT."""
        return sorted({s.rows for s in self.values if s.method == SFT})

    def of(self, rows: int, method: str) -> list[Setting]:
        """The finished settings of one method."""
        return [s for s in self.values if s.rows == rows and s.method == method]

    def plain(self, rows: int, method: str) -> list[Setting]:
        """The SFT that a method is held to: of all weights and of a LoRA, whatever the method trains.

        SFT of a LoRA itself is held to that of all weights.
        """
        return self.of(rows, SFT) + (self.of(rows, SFT + LORA) if method not in (SFT, SFT + LORA) else [])

    def surface(self, rows: int, method: str) -> np.ndarray:
        """All that this SFT reaches, no training at all included: `(bases, settings, 3)`."""
        return np.stack([self.untouched, *(self.points(s) for s in self.plain(rows, method))], 1)

    def methods(self, rows: int) -> list[str]:
        """All but SFT of all weights, in the order in which they were run."""
        return [m for m in dict.fromkeys(s.method for s in self.values if s.rows == rows) if m != SFT]

    def chosen(self, rows: int, method: str) -> Setting:
        """The setting that is furthest ahead of SFT on the choosing bases."""
        surface = self.surface(rows, method)[: self.choosing].mean(0)
        return max(self.of(rows, method), key=lambda s: lead(self.points(s)[: self.choosing].mean(0), surface))

    def balanced(self, settings: Iterable[Setting]) -> Setting:
        """The one with the highest mean of the three axes on the choosing bases."""
        return max(settings, key=lambda s: self.points(s)[: self.choosing].mean())

    def lead(self, setting: Setting, first: int = 0) -> Estimate:
        """How far ahead of all that SFT reaches, in all three axes, on the base models from `first` on."""
        return over_bases(lambda v: lead(v[0], v[1:]), self._beside_sft(setting)[first:])

    def held(self, setting: Setting) -> tuple[Estimate, list[Estimate]]:
        """On the reporting bases: how far ahead in all three axes, and in each at equal values of the other two."""
        both = self._beside_sft(setting)[self.choosing :]
        on = lambda axis: over_bases(lambda v: ahead(v[0], v[1:], axis), both)
        return self.lead(setting, self.choosing), [on(axis) for axis in range(3)]

    def _beside_sft(self, setting: Setting) -> np.ndarray:
        """Its points in front of SFT's: `(bases, 1 + settings, 3)`."""
        return np.concatenate([self.points(setting)[:, None], self.surface(setting.rows, setting.method)], 1)


def write(folder: Path, study: Study) -> None:
    """`surface.md`, `balanced.md`, `methods.md`, `paired.md` and `frontier.png` in the folder."""
    from testbed.picture import draw

    for table in (surface, balanced, methods, paired):
        path = folder / f"{table.__name__}.md"
        path.write_text(table(study), encoding="utf-8")
        print(path)
    draw(study, folder / "frontier.png")
    print(folder / "frontier.png")


def surface(study: Study) -> str:
    """What plain SFT reaches, all bases: a row a length and size, a column a rate."""
    parts = [f"{study.machine}; means over {len(study.untouched)} base models: target, reworded, others.\n"]
    for method in (SFT, SFT + LORA):
        rates = sorted({s.rate for s in study.values if s.method == method})
        lines = [f"| rows | updates | {' | '.join(f'{rate:g}' for rate in rates)} |", "| --- " * (len(rates) + 2) + "|"]
        for rows in study.sizes:
            cells: dict[int, dict[float, str]] = defaultdict(dict)
            for s in study.of(rows, method):
                cells[s.steps][s.rate] = ", ".join(f"{x:.1f}" for x in study.points(s).mean(0))
            for steps in sorted(cells):
                lines.append(f"| {rows} | {steps} | {' | '.join(cells[steps].get(rate, '') for rate in rates)} |")
        parts += [f"{method}:\n", *lines, ""] if rates else []
    return "\n".join(parts)


def balanced(study: Study) -> str:
    """Each method at its best mean of the three axes, against SFT at its own best: chosen and reported as ever."""
    head = "| rows | method | chosen | of | target | reworded | others | mean - SFT's | target | reworded | others |"
    lines, count = [head, "| --- " * 11 + "|"], 0
    for rows in study.sizes:
        scored = []
        for method in [SFT, *study.methods(rows)]:
            setting, plain = study.balanced(study.of(rows, method)), study.balanced(study.plain(rows, method))
            points = study.points(setting)[study.choosing :]
            apart = points - study.points(plain)[study.choosing :]
            cells = [method, setting.place, str(len(study.of(rows, method))), *(f"{x:.1f}" for x in points.mean(0))]
            cells += [""] * 4 if method == SFT else [str(mean(apart.mean(1))), *(str(mean(a)) for a in apart.T)]
            scored.append((apart.mean(), " | ".join(cells)))
        count += len(scored) - 1
        lines += [f"| {rows} | {text} |" for _, text in sorted(scored, reverse=True)]
    return "\n".join([_note(study, count), *lines, ""])


def methods(study: Study) -> str:
    """Each method at the setting that the choosing bases chose, as the reporting bases see it."""
    head = "| rows | method | chosen | of | target | reworded | others | ahead in all | target | reworded | others |"
    lines, count = [head, "| --- " * 11 + "|"], 0
    for rows in study.sizes:
        scored = []
        for method in study.methods(rows):
            setting = study.chosen(rows, method)
            whole, each = study.held(setting)
            points = study.points(setting)[study.choosing :].mean(0)
            cells = [f"{x:.1f}" for x in points] + [str(whole), *map(str, each)]
            scored.append(
                (whole.value, f"{method} | {setting.place} | {len(study.of(rows, method))} | {' | '.join(cells)}")
            )
        count += len(scored)
        lines += [f"| {rows} | {text} |" for _, text in sorted(scored, reverse=True)]
    return "\n".join([_note(study, count), *lines, ""])


def _note(study: Study, count: int) -> str:
    kept = len(study.untouched) - study.choosing
    return f"{study.machine}; chosen on {study.choosing} base models, reported on {kept} others; {count} comparisons.\n"


def paired(study: Study) -> str:
    """Every setting: its difference to SFT of the same rate, length, base and draw, and its lead over all of SFT."""
    names = (*AXES, "nll_train", "moved", "rank")
    apart = [*(f"{a} - SFT" for a in AXES), "ahead in all"]
    lines = [f"| rows | method | setting | {' | '.join([*names, *apart])} |"]
    lines.append("| --- " * (3 + len(names) + len(apart)) + "|")
    for s in sorted(study.values, key=lambda s: (s.rows, s.method != SFT, s.method, s.steps, s.rate)):
        values = study.values[s]
        cells = [f"{values[n].mean():.3f}" if n == "nll_train" else f"{values[n].mean():.1f}" for n in names]
        plain = replace(Setting(s.rows, s.steps, s.rate), lora=s.lora)
        if plain in study.values and plain != s:
            for axis in AXES:
                difference = (values[axis] - study.values[plain][axis]).mean(1)
                cells.append(f"{mean(difference)} ({(difference > 0).sum()} of {len(difference)})")
        else:
            cells += [""] * 3
        cells.append("" if s.method == SFT else str(study.lead(s)))
        lines.append(f"| {s.rows} | {s.method} | {s.place} | {' | '.join(cells)} |")
    note = f"{study.machine}; {len(study.untouched)} base models, 95 % intervals over them.\n"
    return "\n".join([note, *lines, ""])
