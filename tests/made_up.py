"""Records of runs that were never made: what a study says of them is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from lfu.report.blocks import Table, View
from lfu.report.compare_view import view
from lfu.study.choose import compared_with
from lfu.study.plan import Plan, Run
from lfu.study.settings import Setting, with_yardsticks
from lfu.study.summary import outcome

ITEMS = 30


def made_record(
    loss: float, right: int = 20, *, validation: float | None = None, seed: int = 0, seconds: float = 1.0,
    measures: Mapping[str, Any] | None = None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A finished run: the loss of each test row (and validation row) about `loss`, `right` of the questions right."""
    jitter = [0.01 * ((i * 7 + seed) % 5 - 2) for i in range(ITEMS)]
    scores = lambda mean: {"nll": [2 * (mean + j) for j in jitter], "tokens": [2] * ITEMS}
    return {
        "measures": {
            "validation": scores(loss if validation is None else validation),
            "gain": scores(loss),
            "kept": {"knowledge": {"kind": "choice", "correct": [i < right for i in range(ITEMS)]}},
            "distance": None,
            **(measures or {}),
        },
        "steps": 3, "rows": 28, "trainable": 10, "curve": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": loss}],
        "cost": {
            "step_seconds": seconds, "unsteady": 0.0, "train_seconds": 3 * seconds, "prepare_seconds": 0.0,
            "measure_seconds": 0.0, "peak_memory": None, "memory_of": "", "machine": "here",
        },
        **more,
    }  # fmt: skip


def made_setting(text: str) -> Setting:
    """`METHOD` or `METHOD:flag=value`, without looking whether there is such a flag."""
    method, *flags = text.split(":")
    return Setting(method, shared=tuple((name, value) for name, _, value in (flag.partition("=") for flag in flags)))


def made_plan(methods: Sequence[str], seeds: int, modes: Sequence[str] = ("steps",)) -> Plan:
    """All settings and their yardsticks, at learning rate 1."""
    settings = with_yardsticks(made_setting(method) for method in methods)
    runs = {mode: {s: [Run(s, seed, "1", 3) for seed in range(seeds)] for s in settings} for mode in modes}
    return Plan(settings, rates=dict.fromkeys(settings, "1"), runs=runs)


def made_results(
    found: Mapping[str, Mapping[str, Sequence[Any]]], base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The results of a whole study.

    Args:
        found: mode -> setting, as `--methods` takes it -> the records of its seeds 0, 1, ...; None for one that failed.
    """
    methods = list(dict.fromkeys(method for each in found.values() for method in each))
    seeds = max(len(records) for each in found.values() for records in each.values())
    plan = made_plan(methods, seeds, list(found))
    gathered = {
        mode: {
            made_setting(method).label: {seed: record for seed, record in enumerate(records) if record is not None}
            for method, records in each.items()
        }
        for mode, each in found.items()
    }
    failed = [
        {"label": made_setting(method).label, "seed": seed, "state": "failed", "error": "broken", "phase": "training",
         "level": "full", "steps": 3, "learning_rate": "1", "folder": "runs/x", "notes": [], "advice": []}
        for each in found.values() for method, records in each.items()
        for seed, record in enumerate(records) if record is None
    ]  # fmt: skip
    return {
        **outcome(plan, base or made_record(2.0), gathered, {mode: {run["label"] for run in failed} for mode in found}),
        "settings": {
            s.label: {
                "method": s.method, "values": s.values, "yardstick": s.yardstick.label, "places": [],
                "training": {"training rows": "28", "rows per step": "4", "learning rates tried": "1",
                             "optimizer": "adamw", "schedule": "linear, warm-up 0"},
                "steps": dict.fromkeys(found, 3),
                "differs": {}, "what": ["a method"], "learning_rate": "1", "commands": {},
                "against": (compared_with(s, plan.settings) or Run(None)).label,
            }
            for s in plan.settings
        },
        "same": {"seeds": list(range(seeds)), "training rows": 28, "validation rows": 30, "test rows": 30, "rows": []},
        "runs": failed, "search": {}, "collapse": None, "left_out": {}, "whole": True,
    }  # fmt: skip


def made_view(results: Mapping[str, Any], *, verb: str = "compare") -> View:
    """The report on such results, without its pictures' bytes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw", "panels"):
            patch.setattr(f"lfu.report.compare_figures.{name}", lambda *_, **__: b"")
        return view({"results": results, "settings": {"model": "some/model", "verb": verb}})


def said(results: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences."""
    return list(made_view(results).verdict)


def tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """Caption -> table."""
    return {block.caption: block for block in made_view(results).blocks if isinstance(block, Table)}


def several(loss: float, right: int = 20, seeds: int = 3, **more: Any) -> list[dict[str, Any]]:
    """The records of several seeds, alike but for a little noise."""
    return [made_record(loss + 0.002 * seed, right, seed=seed, **more) for seed in range(seeds)]
