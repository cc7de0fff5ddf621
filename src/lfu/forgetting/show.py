"""What people see of it: one line a reading, and at the end a record and its page."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfu.forgetting.fingerprint import fingerprint
from lfu.forgetting.items import PROSE, QUESTIONS
from lfu.forgetting.keep import Reading
from lfu.forgetting.measuring import Measuring
from lfu.support.extras import missing
from lfu.support.files import dump_json, write_text
from lfu.support.words import filled


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
    """Prints a line to stderr, above a progress bar if there is one; a terminal breaks it between words."""
    from tqdm import tqdm

    text = f"forgetting: {text}"
    tqdm.write(filled(text, rest="  ") if sys.stderr.isatty() else text, file=sys.stderr)


def record(measuring: Measuring, kept: Reading, last_step: int) -> dict[str, Any]:
    """The record of a run, as `lfu probe forgetting` writes it, with the curve. Call it in all processes.

    `kept` is the reading of the model that is left.
    """
    from lfu.evaluation.forgetting import against_base
    from lfu.evaluation.record import describe_model, make_record
    from lfu.evaluation.score import TokenScores

    memory, seed = measuring.memory, measuring.seed
    questions = next(each for each in measuring.sets if each.name == QUESTIONS).items
    answers, model = {"base": memory.before, "tuned": kept.answers}, measuring.model
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    described = describe_model(name, model, weights="in training")
    asked, read = len(kept.answers.chosen[QUESTIONS]), len(kept.answers.nll[PROSE])
    return make_record(
        "forgetting",
        models=dict.fromkeys(answers, described),
        settings={
            "base": "base",
            "measured": f"while the model was trained, to step {last_step}; the figures are those of step {kept.step}",
            "questions": f"built-in general knowledge ({asked})",
            "texts": f"built-in prose ({read}), up to {measuring.longest} tokens of each",
        },
        results=against_base(
            questions[:asked],
            {label: said.chosen[QUESTIONS][:asked] for label, said in answers.items()},
            # texts of equal weight
            {label: TokenScores(said.nll[PROSE][:read], [1] * read) for label, said in answers.items()},
            "base",
            seed=seed,
        )
        | {
            "curve": [{"step": r.step, "over": r.over, "shown": r.shown, **r.figures} for r in memory.readings],
            "budget": dict(measuring.budget),
            "kept_step": kept.step,
            "fingerprint": fingerprint(model),
        },
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        seed=seed,
    )


def write(made: Mapping[str, Any], folder: Path) -> str:
    """Writes the record, and the page if its packages are there. Returns what to tell."""
    if packages := missing("report"):
        write_text(folder / "record.json", dump_json(made))
        return f"numbers in {folder / 'record.json'}; for a page with the curves: pip install {' '.join(packages)}"
    from lfu.report.page import write_report

    write_report(made, folder)
    return f"curves and questions to read in {folder / 'index.html'}"
