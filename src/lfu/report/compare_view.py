"""The report of `lfu compare` and `lfu sweep`: which method, how sure, at what cost, and what was alike."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from lfu.report import compare_figures as figures
from lfu.report.blocks import Block, Heading, Items, Paragraph, Table, View
from lfu.report.compare_text import change, heading, mean_and_spread, meaning, value
from lfu.report.compare_verdict import WORDS, verdict
from lfu.report.text import and_
from lfu.study.kinds import turn

UNSTEADY = 0.5  # distance of the quartiles of a run's step times over their median, from which ratios are rough
MODES = {"steps": "Equal steps", "time": "Equal time"}


def view(record: Mapping[str, Any]) -> View:
    """The report, from the record alone."""
    results = record["results"]
    blocks: list[Block] = []
    modes = {mode: found for mode, found in results["modes"].items() if found["cost"]}
    for mode, found in modes.items():
        blocks += _results(results, mode, found)
    for mode, found in modes.items():
        blocks += _steadiness(results, mode, found)
    if results["collapse"]:
        blocks += _collapse(results["collapse"])
    if results["search"]:
        blocks += [Heading("Learning rates"), _search_table(results)]
    for mode, found in modes.items():
        blocks += _training_and_cost(results, mode, found)
    blocks += _fairness(results)
    blocks += _runs(results)
    blocks += _commands(record)
    model, verb = record["settings"]["model"], record["settings"]["verb"]
    title = "Which strength?" if verb == "sweep" else "Which method?"
    return View(f"{title} {_short(model)}", verdict(record), [block for block in blocks if block is not None])


def _of_mode(what: str, results: Mapping[str, Any], mode: str) -> str:
    """A heading or caption; of the second mode with its name."""
    return what if mode == next(iter(results["modes"])) else f"{what}, {MODES[mode].lower()}"


def _file(stem: str, results: Mapping[str, Any], mode: str) -> str:
    """A picture's file name; of the second mode with its name."""
    return stem if mode == next(iter(results["modes"])) else f"{stem}-{mode}"


def _short(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2] or model


# --- results ---------------------------------------------------------------------------------------------------------


def _results(results: Mapping[str, Any], mode: str, found: Mapping[str, Any]) -> list[Any]:
    blocks: list[Any] = [Heading(MODES[mode])]
    if mode == "time":
        blocks.append(
            Paragraph(
                "Every setting trains for as long as plain SFT did: as many steps as its measured time of a step "
                "allows, with a schedule fitted to them. One-off costs of a method are not counted: see "
                f"{_of_mode('Cost', results, mode)}, with the seconds that training took in the end."
            )
        )
    if results["metrics"]:
        blocks += [_values_table(results, found), figures.gain_against_kept(results, found, f"gain-and-kept-{mode}")]
        blocks += [
            figures.sweep(results, found, f"sweep-{mode}"),
            *_differences_tables(results, found),
            _changes_table(found),
        ]
    return blocks if mode == "steps" or results["metrics"] else []


def _values_table(results: Mapping[str, Any], found: Mapping[str, Any]) -> Table:
    metrics, ranks = results["metrics"], found["ranks"].get("average", {})
    labels, counts = list(next(iter(found["values"].values()))), _seed_counts(found)
    rows = [["untouched", *(value(metric, results["untouched"][key]) for key, metric in metrics.items())]]
    for label in labels:
        rows.append([label, *(mean_and_spread(m, found["values"][key][label]) for key, m in metrics.items())])
    if ranks:  # in front, where a narrow page shows it
        rows = [[row[0], f"{ranks[row[0]]:.1f}" if row[0] in ranks else "-", *row[1:]] for row in rows]
    rows = [[_with_count(row[0], counts), *row[1:]] for row in rows]
    seeds = max(counts.values())
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    over += " where no other number is given" if len(set(counts.values())) > 1 else ""
    return Table(
        ["", *(["rank"] if ranks else []), *(heading(metric) for metric in metrics.values())], rows,
        caption=f"Results, {over}",
        note=f"↑ more is better, ↓ less. {'; '.join(meaning(metric) for metric in metrics.values())}."
        f"{_about_rank(found['ranks'])}{_of_unequal_seeds(found, counts)}",
    )  # fmt: skip


def _about_rank(ranks: Mapping[str, Any]) -> str:
    if not ranks:
        return ""
    return (
        " rank: the ranks by column (1 is best; ties share the better place), their mean by category "
        f"({_listed(ranks['by_category'])}), and the mean of these; it says nothing about size or noise."
    )


