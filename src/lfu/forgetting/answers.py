"""What a model said to every set of items, and what that is against the untouched model's answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lfu.evaluation.intervals import transitions
from lfu.forgetting.items import PROSE, QUESTIONS, ItemSet


@dataclass
class Answers:
    """What one model said, item by item."""

    chosen: dict[str, list[int]] = field(default_factory=dict)  # set of questions -> index of each choice taken
    nll: dict[str, list[float]] = field(default_factory=dict)  # set of texts -> NLL of each, nats per token
    kl: list[float] = field(default_factory=list)  # KL(untouched || model) of each written text, nats per token


def compare(before: Answers, after: Answers, sets: Sequence[ItemSet]) -> dict[str, float]:
    """Figures of `after` against `before` on the items that both were asked, by the name that trackers see.

    For questions: `items`, `known` (right before), `kept`, `lost`, `gained` and `net_lost`, (lost - gained) / known.
    For texts: `loss` (nats per token) and `rise` of it. `kl` on the text that the untouched model wrote. The built-in
    questions' figures carry no prefix, those of prose begin with `prose_`, those of a file with its name and a slash.
    """
    figures: dict[str, float] = {}
    for each in sets:
        prefix = {QUESTIONS: "", PROSE: "prose_"}.get(each.name, f"{each.name}/")
        if each.choice:
            figures |= {f"{prefix}{name}": value for name, value in _questions(before, after, each).items()}
        else:
            now, then = after.nll[each.name], before.nll[each.name]
            loss = sum(now) / len(now)
            figures |= {f"{prefix}loss": loss, f"{prefix}rise": loss - sum(then[: len(now)]) / len(now)}
    if after.kl:
        figures["kl"] = sum(after.kl) / len(after.kl)
    return figures


def right(answers: Answers, each: ItemSet) -> list[bool]:
    """Which of a set's questions were answered right."""
    return [choice == row["answer"] for choice, row in zip(answers.chosen[each.name], each.items)]


def _questions(before: Answers, after: Answers, each: ItemSet) -> dict[str, float]:
    now = right(after, each)
    counts = transitions(right(before, each)[: len(now)], now)
    known = counts["kept"] + counts["lost"]
    net = (counts["lost"] - counts["gained"]) / max(1, known)
    counts.pop("never")
    return {"items": len(now), "known": known, **counts, "net_lost": net}
