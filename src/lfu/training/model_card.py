"""What a run gained and forgot, as a section of the model card."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- gained and forgotten -->", "<!-- end of gained and forgotten -->"
Entry = dict[str, Any]


def add_to_card(card: Path, history: Sequence[Entry], method: str) -> None:
    """Puts the section at the end of the card, in place of an earlier one. Does nothing where there is no card."""
    if card.is_file():
        before, begin, rest = card.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2] if begin else ""
        card.write_text(f"{before.rstrip()}\n\n{section(history, method)}\n{after.lstrip()}", encoding="utf-8")


def name_the_base(card: Path, base: str, folder: str) -> None:
    """Mends the card of a model whose `base` is a local folder or unnamed, or that is in `folder`, not on the hub.

    TRL then writes "None", and PEFT a path of this machine, which the hub refuses.
    """
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8").replace("Card for None", f"Card for {folder}")
    text = text.replace('model="None"', f'model="{folder}"')
    if not base:
        text = text.replace("This model is a fine-tuned version of [None](https://huggingface.co/None).\n", "")
    elif os.path.isdir(base):
        text = re.sub(rf"(?m)^(base_model: |- base_model:\w+:)['\"]?{re.escape(base)}['\"]?\n", "", text)
        text = text.replace("[None](https://huggingface.co/None)", f"`{Path(base).name}`")
    card.write_text(text, encoding="utf-8")


def of_kept(history: Sequence[Entry], step: int) -> list[Entry]:
    """What was logged up to the step whose weights are kept (-1: of none), and after training, when these were back."""
    end = max((i for i, entry in enumerate(history) if "train_runtime" in entry), default=len(history))
    return [entry for i, entry in enumerate(history) if entry["step"] <= step or i > end]


def section(history: Sequence[Entry], method: str) -> str:
    """Markdown, from the trainer's `state.log_history` and the name of the fine-tuning method."""
    losses = [entry for entry in history if "eval_loss" in entry]
    readings = [entry for entry in history if "forgetting/known" in entry]
    rows = _forgotten(readings[-1]) if readings else []
    if losses:
        first, last = losses[0], losses[-1]
        start = f"{first['eval_loss']:.3f} (step {first.get('step', 0)})" if len(losses) > 1 else "not measured"
        rows.insert(0, ("loss on the evaluation rows, nats per token", start, f"{last['eval_loss']:.3f}"))
    lines = [BEGIN, "## What was gained and what was forgotten", ""]
    lines += [f"Trained with the method `{method}` of lfu-tuning."]
    if rows:
        lines += ["", "| | before | after |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    if not readings:
        lines += ["", "What the model forgot was not measured. `lfu probe forgetting BASE THIS_MODEL` measures it."]
    return "\n".join([*lines, END])


def _forgotten(reading: Entry) -> list[tuple[str, str, str]]:
    last = {name.removeprefix("forgetting/"): value for name, value in reading.items()}
    known, lost, gained = int(last["known"]), last["lost"], last["gained"]
    after = f"{known - lost + gained:.0f} ({lost:.0f} lost, {gained:.0f} gained)"
    rows = [("built-in questions answered rightly", f"{known} of {last['items']:.0f}", after)]
    if "prose_rise" in last:
        loss, rise = last["prose_loss"], last["prose_rise"]
        rows.append(("loss on plain prose, nats per token", f"{loss - rise:.3f}", f"{loss:.3f} ({rise:+.3f})"))
    return rows
