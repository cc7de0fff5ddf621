"""The demo's page: one self-contained HTML file from the record and the figures."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2

from lfu.report.demo_figures import change_panel, curve
from lfu.report.demo_summary import PAIRS, WHO

EXAMPLES = 3


def page(record: Mapping[str, Any]) -> str:
    """The page as HTML text. Everything that a model wrote is escaped.

    Args:
        record: what `lfu.demo` writes to record.json.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = files("lfu.report").joinpath("demo.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        record=record,
        who=WHO,
        pairs=[f"{one}-{two}" for one, two in PAIRS],
        pair_names={f"{one}-{two}": f"{WHO[one]} − {WHO[two]}" for one, two in PAIRS},
        panels={row["key"]: change_panel(row) for row in record["summary"]},
        curves=_curves(record),
        examples=_examples(record),
        minutes=_minutes,
    )


def _curves(record: Mapping[str, Any]) -> dict[str, str]:
    """name -> picture."""
    training = record["training"]
    settings = record["settings"]
    target = {"line": (settings["strength"], "target")} if settings["lam"] == "auto" else {}
    return {
        "loss": curve(_losses(training), "sft_loss", "Loss on the training answers"),
        "consistency": curve(training, "lfu/consistency", "LfU: consistency term", log=True),
        "ratio": curve(training, "lfu/gradient_ratio", "LfU: gradient ratio", **target),
    }


def _losses(training: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The SFT part of the loss for both methods: LfU's total loss has the consistency in it and isn't comparable."""
    return {
        who: [{**entry, "sft_loss": entry.get("lfu/sft_loss", entry.get("loss"))} for entry in history]
        for who, history in training.items()
    }


def _examples(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first few held-out problems with what each model wrote: the first, not the nicest."""
    measures = record["measures"]
    return [
        {
            "question": row["question"],
            "reference": row["answer"],
            "said": {
                who: {
                    "text": measures[who]["match"]["text"][i].strip() or "(nothing)",
                    "right": measures[who]["match"]["correct"][i],
                }
                for who in WHO
            },
        }
        for i, row in enumerate(record["test_rows"][:EXAMPLES])
    ]


def _minutes(seconds: float) -> str:
    """Seconds as m:ss."""
    return "{}:{:02d}".format(*divmod(round(seconds), 60))
