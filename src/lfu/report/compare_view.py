"""The report of `lfu compare` and `lfu sweep`: which method, how sure, at what cost, and what was alike."""

import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from lfu.report import compare_figures as figures
from lfu.report.blocks import View
from lfu.report.compare_mode import Mode
from lfu.report.compare_verdict import facts
from lfu.report.metric_text import meaning, metrics_in
from lfu.report.template import view_of_template
from lfu.report.text import by_chance


def view(record: Mapping[str, Any]) -> View:
    results, model = record["results"], record["settings"]["model"]
    collapse, settings = results["collapse"], results["settings"]
    return view_of_template(
        "compare", record, **facts(results), figures=figures,
        model=model.rstrip("/").rpartition("/")[2] or model,
        modes=[Mode(results, name) for name, found in results["modes"].items() if found["cost"]],
        meanings="; ".join(map(meaning, metrics_in(results).values())),
        by_chance=by_chance, training=_training(results), differs=_differs(results), edges=_edges(results["search"]),
        collapse_rows=_collapse(collapse) if collapse else [], bar=_loss(collapse and collapse["untouched"]),
        search=_search(results["search"]), run_rows=_runs(results["runs"]), notes=_notes(results["runs"]),
        commands=[
            {f"{label} ({which})": shlex.join(["lfu", "train", *words])}
            for label, one in settings.items() for which, words in one["commands"].items()
        ],
        acting_on=lambda place: [label for label, one in settings.items() if place in one["places"]],
    )  # fmt: skip


def _loss(found: float | None) -> str:
    return "-" if found is None else f"{found:.3f}"


def _collapse(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [[found["name"], "loss on the validation rows", "collapsed"]]
    for text, one in found["tried"].items():
        loss = "no finite number" if one["loss"] is None else _loss(one["loss"])
        rows.append([text, loss, "yes" if one["collapsed"] else "no"])
    return [*rows, ["plain SFT", _loss(found["sft"]), "-"]]


def _search(search: Mapping[str, Any]) -> list[list[str]]:
    rates = list(dict.fromkeys(rate for one in search.values() for rate in one["losses"]))
    rows = [["", *rates]]
    for label, one in search.items():
        losses = {rate: "failed" if rate in one["failed"] else _loss(loss) for rate, loss in one["losses"].items()}
        rows.append([label, *(losses.get(rate, "-") + (" *" if rate == one["chosen"] else "") for rate in rates)])
    return rows


def _edges(search: Mapping[str, Any]) -> dict[str, str]:
    """End of the learning rates that were tried -> the settings for which it is the best."""
    at = lambda end: _listed(f"{label} ({one['chosen']})" for label, one in search.items() if one["edge"] == end)
    return {"highest": at("highest"), "lowest": at("lowest")}


def _differs(results: Mapping[str, Any]) -> list[list[str]]:
    rows = [["", "learning rate", "config that is not plain SFT's", "what it is"]]
    for label, one in results["settings"].items():
        own = _listed(f"{name}={text}" for name, text in one["differs"].items()) or "nothing"
        rows.append([label, one["learning_rate"] or "-", own, "\n".join(one["what"])])
    return rows


def _runs(runs: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["", "seed", "learning rate", "steps", "how far", "state", "folder"]]
    for run in runs:
        phase = f" in {run['phase']}" if run["phase"] else ""
        state = f"failed{phase}: {run['error']}" if run["state"] == "failed" else run["state"]
        rows.append([run["label"], str(run["seed"]), run["learning_rate"] or "-", str(run["steps"] or "-"),
                     run["level"], state, run["folder"]])  # fmt: skip
    return rows


def _notes(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    said = [(f"{run['label']}, seed {run['seed']}", "\n".join([*run["notes"], *run["advice"]])) for run in runs]
    return [{"run": name, "said": text} for name, text in said if text]


def _training(results: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """What was set for the training -> each value of it -> the settings that have it."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for label, one in results["settings"].items():
        steps = {"steps": str(one["steps"]["steps"])} if "steps" in one["steps"] else {}
        for name, value in (one["training"] | steps).items():
            found[name][value].append(label)
    return found


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
