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
from lfu.report.compare_text import value
from lfu.report.figures import GRID, INK, MARKERS, PALETTE, draw, finish, legend, line, look, row_names
from lfu.report.text import shorter
from lfu.study.metrics import KINDS, Metric

GREY, ORANGE, BLUE = PALETTE[:3]


def _looks(mode: Mode) -> dict[str, dict[str, Any]]:
    """Label -> colour and dashes, the same in every picture; the untouched model is grey."""
    return look(["untouched", *mode.results["settings"]])


def _name(label: str) -> str:
    return shorter(label, 22)


def _legend_below(axis: Axes, handles: Sequence[Any]) -> None:
    axis.figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=9)


def loss_of(entry: Mapping[str, Any]) -> float | None:
    """The SFT loss of a step, which methods with an own total log beside it."""
    return entry.get("lfu/sft_loss", entry.get("loss"))


def one_curve(title: str, curve: Sequence[Mapping[str, Any]]) -> bytes:
    """The training curve of one run, as PNG."""

    def paint(axis: Axes) -> None:
        points = [(entry["step"], loss) for entry in curve if (loss := loss_of(entry)) is not None]
        axis.plot(*zip(*points), lw=1.8, marker="o", ms=2.5, color=BLUE)
        finish(axis, title, "training step", "training loss")

    return draw((6, 3.2), paint)


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
    style = _looks(mode)
    each = {label: _mean_curve(list(seeds.values())) for label, seeds in mode.found["curves"].items()}
    found = {label: points for label, points in each.items() if points}
    other = own_losses(mode.results, list(found))
    panels = [("Training loss", [label for label in found if label not in other]), ("Their own losses", list(other))]
    panels = [(title, labels) for title, labels in panels if labels]
    if not panels:
        return None

    def paint(*axes: Axes) -> None:
        for axis, (title, labels) in zip(axes, panels):
            for label in labels:
                axis.plot(*zip(*found[label]), lw=1.6, label=_name(label), **style[label])
            finish(axis, title, "training step", "nats per token" if title == "Training loss" else "")
        _legend_below(axes[0], [line for axis in axes for line in axis.get_lines()])

    told = "; ".join(f"{label}: {points[0][1]:.3f} to {points[-1][1]:.3f}" for label, points in found.items())
    caption = "Mean over the seeds. Of LfU the SFT part; of other methods with a penalty the sum."
    if other:
        told_of = "; ".join(f"{label}: {what}" for label, what in other.items())
        caption += f" Set apart, as they can't be compared with SFT's nor with each other: {told_of}."
    picture = draw((9, 3.6 + 0.25 * (len(found) // 4)), paint, len(panels), width_ratios=[2, 1][: len(panels)])
    return Figure(mode.file("training"), picture, f"training loss, first to last step: {told}", caption)


def _mean_curve(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[int, float]]:
    points = []
    for entries in zip(*seeds):
        losses = [loss for entry in entries if (loss := loss_of(entry)) is not None]
        points += [(entries[0]["step"], fmean(losses))] if losses else []
    return points


def forgetting(mode: Mode) -> Figure | None:
    """What was forgotten on the way, by training step: known answers lost less those gained, and the rise on prose."""
    panels = (("net_lost", "Known answers lost, net", 100, "%"), ("prose_rise", "Rise of the loss on prose", 1, "nats"))
    found = {  # label -> figure -> by step, from 0
        label: {key: [0.0, *(scale * fmean(one[key] for one in each) for each in zip(*seeds.values()))]
                for key, _, scale, _ in panels}
        | {"step": [0, *(each[0]["step"] for each in zip(*seeds.values()))]}
        for label, seeds in mode.found["forgetting"].items()
        if seeds and all(seeds.values())
    }  # fmt: skip
    if not found:
        return None
    style = _looks(mode)

    def paint(*axes: Axes) -> None:
        for axis, (key, title, _, unit) in zip(axes, panels):
            for label, each in found.items():
                axis.plot(each["step"], each[key], lw=1.8, marker="o", ms=3.5, label=_name(label), **style[label])
            axis.axhline(0, color=GREY, lw=1, ls=":")
            finish(axis, title, "training step", unit)
            axis.set_xlim(left=0)
        axes[0].legend(fontsize=9)

    told = "; ".join(
        f"{label}: {each['net_lost'][-1]:+.1f} % of known answers lost, prose {each['prose_rise'][-1]:+.3f} nats"
        for label, each in found.items()
    )
    return Figure(mode.file("forgetting"), draw((9, 3.2), paint, 2), f"at the last step: {told}")


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
        _legend_below(axes[0], axes[0].get_legend_handles_labels()[0])

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
        axis.plot(across, up, marker, color=colour, ms=8, label=_name(label), zorder=4, ls="none")
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
    found, style = mode.found["noise"], _looks(mode)
    if not found:
        return None

    def paint(axis: Axes) -> None:
        for label, layers in found.items():
            line(axis, list(range(1, len(layers) + 1)), layers, style[label], _name(label))
        finish(axis, "Hidden states with and without input noise", "layer", "cosine similarity")
        legend(axis, outside=True)

    told = "; ".join(f"{label}: {layers[0]:.4f} to {layers[-1]:.4f}" for label, layers in found.items())
    return Figure(mode.file("noise"), draw((9, 3.8), paint), f"cosine similarity, first to last layer: {told}")


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
        row_names(axis, list(map(_name, found)))
        unit = "accuracy, %" if kind is KINDS["share"] else "loss on the answers, nats per token"
        axis.set(title="One circle for each wording of the prompt, one line for each seed", xlabel=unit)

    told = "; ".join(
        f"{label}: " + ", ".join(f"{template} {value(metric, fmean(seeds))}" for template, seeds in templates.items())
        for label, templates in found.items()
    )
    most = max(len(seeds) for templates in found.values() for seeds in templates.values())
    size = (8, 1.5 + (0.36 + 0.06 * min(most, 10)) * len(found))
    return Figure(mode.file("wording"), draw(size, paint), f"means over the seeds: {told}")


def sweep(mode: Mode) -> Figure | None:
    """Loss and what was kept over the one parameter that varies, or over two; None where more or none do."""
    metrics, settings, means = mode.metrics, mode.results["settings"], mode.found["values"]
    kept = next((key for key, metric in metrics.items() if metric.group == "kept"), None)
    panels = [metrics[key] for key in ("loss", kept) if key in metrics]
    labels = list(next(iter(means.values()), {}))
    found = [label for label in labels if settings[label]["yardstick"] != label] or labels  # or a sweep of plain SFT
    grid = {label: settings[label]["values"] for label in found}
    names = list(dict.fromkeys(name for values in grid.values() for name in values))
    methods = {settings[label]["method"] for label in found}
    complete = all(list(values) == names for values in grid.values())
    if not panels or len(found) < 2 or len(methods) > 1 or not complete or not 1 <= len(names) <= 2:
        return None
    yardsticks = [settings[label]["yardstick"] for label in found]
    paint_one = partial(_lines, yardsticks=yardsticks) if len(names) == 1 else _map

    def paint(*axes: Axes) -> None:
        for axis, metric in zip(axes, panels):
            shown = {label: metric.scale.shown(one["mean"]) for label, one in means[metric.key].items()}
            paint_one(axis, metric, shown, grid, names)

    told = "; ".join(
        f"{metric.title}: " + ", ".join(f"{label} {value(metric, means[metric.key][label]['mean'])}" for label in found)
        for metric in panels
    )
    dashed = " Dashed: plain SFT." if len(names) == 1 and methods != {"sft"} else ""
    picture = draw((5.2 * len(panels) + 0.4, 3.8), paint, len(panels))
    return Figure(f"sweep-{mode.name}", picture, told, f"Means over the seeds.{dashed}")


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
        finish(axis, "Where training collapses", found["name"], "loss on the validation rows", whole=False)
        axis.set_xticks(list(tried), [f"{x:g}" for x in tried], rotation=30, fontsize=9)
        axis.minorticks_off()
        legend(axis)

    told = [f"{x:g}: {one['loss']:.3f}{' collapsed' if one['collapsed'] else ''}" for x, one in tried.items()]
    told += [f"{label}: {level:.3f}" for label, (level, _) in levels.items() if level is not None]
    return Figure("collapse", draw((8, 3.6), paint), "; ".join(told))
