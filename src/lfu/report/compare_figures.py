"""The pictures of a comparison, each from the record alone."""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from lfu.report.blocks import Figure
from lfu.report.compare_mode import Mode
from lfu.report.figures import GRID, INK, MARKERS, PALETTE, Panel, draw, finish, legend, look, panels, row_names
from lfu.report.metric_text import value
from lfu.report.text import shorter, told
from lfu.study.metrics import KINDS, Metric

GREY, ORANGE, BLUE = PALETTE[:3]


def _looks(mode: Mode) -> dict[str, dict[str, Any]]:
    """Label -> colour and dashes, the same in every picture; the untouched model is grey."""
    return look(["untouched", *mode.results["settings"]])


def loss_of(entry: Mapping[str, Any]) -> float | None:
    """The SFT loss of a step, which methods with an own total log beside it."""
    return entry.get("lfu/sft_loss", entry.get("loss"))


def one_curve(title: str, curve: Sequence[Mapping[str, Any]]) -> bytes:
    """The training curve of one run, as PNG."""
    return panels([Panel(title, "training step", "training loss", {"": _mean_curve([curve])})], {"": {"color": BLUE}})


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


def curves(mode: Mode) -> Figure | None:
    """Training loss by step, mean over the seeds; losses that can't be compared with SFT's are set apart."""
    each = {label: _mean_curve(list(seeds.values())) for label, seeds in mode.found["curves"].items()}
    found = {label: points for label, points in each.items() if points}
    if not found:
        return None
    other = own_losses(mode.results, list(found))
    shared = [label for label in found if label not in other]
    plots = [
        Panel(title, "training step", unit, {label: found[label] for label in labels})
        for title, unit, labels in (("Training loss", "nats per token", shared), ("Their own losses", "", other))
        if labels
    ]
    ends = told({label: f"{points[0][1]:.3f} to {points[-1][1]:.3f}" for label, points in found.items()})
    caption = "Mean over the seeds. Of LfU the SFT part; of other methods with a penalty the sum."
    if other:
        caption += f" Set apart, as they can't be compared with SFT's nor with each other: {told(other)}."
    picture = panels(plots, _looks(mode), width_ratios=[2, 1][: len(plots)])
    return Figure(mode.file("training"), picture, f"training loss, first to last step: {ends}", caption)


def _mean_curve(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[int, float]]:
    """(step, loss), mean over the seeds that have one."""
    losses = {each[0]["step"]: [loss for entry in each if (loss := loss_of(entry)) is not None] for each in zip(*seeds)}
    return [(step, fmean(found)) for step, found in losses.items() if found]


def forgetting(mode: Mode) -> Figure | None:
    """What was forgotten on the way, by training step: known answers lost less those gained, and the rise on prose."""
    known = {label: each for label, each in mode.found["forgetting"].items() if each and all(each.values())}
    if not known:
        return None

    def means(key: str, scale: float) -> dict[str, list[tuple[int, float]]]:
        """Over the seeds, at the steps that all of them were measured at."""
        found = {}
        for label, seeds in known.items():
            values = [{one["step"]: scale * one[key] for one in each} for each in seeds.values()]
            shared = [step for step in values[0] if all(step in each for each in values)]
            found[label] = [(0, 0.0), *((step, fmean(each[step] for each in values)) for step in shared)]
        return found

    lost, prose = means("net_lost", 100), means("prose_rise", 1)
    last = lambda label: (lost[label][-1][1], prose[label][-1][1])
    ends = {label: "{:+.1f} % of known answers lost, prose {:+.3f} nats".format(*last(label)) for label in known}
    plots = [
        Panel("Known answers lost, net", "training step", "%", lost, across=0),
        Panel("Rise of the loss on prose", "training step", "nats", prose, across=0),
    ]
    return Figure(mode.file("forgetting"), panels(plots, _looks(mode)), f"at the last step: {told(ends)}")


