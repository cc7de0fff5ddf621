"""What people see of it: one line a reading, and at the end a record and its page."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lfu.forgetting.items import PROSE, QUESTIONS, ItemSet
from lfu.forgetting.keep import Memory, Reading
from lfu.support.files import dump_json, write_text

PACKAGES = ("matplotlib", "jinja2")


def line(reading: Reading, budget: Mapping[str, float]) -> str:
    """A reading in one line."""
    f = reading.figures
    parts = [
        f"{f['lost']} of {f['known']} known answers lost, {f['gained']} gained (net {-100 * f['net_lost']:+.1f} %)",
        f"prose {f['prose_rise']:+.3f} nats",
        *([f"KL {f['kl']:.3f}"] if "kl" in f else []),
    ]
    for name, value in f.items():
        own, _, figure = name.rpartition("/")
        if own and figure in ("rise", "net_lost"):
            parts.append(f"{own} {value:+.3f} nats" if figure == "rise" else f"{own} net {-100 * value:+.1f} %")
    if reading.shown:
        parts.append(f"over budget beyond the noise: {', '.join(reading.shown)}")
    elif reading.over:
        parts.append(f"over budget, within the noise: {', '.join(reading.over)}")
    elif budget:
        parts.append("within budget")
    return f"step {reading.step}: " + "; ".join(parts)


def say(text: str) -> None:
    """Prints a line to stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"forgetting: {text}", file=sys.stderr)


def record(memory: Memory, last: Reading, sets: Sequence[ItemSet], about: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run, of the kind that `lfu probe forgetting` writes, with the curve.

    Args:
        last: the reading that the tuned model's figures are taken from.
        about: `model`, `settings`, `command`, `seed`, `fingerprint`.
    """
    from lfu.evaluation.forgetting import forgetting, perplexity_change
    from lfu.evaluation.record import make_record
    from lfu.evaluation.score import TokenScores
    from lfu.forgetting.measure import right

    questions = next(each for each in sets if each.name == QUESTIONS)
    now = right(last.answers, questions)
    known = right(memory.before, questions)[: len(now)]
    losses = {"base": memory.before.nll[PROSE][: len(last.answers.nll[PROSE])], "tuned": last.answers.nll[PROSE]}
    scores = {label: TokenScores(nll, [1] * len(nll)) for label, nll in losses.items()}  # of equal weight
    change = perplexity_change(scores["base"], scores["tuned"], seed=about["seed"])
    perplexity = {
        "before": math.exp(scores["base"].mean), "after": math.exp(scores["tuned"].mean), "log_ratio": asdict(change)
    }  # fmt: skip
    return make_record(
        "forgetting",
        models=dict.fromkeys(("base", "tuned"), about["model"]),
        settings=about["settings"],
        results={
            "questions": [dict(row) for row in questions.items[: len(now)]],
            "chosen": {"base": memory.before.chosen[QUESTIONS][: len(now)], "tuned": last.answers.chosen[QUESTIONS]},
            "texts": {label: asdict(score) for label, score in scores.items()},
            "forgetting": {"tuned": asdict(forgetting(known, now, seed=about["seed"]))},
            "perplexity": {"tuned": perplexity},
            "curve": [{"step": r.step, "over": r.over, "shown": r.shown, **r.figures} for r in memory.readings],
            "budget": about["budget"],
            "kept_step": last.step,
            "fingerprint": about["fingerprint"],
        },
        command=about["command"],
        seed=about["seed"],
    )


def write(made: Mapping[str, Any], folder: Path) -> str:
    """Writes the record, and the page if its packages are there. Returns what to tell."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        write_text(folder / "record.json", dump_json(made))
        return f"numbers in {folder / 'record.json'}; for a page with the curves: pip install {' '.join(missing)}"
    from lfu.report.page import write_report

    write_report(made, folder)
    return f"curves and questions to read in {folder / 'index.html'}"
