"""The pictures of a comparison, each from the record alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import MaxNLocator

from lfu.report.blocks import Figure
from lfu.report.compare_text import value
from lfu.report.figures import DASHES, GRID, MARKERS, PALETTE, draw, finish, line, row_names
from lfu.report.text import shorter
from lfu.study.kinds import KINDS

NAME = 22  # letters of a label


def looks(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Label -> colour and dashes, the same in every picture; the untouched model is grey."""
    grey, *colours = PALETTE
    found: dict[str, dict[str, Any]] = {"untouched": {"color": grey, "ls": "-"}}
    for number, label in enumerate(results["settings"]):
        dashes = DASHES[number // len(colours) % len(DASHES)]
        found[label] = {"color": colours[number % len(colours)], "ls": dashes}
    return found


def loss_of(entry: Mapping[str, Any]) -> float | None:
    """The SFT loss of a step, which methods with an own total log beside it."""
    return entry.get("lfu/sft_loss", entry.get("loss"))


def one_curve(title: str, curve: Sequence[Mapping[str, Any]]) -> bytes:
    """The training curve of one run, as PNG."""

    def paint(figure: Picture) -> None:
        axis = figure.subplots()
        points = [(entry["step"], loss) for entry in curve if (loss := loss_of(entry)) is not None]
        axis.plot(*zip(*points), lw=1.8, marker="o", ms=2.5, color="#0072b2")
        finish(axis, title, "training step", "training loss")

    return draw((6, 3.2), paint)


def gain_against_kept(results: Mapping[str, Any], mode: Mapping[str, Any], name: str) -> Figure | None:
    """A point a setting: what it learned to the right, what it kept upwards; the Pareto front is drawn through."""
    if not mode["fronts"]:
        return None
    fronts, style, metrics = mode["fronts"], looks(results), results["metrics"]
    across = min(3, len(fronts))
    down = -(-len(fronts) // across)

    def paint(figure: Picture) -> None:
        axes = figure.subplots(down, across, squeeze=False).flatten()
        for axis in axes[len(fronts) :]:
            axis.set_axis_off()
        for axis, (key, front) in zip(axes, fronts.items()):
            _scatter(axis, metrics[front["gain"]], metrics[key], mode["against_untouched"], front["front"], style)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)

    told = []
    for key, front in fronts.items():
        for label, gained in mode["against_untouched"][front["gain"]].items():
            kept = mode["against_untouched"][key][label]
            told.append(f"{label}: {_axis(metrics[front['gain']], gained):.3f}, {_axis(metrics[key], kept):.3f}")
        told.append(f"front of {metrics[key]['title']}: {', '.join(front['front'])}")
    rows = 1 + len(mode["against_untouched"][next(iter(fronts.values()))["gain"]]) // 4
    size = (min(13, 5.6 * across + 0.4), 0.6 + 3.6 * down + 0.25 * rows)
    caption = (
        "Change against the untouched model; better is right and up. Bars: 95 %, over seeds and items. The line joins "
        "the settings that no other beats on both."
    )
    return Figure(name, draw(size, paint), "; ".join(told), caption)


def _axis(metric: Mapping[str, Any], interval: Mapping[str, Any], name: str = "value") -> float:
    """The change as it is drawn: better is more."""
    return metric["sign"] * KINDS[metric["kind"]].change(interval[name])


def _scatter(
    axis: Axes, gain: Mapping[str, Any], kept: Mapping[str, Any], changes: Mapping[str, Any], front: Sequence[str],
    style: Mapping[str, Any],
) -> None:  # fmt: skip
    points = {"untouched": (0.0, 0.0)}
    axis.plot(0, 0, "s", color=style["untouched"]["color"], ms=8, label="untouched", zorder=4)
    numbers = {label: number for number, label in enumerate(style)}  # a setting's marker goes with its colour
    for label, x in changes[gain["key"]].items():
        y = changes[kept["key"]][label]
        points[label] = (_axis(gain, x), _axis(kept, y))
        colour = style[label]["color"]
        bars = [sorted(_axis(m, i, end) for end in ("low", "high")) for m, i in ((gain, x), (kept, y))]
        axis.plot(bars[0], [points[label][1]] * 2, color=colour, lw=1.2, alpha=0.6, zorder=2)
        axis.plot([points[label][0]] * 2, bars[1], color=colour, lw=1.2, alpha=0.6, zorder=2)
        marker = MARKERS[(numbers[label] - 1) % len(MARKERS)]
        axis.plot(*points[label], marker, color=colour, ms=8, label=shorter(label, NAME), zorder=4, ls="none")
    axis.plot(*zip(*(points[label] for label in front)), color="#111827", lw=1, ls="--", alpha=0.5, zorder=3)
    for draw_line in (axis.axvline, axis.axhline):
        draw_line(0, color=GRID, lw=1.2, zorder=0)
    unit = KINDS[gain["kind"]].change_unit
    word = "fall" if gain["sign"] < 0 else "rise"
    axis.set_xlabel(f"{gain['title']}: {word}, {unit} →", fontsize=10)
    word = "fall" if kept["sign"] < 0 else "rise"
    axis.set_ylabel(f"{word}, {KINDS[kept['kind']].change_unit} →", fontsize=10)
    axis.set_title(kept["title"])
    axis.xaxis.set_major_locator(MaxNLocator(6))


# Where a method acts -> what its training loss is then taken over; SFT's is over the answers of the training rows.
OWN_LOSS = {
    "token loss": "another loss of a token",
    "labels": "over the prompt, too",
    "answers": "over answers that the model rewrote",
    "mixture": "over other rows, too",
}


def own_losses(results: Mapping[str, Any], labels: Sequence[str]) -> dict[str, str]:
    """Label -> how its training loss differs from SFT's; those that can be compared with SFT's are left out."""
    places = {label: results["settings"][label]["places"] for label in labels}
    found = {label: [what for place, what in OWN_LOSS.items() if place in places[label]] for label in labels}
    return {label: ", ".join(what) for label, what in found.items() if what}


def curves(results: Mapping[str, Any], mode: Mapping[str, Any], name: str) -> Figure | None:
    """Training loss by step, mean over the seeds; losses that can't be compared with SFT's are set apart."""
    style = looks(results)
    found = {label: _mean_curve(list(seeds.values())) for label, seeds in mode["curves"].items()}
    found = {label: points for label, points in found.items() if points}
    other = own_losses(results, list(found))
    panels = [("Training loss", [label for label in found if label not in other]), ("Their own losses", list(other))]
    panels = [(title, labels) for title, labels in panels if labels]
    if not panels:
        return None

    def paint(figure: Picture) -> None:
        widths = {"width_ratios": [2, 1]} if len(panels) > 1 else None
        axes = figure.subplots(1, len(panels), squeeze=False, gridspec_kw=widths)[0]
        for axis, (title, labels) in zip(axes, panels):
            for label in labels:
                axis.plot(*zip(*found[label]), lw=1.6, label=shorter(label, NAME), **style[label])
            finish(axis, title, "training step", "nats per token" if title == "Training loss" else "")
        handles = [line for axis in axes for line in axis.get_lines()]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9
        )

    told = "; ".join(f"{label}: {points[0][1]:.3f} to {points[-1][1]:.3f}" for label, points in found.items())
    caption = "Mean over the seeds. Of LfU the SFT part; of other methods with a penalty the sum."
    if other:
        told_of = "; ".join(f"{label}: {what}" for label, what in other.items())
        caption += f" Set apart, as they can't be compared with SFT's nor with each other: {told_of}."
    size = (9, 3.6 + 0.25 * (len(found) // 4))
    return Figure(name, draw(size, paint), f"training loss, first to last step: {told}", caption)


def _mean_curve(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[int, float]]:
    points = []
    for entries in zip(*seeds):
        losses = [loss for entry in entries if (loss := loss_of(entry)) is not None]
        if losses:
            points.append((entries[0]["step"], fmean(losses)))
    return points


def forgetting(results: Mapping[str, Any], mode: Mapping[str, Any], name: str) -> Figure | None:
    """What was forgotten on the way, by training step: known answers lost less those gained, and the rise on prose."""
    found = {
        label: [
            (entries[0]["step"], {key: fmean(entry[key] for entry in entries) for key in ("net_lost", "prose_rise")})
            for entries in zip(*seeds.values())
        ]
        for label, seeds in mode["forgetting"].items()
        if seeds and all(seeds.values())
    }
    if not found:
        return None
    style = looks(results)
    panels = (("net_lost", "Known answers lost, net", 100, "%"), ("prose_rise", "Rise of the loss on prose", 1, "nats"))

    def paint(figure: Picture) -> None:
        axes = figure.subplots(1, 2)
        for axis, (key, title, scale, unit) in zip(axes, panels):
            for label, points in found.items():
                steps, values = [0, *(step for step, _ in points)], [0.0, *(scale * one[key] for _, one in points)]
                axis.plot(steps, values, lw=1.8, marker="o", ms=3.5, label=shorter(label, NAME), **style[label])
            axis.axhline(0, color=style["untouched"]["color"], lw=1, ls=":")
            finish(axis, title, "training step", unit)
            axis.set_xlim(left=0)
        axes[0].legend(frameon=False, fontsize=9)

    told = "; ".join(
        f"{label}: {100 * points[-1][1]['net_lost']:+.1f} % of known answers lost, prose "
        f"{points[-1][1]['prose_rise']:+.3f} nats" for label, points in found.items()
    )  # fmt: skip
    caption = "Measured while training, on fewer items than the tables above: up is worse. Mean over the seeds."
    return Figure(name, draw((9, 3.2), paint), f"at the last step: {told}", caption)


def noise(results: Mapping[str, Any], mode: Mapping[str, Any], name: str) -> Figure | None:
    """Cosine similarity of clean and noisy hidden states by layer."""
    if not mode["noise"]:
        return None
    style = looks(results)

    def paint(figure: Picture) -> None:
        axis = figure.subplots()
        for label, layers in mode["noise"].items():
            line(axis, list(range(1, len(layers) + 1)), layers, style[label], shorter(label, NAME))
        finish(axis, "Hidden states with and without input noise", "layer", "cosine similarity")
        _outside(axis, len(mode["noise"]))

    told = "; ".join(f"{label}: {layers[0]:.4f} to {layers[-1]:.4f}" for label, layers in mode["noise"].items())
    caption = "Noise of NEFTune's strength on the embeddings; mean over rows, draws and seeds. Higher is steadier."
    return Figure(name, draw((9, 3.8), paint), f"cosine similarity, first to last layer: {told}", caption)


def wording(results: Mapping[str, Any], mode: Mapping[str, Any], name: str) -> Figure | None:
    """A dot a prompt template and seed, a row a setting, in it a line a seed."""
    if not mode["wording"]:
        return None
    style, metric = looks(results), results["metrics"]["wording"]
    kind, found = KINDS[mode["wording"]["kind"]], mode["wording"]["templates"]
    what = "accuracy, %" if mode["wording"]["kind"] == "share" else "loss on the answers, nats per token"

    def paint(figure: Picture) -> None:
        axis = figure.subplots()
        for height, (label, templates) in enumerate(found.items()):
            colour, seeds = style[label]["color"], list(zip(*templates.values()))
            for number, found_ in enumerate(seeds):
                values = [kind.shown(v) for v in found_]
                y = height + 0.6 * ((number + 0.5) / len(seeds) - 0.5)
                axis.plot([min(values), max(values)], [y, y], color=colour, lw=1, alpha=0.5, zorder=1)
                axis.plot(values, [y] * len(values), "o", mfc="none", mec=colour, mew=1.4, ms=5, zorder=3)
                axis.plot(fmean(values), y, "|", color=colour, ms=9, mew=2.2, zorder=2)
        row_names(axis, [shorter(label, NAME) for label in found])
        axis.set_title("One circle for each wording of the prompt, one line for each seed")
        axis.set_xlabel(what)

    told = "; ".join(
        f"{label}: " + ", ".join(f"{template} {value(metric, fmean(seeds))}" for template, seeds in templates.items())
        for label, templates in found.items()
    )
    most = max(len(seeds) for templates in found.values() for seeds in templates.values())
    caption = (
        "The stroke is a seed's mean over the wordings. The closer together the circles of a line, the steadier: "
        "the wording deviation is theirs, mean over the seeds."
    )
    size = (8, 1.5 + (0.36 + 0.06 * min(most, 10)) * len(found))
    return Figure(name, draw(size, paint), f"means over the seeds: {told}", caption)


def sweep(results: Mapping[str, Any], mode: Mapping[str, Any], name: str) -> Figure | None:
    """Loss and what was kept over the one parameter that varies, or over two; None where more or none do."""
    kept = next((key for key, metric in results["metrics"].items() if metric["group"] == "kept"), None)
    keys = [key for key in ("loss", kept) if key is not None and key in results["metrics"]]
    labels = list(next(iter(mode["values"].values()), {}))
    found = [label for label in labels if _is_candidate(results, label)] or labels  # all plain SFT: a sweep of that
    grids = {label: results["settings"][label]["values"] for label in found}
    names = list(dict.fromkeys(name for values in grids.values() for name in values))
    methods = {results["settings"][label]["method"] for label in found}
    complete = all(list(values) == names for values in grids.values())
    if not keys or len(found) < 2 or len(methods) > 1 or not complete or not 1 <= len(names) <= 2:
        return None
    paint = _lines if len(names) == 1 else _maps
    told = "; ".join(
        f"{results['metrics'][key]['title']}: "
        + ", ".join(f"{label} {value(results['metrics'][key], mode['values'][key][label]['mean'])}" for label in found)
        for key in keys
    )
    size = (5.2 * len(keys) + 0.4, 3.8)
    dashed = " Dashed: plain SFT." if len(names) == 1 and methods != {"sft"} else ""
    picture = draw(size, lambda figure: paint(figure, results, mode, keys, names, grids))
    return Figure(name, picture, told, f"Means over the seeds.{dashed}")


def _is_candidate(results: Mapping[str, Any], label: str) -> bool:
    return results["settings"][label]["yardstick"] != label


def _lines(
    figure: Picture, results: Mapping[str, Any], mode: Mapping[str, Any], keys: Sequence[str], names: Sequence[str],
    grids: Mapping[str, Mapping[str, str]],
) -> None:  # fmt: skip
    for axis, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        metric = results["metrics"][key]
        kind, means = KINDS[metric["kind"]], mode["values"][key]
        places, ticks, log = _places([values[names[0]] for values in grids.values()])
        ours = [kind.shown(means[label]["mean"]) for label in grids]
        axis.plot(places, ours, "-o", color="#0072b2", lw=2, ms=5)
        theirs = [results["settings"][label]["yardstick"] for label in grids]
        if theirs != list(grids) and all(label in means for label in theirs):
            axis.plot(places, [kind.shown(means[label]["mean"]) for label in theirs], "--", color="#d55e00", lw=1.8)
        if log:
            axis.set_xscale("log")
        axis.set_title(metric["title"])
        axis.set_xlabel(names[0])
        axis.set_ylabel(kind.unit)
        axis.set_xticks(places, ticks, fontsize=9, rotation=30 if len(ticks) > 5 else 0)
        axis.minorticks_off()
        axis.grid(axis="y", color=GRID, lw=0.8)


def _places(texts: Sequence[str]) -> tuple[list[float], list[str], bool]:
    """(where the values stand, what is written there, whether the axis is logarithmic)."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return [float(i) for i in range(len(texts))], list(texts), False
    return numbers, list(texts), min(numbers) > 0 and max(numbers) / min(numbers) > 20


def _maps(
    figure: Picture, results: Mapping[str, Any], mode: Mapping[str, Any], keys: Sequence[str], names: Sequence[str],
    grids: Mapping[str, Mapping[str, str]],
) -> None:  # fmt: skip
    rows, columns = (list(dict.fromkeys(values[name] for values in grids.values())) for name in names)
    for axis, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        metric = results["metrics"][key]
        kind = KINDS[metric["kind"]]
        field = [[float("nan")] * len(columns) for _ in rows]
        for label, values in grids.items():
            field[rows.index(values[names[0]])][columns.index(values[names[1]])] = kind.shown(
                mode["values"][key][label]["mean"]
            )
        shades = ["#f3f7fb", "#8abbdc"][:: metric["sign"]]  # the better the darker
        axis.imshow(field, cmap=LinearSegmentedColormap.from_list("shades", shades), aspect="auto")
        for y, each in enumerate(field):
            for x, number in enumerate(each):
                text = "-" if number != number else f"{number:.{kind.places}f}"
                axis.text(x, y, text, ha="center", va="center", fontsize=9.5, color="#111827")
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_xlabel(names[1])
        axis.set_ylabel(names[0])
        axis.set_title(f"{metric['title']}, {kind.unit}", fontsize=11)
        axis.tick_params(length=0)


def collapse(found: Mapping[str, Any]) -> Figure | None:
    """Loss on the validation rows over the bisected parameter."""
    tried = {float(text): one for text, one in found["tried"].items() if one["loss"] is not None}
    if not tried:
        return None

    def paint(figure: Picture) -> None:
        axis = figure.subplots()
        axis.plot(list(tried), [one["loss"] for one in tried.values()], "-", color="#9ca3af", lw=1.2, zorder=1)
        for x, one in tried.items():
            colour = "#d55e00" if one["collapsed"] else "#0072b2"
            axis.plot(x, one["loss"], "X" if one["collapsed"] else "o", color=colour, ms=9, zorder=2)
        axis.axhline(found["untouched"], color="#6b7280", lw=1.4, ls="--", label="untouched model")
        if found["sft"] is not None:
            axis.axhline(found["sft"], color="#6b7280", lw=1.4, ls=":", label="plain SFT")
        axis.set_xscale("log")
        finish(axis, "Where training collapses", found["name"], "loss on the validation rows", whole=False)
        axis.set_xticks(list(tried), [f"{x:g}" for x in tried], rotation=30, fontsize=9)
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=10)

    told = "; ".join(f"{x:g}: {one['loss']:.3f}{' collapsed' if one['collapsed'] else ''}" for x, one in tried.items())
    told += f"; untouched: {found['untouched']:.3f}"
    told += "" if found["sft"] is None else f"; plain SFT: {found['sft']:.3f}"
    return Figure("collapse", draw((8, 3.6), paint), told, "Circles hold, crosses have collapsed.")


def _outside(axis: Axes, lines: int) -> None:
    if lines > 1:
        axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