def _seed_counts(found: Mapping[str, Any]) -> dict[str, int]:
    """Label -> how many seeds are finished."""
    return {label: len(one["seeds"]) for label, one in next(iter(found["values"].values())).items()}


def _with_count(label: str, counts: Mapping[str, int]) -> str:
    """A row's name, with its seeds where others have more."""
    count = counts.get(label)
    if count is None or count == max(counts.values()):
        return label
    return f"{label} ({count} seed{'s' if count > 1 else ''})"


def _of_unequal_seeds(found: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """What a row with fewer seeds is left out of."""
    told = ""
    if found["failed"]:
        told += f" Not ranked, and not recommended: {and_(found['failed'])}, as a run failed."
    ranked = found["ranks"].get("seeds", [])
    if any(count != len(ranked) for label, count in counts.items() if label not in found["failed"]) and ranked:
        told += f" Ranked over the seeds that all have finished ({_listed(ranked)})."
    return told


def _differences_tables(results: Mapping[str, Any], found: Mapping[str, Any]) -> list[Table]:
    """Against plain SFT; of what has no plain SFT to be compared with, which is plain SFT itself, against the
    untouched model."""
    settings = results["settings"]
    flags = any(one["against"] not in ("sft", "untouched") for one in settings.values())
    told = " with the same training flags; plain SFT with flags of its own: against that without" if flags else ""
    alone = {
        key: {label: interval for label, interval in each.items() if settings[label]["against"] == "untouched"}
        for key, each in found["against_untouched"].items()
    }
    counts = _seed_counts(found)
    tables = [
        _differences_table(results["metrics"], found["against_sft"], f"plain SFT{told}", counts),
        _differences_table(results["metrics"], alone, "the untouched model", counts),
    ]
    return [table for table in tables if table is not None]


def _differences_table(
    metrics: Mapping[str, Any], changes: Mapping[str, Any], to: str, counts: Mapping[str, int]
) -> Table | None:
    labels = list(dict.fromkeys(label for each in changes.values() for label in each))
    if not labels:
        return None
    rows = []
    for label in labels:
        cells = []
        for key, metric in metrics.items():
            interval = changes[key].get(label)
            cells.append(_cell(metric, interval) if interval else "-")
        rows.append([_with_count(label, counts), *cells])
    count = len(labels) * len(metrics)
    return Table(
        ["", *(f"{metric['title']} ({metric['items']})" for metric in metrics.values())], rows,
        caption=f"Difference to {to} [95 % interval]",
        note="better, worse: beyond the noise; no word: neither. On the same seeds and items: a bootstrap over the "
        "items, Student's t for the seeds; in brackets how many items. Perplexity in per cent. Of "
        f"{count} such intervals about {count / 20:.1g} leave out the truth by chance.",
    )  # fmt: skip


def _cell(metric: Mapping[str, Any], interval: Mapping[str, Any]) -> str:
    middle, _, ends = change(metric, interval).partition(" ")
    word = WORDS[turn(metric, interval)]
    return "\n".join([middle, ends, *([word] if word else [])])


def _changes_table(found: Mapping[str, Any]) -> Table | None:
    names = ("kept", "lost", "gained", "never")
    rows = [
        [f"{name}: {label}", *(f"{counts[what]:.1f}" for what in names)]
        for name, each in found["changes"].items()
        for label, counts in each.items()
    ]
    if not rows:
        return None
    return Table(
        ["", *names], rows, caption="Questions against the untouched model, mean over the seeds",
        note="lost: right before, wrong now; gained: the reverse; never: wrong both times.",
    )  # fmt: skip


def _steadiness(results: Mapping[str, Any], mode: str, found: Mapping[str, Any]) -> list[Any]:
    pictures = [
        figures.wording(results, found, _file("wording", results, mode)),
        figures.noise(results, found, _file("noise", results, mode)),
    ]
    return [Heading(_of_mode("Steadiness", results, mode)), *pictures] if any(pictures) else []


def _collapse(found: Mapping[str, Any]) -> list[Any]:
    rows = [
        [text, "no finite number" if one["loss"] is None else f"{one['loss']:.3f}", "yes" if one["collapsed"] else "no"]
        for text, one in found["tried"].items()
    ]
    bar, sft = ("-" if found[name] is None else f"{found[name]:.3f}" for name in ("untouched", "sft"))
    rows.append(["plain SFT", sft, "-"])
    table = Table(
        [found["name"], "loss on the validation rows", "collapsed"], rows,
        note=f"Collapsed: above the untouched model's {bar}, or no finite number. Plain SFT: at the same learning "
        "rate and steps. First seed; both ends, then halvings "
        "of the bracket on a logarithmic scale.",
    )  # fmt: skip
    return [Heading("Collapse"), figures.collapse(found), table]


# --- training --------------------------------------------------------------------------------------------------------


def _search_table(results: Mapping[str, Any]) -> Table:
    rates = list(dict.fromkeys(rate for one in results["search"].values() for rate in one["losses"]))
    rows = []
    for label, one in results["search"].items():
        cells = []
        for rate in rates:
            loss = one["losses"].get(rate)
            text = "failed" if rate in one["failed"] else "-" if loss is None else f"{loss:.3f}"
            cells.append(f"{text} *" if rate == one["chosen"] else text)
        rows.append([label, *cells])
    return Table(
        ["", *rates], rows, caption="Loss on the validation rows, by learning rate",
        note="First seed; * is chosen, for all seeds. The same were tried with every setting that names none "
        "of its own.",
    )  # fmt: skip


def _training_and_cost(results: Mapping[str, Any], mode: str, found: Mapping[str, Any]) -> list[Any]:
    rows = []
    for label, cost in found["cost"].items():
        memory = "-" if cost["peak_memory"] is None else f"{cost['peak_memory'] / 2**20:,.0f}"
        ratio = "-" if cost["ratio"] is None else f"{cost['ratio']:.2f}"
        distance = "-" if cost["distance"] is None else f"{100 * cost['distance']:.3f}"
        rows.append([
            label, f"{cost['step_seconds']:.3g}", ratio, str(cost["steps"]), f"{cost['train_seconds']:,.1f}",
            f"{cost['prepare_seconds']:,.1f}", memory, f"{cost['trainable']:,}", f"{cost['rows']:,}", distance,
        ])  # fmt: skip
    of = next((cost["memory_of"] for cost in found["cost"].values() if cost["memory_of"]), "")
    table = Table(
        ["", "per step, s", "over SFT's", "steps", "training, s", "once, s", "peak memory, MiB", "trainable", "rows",
         "weights moved, %"], rows, caption=_of_mode("Cost", results, mode),
        note="Per step: the mean over whole cycles of a run without the slowest and quickest, then the median over the "
        "seeds; the rest: medians over the seeds. once: what "
        f"comes before the first and after the last step. Memory: {of or 'not known'}, in training. weights moved: "
        "||theta - theta0|| / ||theta0||.",
    )  # fmt: skip
    curves = figures.curves(results, found, _file("training", results, mode))
    forgotten = figures.forgetting(results, found, _file("forgetting", results, mode))
    blocks: list[Any] = [Heading(_of_mode("Training and cost", results, mode)), forgotten, curves, table]
    machines = sorted({machine for cost in found["cost"].values() for machine in cost["machines"]})
    if len(machines) > 1:
        told = "; ".join(machines)
        blocks.append(Paragraph(f"The runs were made on different machines ({told}): their times can't be compared."))
    if busy := [label for label, cost in found["cost"].items() if cost["unsteady"] > UNSTEADY]:
        blocks.append(
            Paragraph(
                f"The times of a step differ much within the runs of {and_(busy)}, as they do on a busy machine: take "
                "the ratios, and what equal time means, as rough."
            )
        )
    return blocks


# --- fairness --------------------------------------------------------------------------------------------------------


def _fairness(results: Mapping[str, Any]) -> list[Any]:
    same = results["same"]
    choosing = (
        f"Chosen by: {same['validation rows']:,} validation rows and every third item of what should be kept. "
        f"Reported on: {same['test rows']:,} test rows and the other items, looked at once."
    )
    rows = []
    for label, one in results["settings"].items():
        own = ", ".join(f"{name}={text}" for name, text in one["differs"].items()) or "nothing"
        rows.append([label, one["learning_rate"] or "-", own, "\n".join(one["what"])])
    differs = Table(["", "learning rate", "config that is not plain SFT's", "what it is"], rows, caption="What differs")
    said = [
        *same["rows"],
        *_edges(results["search"]),
        *(f"Not measured: {name}, as {why}." for name, why in results["left_out"].items()),
    ]
    return [Heading("What is fair here"), *map(Paragraph, [*alike(results), choosing, *said]), differs]


def _edges(search: Mapping[str, Any]) -> list[str]:
    """A sentence for each end of the learning rates at which one was chosen."""
    said = []
    for end, direction in (("highest", "higher"), ("lowest", "lower")):
        labels = [f"{label} ({one['chosen']})" for label, one in search.items() if one["edge"] == end]
        if labels:
            said.append(
                f"The {end} learning rate that was tried is the best one for {_listed(labels)}: a {direction} one may "
                "be better still, so this comparison may not show the best that they can do."
            )
    return said


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


ALIKE = {
    "training rows": "the same {} training rows in the same order for a seed",
    "rows per step": "{} rows per step",
    "steps": "{} steps each",
    "learning rates tried": "the same learning rates tried ({})",
    "optimizer": "the optimizer {}",
    "schedule": "a schedule that is {}",
}
OWN_ROWS = {"mixture": "mixes other rows in", "answers": "rewrites their answers"}


def alike(results: Mapping[str, Any]) -> list[str]:
    """What all settings have alike, what not and which has what, and which methods change the rows."""
    settings, seeds = results["settings"], _listed(results["same"]["seeds"])
    facts = {name: {label: one["training"].get(name) for label, one in settings.items()} for name in ALIKE}
    facts["steps"] = {label: str(one["steps"]["steps"]) for label, one in settings.items() if "steps" in one["steps"]}
    same = [ALIKE[name].format(*set(each.values())) for name, each in facts.items() if len(set(each.values())) == 1]
    if "time" in results["modes"]:
        same.append(
            "the time of plain SFT's run each" + (" where time is equal" if "steps" in results["modes"] else "")
        )
    differing = {name: each for name, each in facts.items() if len(set(each.values())) > 1}
    told = [
        f"Alike for all: the same untouched model, {', '.join(same)}, the same seeds ({seeds}), and the same items of "
        "every examination."
    ]
    if differing:
        told.append(f"Not alike: {'. '.join(f'{name}: {_who_has_what(each)}' for name, each in differing.items())}.")
    for place, what in OWN_ROWS.items():
        if names := [label for label, one in settings.items() if place in one["places"]]:
            told.append(f"Of the training rows, {and_(names)} {what}.")
    return told


def _who_has_what(values: Mapping[str, str]) -> str:
    """`16 (sft data_limit=16), 64 (sft data_limit=64)`."""
    each = {value: [label for label, its in values.items() if its == value] for value in values.values()}
    return ", ".join(f"{value} ({and_(labels)})" for value, labels in each.items())


def _runs(results: Mapping[str, Any]) -> list[Any]:
    rows = []
    for run in results["runs"]:
        phase = f" in {run['phase']}" if run["phase"] else ""
        state = f"failed{phase}: {run['error']}" if run["state"] == "failed" else run["state"]
        rows.append([run["label"], str(run["seed"]), run["learning_rate"] or "-", str(run["steps"] or "-"),
                     run["level"], state, run["folder"]])  # fmt: skip
    failed = sum(run["state"] == "failed" for run in results["runs"])
    blocks: list[Any] = [
        Heading("Runs"),
        Paragraph("No run failed." if not failed else f"{failed} of {len(results['runs'])} runs failed."),
        Table(
            ["", "seed", "learning rate", "steps", "how far", "state", "folder"], rows,
            note="how far: search runs are scored on the validation rows alone, timing runs not at all. An interrupted "
            "study goes on with the same command; failed runs are then tried again.",
        ),
    ]  # fmt: skip
    notes = [
        {"run": f"{run['label']}, seed {run['seed']}", "said": "\n".join([*run["notes"], *run["advice"]])}
        for run in results["runs"]
        if run["notes"] or run["advice"]
    ]
    return [*blocks, *([Items("What the methods said", notes)] if notes else [])]


def _commands(record: Mapping[str, Any]) -> list[Any]:
    items = [
        {f"{label} ({which})": shlex.join(["lfu", "train", *words])}
        for label, one in record["results"]["settings"].items()
        for which, words in one["commands"].items()
    ]
    about = Paragraph(
        "Each of these gives one run's model, from the rows in data/ beside this report; the command of the whole "
        "study is at the end."
    )
    return [Heading("Commands"), about, Items("Every training as a command of its own", items)] if items else []
