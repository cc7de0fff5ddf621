"""What people see of it: one line a reading, and at the end a record and its page."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lfu.forgetting.fingerprint import fingerprint
from lfu.forgetting.items import PROSE, QUESTIONS
from lfu.forgetting.keep import Reading
from lfu.forgetting.measure import LONGEST, right
from lfu.forgetting.measuring import Measuring
from lfu.support.files import dump_json, write_text

PACKAGES = ("matplotlib", "jinja2")


def line(reading: Reading, budget: Mapping[str, float]) -> str:
    """A reading in one line."""
    f = reading.figures
    parts = [
        f"{f['lost']} of {f['known']} known answers lost, {f['gained']} gained",
        f"prose {f['prose_rise']:+.3f}",
        *([f"KL {f['kl']:.3f}"] if "kl" in f else []),
    ]
    for name, value in f.items():
        own, _, figure = name.rpartition("/")
        if own and figure in ("rise", "net_lost"):
            parts.append(f"{own} {value:+.3f}" if figure == "rise" else f"{own} {value:.1%} forgotten")
    if reading.shown:
        parts.append(f"OVER BUDGET beyond the noise: {', '.join(reading.shown)}")
    elif reading.over:
        parts.append(f"over budget, within the noise: {', '.join(reading.over)}")
    elif budget:
        parts.append("within budget")
    return f"step {reading.step}: " + "; ".join(parts)


def say(text: str) -> None:
    """Prints a line to stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"forgetting: {text}", file=sys.stderr)


def record(measuring: Measuring, kept: Reading, last_step: int) -> dict[str, Any]:
    """The record of a run, of the kind that `lfu probe forgetting` writes, with the curve. Call it in all processes.

    Args:
        kept: the reading whose model is left.
        last_step: of the run.
    """
    from lfu.evaluation.forgetting import forgetting, perplexity_change
    from lfu.evaluation.record import make_record
    from lfu.evaluation.score import TokenScores

    memory, seed = measuring.memory, measuring.seed
    questions = next(each for each in measuring.sets if each.name == QUESTIONS)
    now = right(kept.answers, questions)
    known = right(memory.before, questions)[: len(now)]
    losses = {"base": memory.before.nll[PROSE][: len(kept.answers.nll[PROSE])], "tuned": kept.answers.nll[PROSE]}
    scores = {label: TokenScores(nll, [1] * len(nll)) for label, nll in losses.items()}  # texts of equal weight
    change = asdict(perplexity_change(scores["base"], scores["tuned"], seed=seed))
    before, after = (math.exp(score.mean) for score in scores.values())
    return make_record(
        "forgetting",
        models={label: describe(measuring.model) for label in ("base", "tuned")},
        settings={
            "base": "base",
            "measured": f"while the model was trained, to step {last_step}; the figures are those of step {kept.step}",
            "questions": f"built-in general knowledge ({len(now)})",
            "texts": f"built-in prose ({len(losses['tuned'])}), up to {LONGEST} tokens of each",
        },
        results={
            "questions": [dict(row) for row in questions.items[: len(now)]],
            "chosen": {"base": memory.before.chosen[QUESTIONS][: len(now)], "tuned": kept.answers.chosen[QUESTIONS]},
            "texts": {label: asdict(score) for label, score in scores.items()},
            "forgetting": {"tuned": asdict(forgetting(known, now, seed=seed))},
            "perplexity": {"tuned": {"before": before, "after": after, "log_ratio": change}},
            "curve": [{"step": r.step, "over": r.over, "shown": r.shown, **r.figures} for r in memory.readings],
            "budget": dict(measuring.budget),
            "kept_step": kept.step,
            "fingerprint": fingerprint(measuring.model),
        },
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        seed=seed,
    )


def describe(model: Any) -> dict[str, Any]:
    """As `lfu.evaluation.record.describe_model`, without reading all weights."""
    parameters = list(model.parameters())
    return {
        "name": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "weights": "in training",
    }


def write(made: Mapping[str, Any], folder: Path) -> str:
    """Writes the record, and the page if its packages are there. Returns what to tell."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        write_text(folder / "record.json", dump_json(made))
        return f"numbers in {folder / 'record.json'}; for a page with the curves: pip install {' '.join(missing)}"
    from lfu.report.page import write_report

    write_report(made, folder)
    return f"curves and questions to read in {folder / 'index.html'}"
