"""Which run it is: what a run that goes on from a checkpoint should have in common with the one that wrote it."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from trl import SFTConfig

from lfu.data.learned import is_tokenised
from lfu.evaluation.record import digest
from lfu.methods.knobs import knobs_of
from lfu.methods.method import Method

SAMPLE = 64  # training rows, spread over all of them, that tell one data set from another
APART = {"method_args", "preset", "advice", "log_layers"}  # fields that are told otherwise, or change nothing


def identity(methods: Sequence[Method], args: Any, rows: Any) -> dict[str, Any]:
    """The methods, their knobs, this package's own fields of the config `args`, and a word on the training rows.

    SFTConfig's fields (learning rate, length) may change on the way, and are no part of it.
    """
    knobs = {f"{m.name}.{f.name}": getattr(m, f.name) for m in methods for f in knobs_of(m) if not f.metadata["output"]}
    own = sorted({f.name for f in fields(args)} - {f.name for f in fields(SFTConfig)} - APART)
    return (
        {name: getattr(args, name) for name in own} | {"method": "+".join(method.name for method in methods)} | knobs
        | {"training rows": _told(rows)}
    )  # fmt: skip


def _told(rows: Any) -> str:
    """How many rows there are, and a hash of the tokens of some of them; the same in every process."""
    if not hasattr(rows, "__len__"):
        return "streamed"
    if not is_tokenised(rows):  # images, which are read when they are needed
        return f"{len(rows)}"
    some = [rows[i]["input_ids"] for i in range(0, len(rows), max(1, len(rows) // SAMPLE))]
    return f"{len(rows)} (hash {digest(some)[:8]})"