def gain_and_kept(mode: Mode) -> Figure | None:
    """A point a setting: what it learned to the right, what it kept upwards; the Pareto front is drawn through."""
    fronts, changes, style = mode.found["fronts"], mode.found["against_untouched"], _looks(mode)
    if not fronts:
        return None
    across = min(3, len(fronts))
    down = -(-len(fronts) // across)

    def paint(*axes: Axes) -> None:
        for axis in axes[len(fronts) :]:
            axis.set_axis_off()
        for axis, (key, front) in zip(axes, fronts.items()):
            _scatter(axis, mode.metrics[front["gain"]], mode.metrics[key], changes, front["front"], style)
        legend(axes[0])

    told = []
    for key, front in fronts.items():
        gain, kept = mode.metrics[front["gain"]], mode.metrics[key]
        for label, gained in changes[gain.key].items():
            told.append(f"{label}: {_better(gain, gained):.3f}, {_better(kept, changes[key][label]):.3f}")
        told.append(f"front of {kept.title}: {', '.join(front['front'])}")
    rows = 1 + len(changes[next(iter(fronts.values()))["gain"]]) // 4
    size = (min(13, 5.6 * across + 0.4), 0.6 + 3.6 * down + 0.25 * rows)
    return Figure(f"gain-and-kept-{mode.name}", draw(size, paint, across, down), "; ".join(told))


def _better(metric: Metric, interval: Mapping[str, Any], end: str = "value") -> float:
    """The change as it is drawn: better is more."""
    return metric.sign * metric.scale.change(interval[end])


def _scatter(
    axis: Axes, gain: Metric, kept: Metric, changes: Mapping[str, Any], front: Sequence[str], style: Mapping[str, Any]
) -> None:
    points = {"untouched": (0.0, 0.0)}
    axis.plot(0, 0, "s", color=style["untouched"]["color"], ms=8, label="untouched", zorder=4)
    numbers = {label: number for number, label in enumerate(style)}  # a setting's marker goes with its colour
    for label, x in changes[gain.key].items():
        y, colour = changes[kept.key][label], style[label]["color"]
        across, up = points[label] = (_better(gain, x), _better(kept, y))
        axis.plot([_better(gain, x, end) for end in ("low", "high")], [up] * 2, color=colour, lw=1.2, alpha=0.6)
        axis.plot([across] * 2, [_better(kept, y, end) for end in ("low", "high")], color=colour, lw=1.2, alpha=0.6)
        marker = MARKERS[(numbers[label] - 1) % len(MARKERS)]
        axis.plot(across, up, marker, color=colour, ms=8, label=label, zorder=4, ls="none")
    axis.plot(*zip(*(points[label] for label in front)), color=INK, lw=1, ls="--", alpha=0.5, zorder=3)
    for draw_line in (axis.axvline, axis.axhline):
        draw_line(0, color=GRID, lw=1.2, zorder=0)
    word = {-1: "fall", 1: "rise"}
    axis.set_xlabel(f"{gain.title}: {word[gain.sign]}, {gain.scale.change_unit} →", fontsize=10)
    axis.set_ylabel(f"{word[kept.sign]}, {kept.scale.change_unit} →", fontsize=10)
    axis.set(title=kept.title)
    axis.xaxis.set_major_locator(MaxNLocator(6))


def noise(mode: Mode) -> Figure | None:
    """Cosine similarity of clean and noisy hidden states by layer."""
    found = mode.found["noise"]
    if not found:
        return None
    lines = {label: list(enumerate(layers, start=1)) for label, layers in found.items()}
    plot = Panel("Hidden states with and without input noise", "layer", "cosine similarity", lines)
    ends = told({label: f"{layers[0]:.4f} to {layers[-1]:.4f}" for label, layers in found.items()})
    return Figure(mode.file("noise"), panels([plot], _looks(mode)), f"cosine similarity, first to last layer: {ends}")


def wording(mode: Mode) -> Figure | None:
    """A dot a prompt template and seed, a row a setting, in it a line a seed."""
    if not mode.found["wording"]:
        return None
    style, metric, found = _looks(mode), mode.metrics["wording"], mode.found["wording"]["templates"]
    kind = KINDS[mode.found["wording"]["kind"]]

    def paint(axis: Axes) -> None:
        for height, (label, templates) in enumerate(found.items()):
            colour, seeds = style[label]["color"], list(zip(*templates.values()))
            for number, of_seed in enumerate(seeds):
                values = [kind.shown(v) for v in of_seed]
                y = height + 0.6 * ((number + 0.5) / len(seeds) - 0.5)
                axis.plot([min(values), max(values)], [y, y], color=colour, lw=1, alpha=0.5, zorder=1)
                axis.plot(values, [y] * len(values), "o", mfc="none", mec=colour, mew=1.4, ms=5, zorder=3)
                axis.plot(fmean(values), y, "|", color=colour, ms=9, mew=2.2, zorder=2)
        row_names(axis, list(map(shorter, found)))
        unit = "accuracy, %" if kind is KINDS["share"] else "loss on the answers, nats per token"
        axis.set(title="One circle for each wording of the prompt, one line for each seed", xlabel=unit)

    each = lambda of: ", ".join(f"{template} {value(metric, fmean(seeds))}" for template, seeds in of.items())
    means = told({label: each(templates) for label, templates in found.items()})
    most = max(len(seeds) for templates in found.values() for seeds in templates.values())
    size = (8, 1.5 + (0.36 + 0.06 * min(most, 10)) * len(found))
    return Figure(mode.file("wording"), draw(size, paint), f"means over the seeds: {means}")


def sweep(mode: Mode) -> Figure | None:
    """Loss and what was kept over the one parameter that varies, or over two; None where more or none do."""
    metrics, settings, means = mode.metrics, mode.results["settings"], mode.found["values"]
    kept = next((key for key, metric in metrics.items() if metric.group == "kept"), None)
    judged = [metrics[key] for key in ("loss", kept) if key in metrics]
    labels = list(next(iter(means.values()), {}))
    found = [label for label in labels if settings[label]["yardstick"] != label] or labels  # or a sweep of plain SFT
    grid = {label: settings[label]["values"] for label in found}
    names = list(dict.fromkeys(name for values in grid.values() for name in values))
    methods = {settings[label]["method"] for label in found}
    complete = all(list(values) == names for values in grid.values())
    if not judged or len(found) < 2 or len(methods) > 1 or not complete or not 1 <= len(names) <= 2:
        return None
    yardsticks = [settings[label]["yardstick"] for label in found]
    paint_one = partial(_lines, yardsticks=yardsticks) if len(names) == 1 else _map

    def paint(*axes: Axes) -> None:
        for axis, metric in zip(axes, judged):
            shown = {label: metric.scale.shown(one["mean"]) for label, one in means[metric.key].items()}
            paint_one(axis, metric, shown, grid, names)

    each = lambda metric: ", ".join(f"{label} {value(metric, means[metric.key][label]['mean'])}" for label in found)
    alt = told({metric.title: each(metric) for metric in judged})
    dashed = " Dashed: plain SFT." if len(names) == 1 and methods != {"sft"} else ""
    picture = draw((5.2 * len(judged) + 0.4, 3.8), paint, len(judged))
    return Figure(f"sweep-{mode.name}", picture, alt, f"Means over the seeds.{dashed}")


def _lines(
    axis: Axes, metric: Metric, shown: Mapping[str, float], grid: Mapping[str, Any], names: Sequence[str],
    yardsticks: Sequence[str],
) -> None:  # fmt: skip
    """Over one parameter, with plain SFT beside it."""
    texts = [values[names[0]] for values in grid.values()]
    try:
        places = [float(text) for text in texts]
    except ValueError:
        places = [float(i) for i in range(len(texts))]
    if min(places) > 0 and max(places) / min(places) > 20:
        axis.set_xscale("log")
    axis.plot(places, [shown[label] for label in grid], "-o", color=BLUE, lw=2, ms=5)
    if yardsticks != list(grid) and all(label in shown for label in yardsticks):
        axis.plot(places, [shown[label] for label in yardsticks], "--", color=ORANGE, lw=1.8)
    axis.set(title=metric.title, xlabel=names[0], ylabel=metric.scale.unit)
    axis.set_xticks(places, texts, fontsize=9, rotation=30 if len(texts) > 5 else 0)
    axis.minorticks_off()
    axis.grid(axis="y")


def _map(axis: Axes, metric: Metric, shown: Mapping[str, float], grid: Mapping[str, Any], names: Sequence[str]) -> None:
    """Over two parameters, as a table with shades: the better the darker."""
    rows, columns = (list(dict.fromkeys(values[name] for values in grid.values())) for name in names)
    known = {tuple(values[name] for name in names): shown[label] for label, values in grid.items()}
    field = [[known.get((row, column), float("nan")) for column in columns] for row in rows]
    shades = ["#f3f7fb", "#8abbdc"][:: metric.sign]
    axis.imshow(field, cmap=LinearSegmentedColormap.from_list("shades", shades), aspect="auto")
    for y, each in enumerate(field):
        for x, number in enumerate(each):
            text = "-" if number != number else f"{number:.{metric.scale.places}f}"
            axis.text(x, y, text, ha="center", va="center", fontsize=9.5, color=INK)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlabel=names[1], ylabel=names[0])
    axis.set_title(f"{metric.title}, {metric.scale.unit}", fontsize=11)
    axis.tick_params(length=0)


