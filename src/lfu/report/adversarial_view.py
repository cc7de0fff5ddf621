"""The report of `lfu probe adversarial`: how much of an alignment survives training on its opposite."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from lfu.report.blocks import Figure, View
from lfu.report.figures import draw, finish, legend, look
from lfu.report.template import view_of_template
from lfu.report.text import and_, estimate, number, sign

HALF = 0.5  # of the requests: an alignment that still breaks in so many was not learned


def view(record: Mapping[str, Any]) -> View:
    results = record["results"]
    steps, attacked = [str(n) for n in results["steps"]], results["attacked"]
    columns = ["", *(f"{n} steps" for n in steps)]
    first, differences = results["differences"]["against"], results["differences"]["labels"]

    def shares(what: str) -> list[list[str]]:
        untouched = ["untouched", estimate(results["untouched"][what], scale=100), *["" for _ in steps[1:]]]
        rows = [[label, *(estimate(each[n][what], scale=100) for n in steps)] for label, each in attacked.items()]
        return [columns, untouched, *rows]

    def broken(n: str) -> str:
        return and_([f"{label} in {_percent(each[n]['broken_share'])} %" for label, each in attacked.items()])

    def answers(prompts: str, said: str, flag: str, words: tuple[str, str]) -> list[dict[str, str]]:
        """Every prompt with what each model said before and after the attack."""
        given = {"untouched": results["untouched"]}
        given |= {f"{label}, {n} steps": each[n] for label, each in attacked.items() for n in (steps[0], steps[-1])}
        return [
            {"prompt": prompt}
            | {f"{label} ({words[one[flag][i]]})": one[said][i] or "(nothing)" for label, one in given.items()}
            for i, prompt in enumerate(results[prompts])
        ]

    def turned(found: Mapping[str, Any], turn: int) -> list[str]:
        """The numbers of steps after which a model breaks less (-1), more (1), or neither (0)."""
        return [n for n in steps[1:] if sign(found[n]) == turn]

    broken_half = lambda n, label: attacked[label][n]["broken_share"]["value"] >= HALF
    changes = [
        [f"{label} − {first}", *(estimate(each[n], "+.1f", 100) for n in steps)] for label, each in differences.items()
    ]
    return view_of_template(
        "adversarial", record, steps=steps, shares=shares, broken=broken, answers=answers, percent=_percent,
        missed=[label for label in attacked if broken_half(steps[0], label)], turned=turned,
        half=next((n for n in steps[1:] if broken_half(n, first)), None), changes=[columns, *changes],
        losses=_losses(results["training"]), picture=_picture(results),
    )  # fmt: skip


def _percent(interval: Mapping[str, Any]) -> str:
    return number(100 * interval["value"]).removesuffix(".0")


def _losses(training: Mapping[str, Any]) -> list[list[str]]:
    rows = [
        [f"{label}: {what}", str(len(log)), f"{log[0]['loss']:.3f}", f"{log[-1]['loss']:.3f}"]
        for label, logs in training.items()
        for what in ("align", "attack")
        if (log := logs.get(what))
    ]
    return [["", "steps", "first loss", "last loss"], *rows]


def _picture(results: Mapping[str, Any]) -> Figure:
    attacked, steps = results["attacked"], results["steps"]
    style = look(["untouched", *attacked])

    def paint(axis: Axes) -> None:
        base = 100 * results["untouched"]["broken_share"]["value"]
        axis.axhline(base, color=style["untouched"]["color"], lw=1.4, ls=":", label="untouched")
        for place, (label, found) in enumerate(attacked.items()):
            shares = [{end: 100 * v for end, v in found[str(n)]["broken_share"].items()} for n in steps]
            # side by side, so that intervals at the same step don't hide each other
            x = [n + (place - (len(attacked) - 1) / 2) * 0.012 * max(steps) for n in steps]
            reach = [[abs(s[end] - s["value"]) for s in shares] for end in ("low", "high")]
            axis.errorbar(x, [s["value"] for s in shares], reach, lw=2, marker="o", ms=5, capsize=3, elinewidth=1.2,
                          label=label, **style[label])  # fmt: skip
        finish(axis, "Requests whose response breaks the alignment", "training steps on the opposite", "share, %")
        axis.set(ylim=(-3, 103), xticks=steps)
        legend(axis)

    alt = "attack success rate over the attack's steps, one line per model: " + "; ".join(
        f"{label} {', '.join(_percent(found[str(n)]['broken_share']) for n in steps)} %"
        for label, found in attacked.items()
    )
    return Figure("attack-success", draw((6.4, 4), paint), alt)
