"""What a comparison found, as the template `verdict.md.j2` tells it: which axes a setting is ahead on, and how sure."""

from collections.abc import Mapping
from typing import Any

from lfu.report.metric_text import by_axis, change, metrics_in, told, turn
from lfu.report.text import and_
from lfu.study.metrics import Metric


def facts(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the template asks for beside the results."""
    metrics, best = metrics_in(results), results["recommended"]
    losses = [one["loss"] for one in results["validation"].get("settings", {}).values()]
    ahead = results["ahead"] or {"comparisons": 0, "settings": {}}
    found = {
        "ahead": [
            f"{label} is {by_axis(metrics, dict.fromkeys(changes, 1), changes)}"
            for label, changes in ahead["settings"].items()
            if not best or label != best["candidate"]  # of which the first sentence tells
        ],
        "comparisons": ahead["comparisons"] if ahead["comparisons"] > len(metrics) else 0,  # of more than one setting
        "sft": _sft,
        "runs": results["runs"],
        "failed": [run for run in results["runs"] if run["state"] == "failed"],
        "judged": sum(loss is not None for loss in losses),
        "yardsticks": _yardsticks(results, metrics),
    }
    if not best:
        return found
    turns = dict.fromkeys(best["better"], 1) | dict.fromkeys(best["worse"], -1) | dict.fromkeys(best["same"], 0)
    against = {key: each.get(best["candidate"]) for key, each in results["modes"][best["mode"]]["against_sft"].items()}
    second = best["runner_up"]
    return found | {
        "axes": by_axis(metrics, turns, against | {key: best["sure"][key] for key in best["better"]}),
        "behind": change(Metric("", "", "nll", "", -1, 0), second) if second else "",
        "level": 100 * next((one["level"] for one in best["sure"].values()), 0.95),
        "same_time": _same_time(results, metrics, best["candidate"]),
    }


def _sft(label: str) -> str:
    return "plain SFT" + label.removeprefix("sft")


def _same_time(results: Mapping[str, Any], metrics: Mapping[str, Metric], label: str) -> str:
    """How the recommended setting compares in the time that plain SFT took; empty where that was not tried."""
    time = results["modes"].get("time") if len(results["modes"]) > 1 else None
    changes = {key: each[label] for key, each in time["against_sft"].items() if label in each} if time else {}
    return by_axis(metrics, {key: turn(metrics[key], interval) for key, interval in changes.items()}, changes)


def _yardsticks(results: Mapping[str, Any], metrics: Mapping[str, Metric]) -> list[tuple[str, str, str, bool]]:
    """(plain SFT's name, what it learned, what it forgot, whether that was measured), against the untouched model: was
    there anything to save? The first three."""
    against: Mapping[str, Any] = next((mode["against_untouched"] for mode in results["modes"].values()), {})
    found = []
    for label in [label for label, one in results["settings"].items() if one["yardstick"] == label]:
        changes = {key: each[label] for key, each in against.items() if label in each}
        kept = [key for key in changes if metrics[key].group == "kept"]
        lost = [told(metrics[key], changes[key]) for key in kept if turn(metrics[key], changes[key]) < 0]
        name = _sft(label)[0].upper() + _sft(label)[1:]
        learned = told(metrics["loss"], changes["loss"]) if "loss" in changes else "not measured"
        if changes:
            found.append((name, learned, and_(lost), bool(kept)))
    return found[:3]