def collapse(found: Mapping[str, Any]) -> Figure | None:
    """Loss on the validation rows over the bisected parameter."""
    tried = {float(text): one for text, one in found["tried"].items() if one["loss"] is not None}
    if not tried:
        return None
    levels = {"untouched model": (found["untouched"], "--"), "plain SFT": (found["sft"], ":")}

    def paint(axis: Axes) -> None:
        axis.plot(list(tried), [one["loss"] for one in tried.values()], "-", color="#9ca3af", lw=1.2, zorder=1)
        for x, one in tried.items():
            colour, marker = (ORANGE, "X") if one["collapsed"] else (BLUE, "o")
            axis.plot(x, one["loss"], marker, color=colour, ms=9, zorder=2)
        for label, (level, dashes) in levels.items():
            if level is not None:
                axis.axhline(level, color=GREY, lw=1.4, ls=dashes, label=label)
        axis.set_xscale("log")
        finish(axis, "Where training collapses", found["name"], "loss on the validation rows")
        axis.set_xticks(list(tried), [f"{x:g}" for x in tried], rotation=30, fontsize=9)
        axis.minorticks_off()
        legend(axis)

    told = [f"{x:g}: {one['loss']:.3f}{' collapsed' if one['collapsed'] else ''}" for x, one in tried.items()]
    told += [f"{label}: {level:.3f}" for label, (level, _) in levels.items() if level is not None]
    return Figure("collapse", draw((8, 3.6), paint), "; ".join(told))
